# SPDX-License-Identifier: MIT
"""
The door to C: what is compiled in, what the shim does with libdevmapper's log, what the suspended section skips.

No driver is needed, and none is touched: where libdevmapper looks for its control node, there is none.
"""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import _cffi_backend
import pytest

import dmlib
from dmlib import _ffi

PACKAGE = Path(dmlib.__file__).parent


STRICT = ("-X", "dev", "-W", "error")


def python(code, *words, env=None, path=PACKAGE.parent, options=STRICT):
    """Run a Python program in a process of its own, with the package in *path* and nothing installed but cffi."""
    begin = f"import sys; sys.path[:0] = {[str(path), os.path.dirname(_cffi_backend.__file__)]}\n"
    return subprocess.run(
        [sys.executable, "-S", *options, "-c", begin + code, *map(str, words)],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd="/",
    )


def printed(*words, **keywords):
    """What such a program printed, read as JSON."""
    done = python(*words, **keywords)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture
def package(tmp_path):
    """Copy the package to where it may be changed."""
    shutil.copytree(PACKAGE, tmp_path / "dmlib", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


# -- the extension


def test_the_protocol_and_the_extension_name_the_same_things():
    """Whatever is compiled in is typed, and whatever is typed is compiled in; functions take as many arguments."""
    lib, ffi = _ffi.load()
    methods = {
        name: member
        for name, member in vars(_ffi.Library).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }
    compiled = set(dir(lib))
    assert compiled == set(methods) | set(_ffi.Library.__annotations__)
    for name, method in methods.items():
        arguments = ffi.typeof(ffi.addressof(lib, name)).args
        assert len(arguments) == len(inspect.signature(method).parameters) - 1, name
    for name in _ffi.Library.__annotations__:
        assert isinstance(getattr(lib, name), int), name


FIRST_USE = """
import json
import dmlib
from dmlib import KiB, Table
assert KiB(64).bytes == 65536
assert len(Table.parse("0 8 zero")) == 1
errors = []
for attempt in range(2):
    try:
        dmlib.library_version()
    except dmlib.UnsupportedError as error:
        errors.append([error.feature, error.need, error.have, str(error)])
print(json.dumps(errors))
"""


def test_an_extension_of_another_version_is_refused(package):
    """An extension that was built for another dmlib is reported at each first use; what is pure goes on working."""
    init = package / "dmlib" / "__init__.py"
    old = f'__version__ = "{dmlib.__version__}"'
    text = init.read_text(encoding="utf-8")
    assert old in text
    init.write_text(text.replace(old, '__version__ = "99.1"'), encoding="utf-8")
    errors = printed(FIRST_USE, path=package)
    assert len(errors) == 2
    for feature, _, have, text in errors:
        assert feature == "dmlib 99.1"
        assert dmlib.__version__ in have
        assert "extension" in text
        assert "build" in text


def test_a_missing_extension_is_reported_at_first_use(package):
    """Without the compiled extension, importing and what is pure work; the first use says what is to be done."""
    compiled = list((package / "dmlib").glob("_dm.*"))
    assert compiled
    for file in compiled:
        file.unlink()
    errors = printed(FIRST_USE, path=package)
    assert len(errors) == 2
    for _, need, have, _ in errors:
        assert "_dm" in have
        assert "libdevmapper" in need
        assert "build" in need


def test_an_unusable_library_is_reported_at_first_use(tmp_path):
    """A libdevmapper that the linker cannot load is reported with the linker's own words."""
    (tmp_path / "libdevmapper.so.1.02.1").write_bytes(b"")
    errors = printed(FIRST_USE, env={"LD_LIBRARY_PATH": str(tmp_path)})
    assert len(errors) == 2
    assert all("libdevmapper.so.1.02.1: file too short" in have for _, _, have, _ in errors)


def test_import_and_use_are_clean_in_development_mode():
    """Importing every name and asking for the version warns of nothing."""
    code = """
import json
from dmlib import *
import dmlib
print(json.dumps([len(dmlib.__all__), library_version()]))
"""
    count, version = printed(code)
    assert count == len(dmlib.__all__)
    assert version == _ffi.library_version()
    assert tuple(map(int, version.split()[0].split("."))) >= (1, 2, 175)


# -- the log

LOGGED = """
import json
from dmlib import _ffi
lib, ffi = _ffi.load()
lib.dmlib_log_threshold(7)  # what a relative path is answered with is a debug line
"""


def test_lines_belong_to_the_thread_that_caused_them():
    """Two threads that cause complaints at the same time each take their own, and nobody else takes any."""
    code = """
import threading
def complain(word):
    for i in range(20):
        start.wait()
        assert not lib.dm_set_dev_dir(f"{word}-{i}".encode())
        both.wait()
        taken[word] += _ffi.take_log()[0]
taken = {"one": (), "two": ()}
start, both = threading.Barrier(2), threading.Barrier(2)
threads = [threading.Thread(target=complain, args=(word,)) for word in taken]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([taken["one"], taken["two"], _ffi.take_log()[0]]))
"""
    one, two, rest = printed(LOGGED + code)
    assert len(one) == len(two) == 20
    assert all(f" one-{i}: " in line for i, line in enumerate(one))
    assert all(f" two-{i}: " in line for i, line in enumerate(two))
    assert rest == []


def test_a_line_that_is_too_long_is_cut():
    """A line longer than the buffer keeps its beginning; the ones around it are whole."""
    code = """
for length in (10, 600, 10):
    lib.dm_set_dev_dir(b"x" * length)
print(json.dumps(_ffi.take_log()[0]))
"""
    short, long, last = printed(LOGGED + code)
    assert len(long) == 511
    assert long.endswith("x" * 400)
    assert short == last
    assert short.endswith("not an absolute name.")


def test_of_too_many_lines_the_first_are_kept():
    """Beyond 64 lines a call's last ones are dropped, and the next call starts afresh."""
    code = """
for i in range(100):
    lib.dm_set_dev_dir(f"number-{i}".encode())
first = _ffi.take_log()[0]
lib.dm_set_dev_dir(b"later")
print(json.dumps([first, _ffi.take_log()[0]]))
"""
    first, later = printed(LOGGED + code)
    assert len(first) == 64
    assert all(f"number-{i}:" in line for i, line in enumerate(first))
    assert len(later) == 1
    assert "later" in later[0]


FAILING = """
import json, logging
from dmlib import _ffi
class Keep(logging.Handler):
    def emit(self, record): kept.append([record.levelname, record.getMessage()])
kept = []
log = logging.getLogger("dmlib.libdm")
log.addHandler(Keep())
log.setLevel(sys.argv[2])
lib, ffi = _ffi.load()
_ffi.follow_log_level()
assert lib.dm_set_dev_dir(sys.argv[1].encode())
tasks = [bool(lib.dm_task_create(lib.DM_DEVICE_INFO)) for attempt in range(2)]
levels = [lib.dmlib_log_level(i) for i in range(lib.dmlib_log_count())]
print(json.dumps([tasks, levels, *_ffi.take_log(), kept]))
"""


@pytest.fixture
def no_control_node(tmp_path):
    """A device directory in which libdevmapper neither finds a control node nor can make one."""
    (tmp_path / "mapper").touch()
    return tmp_path


def test_a_failure_is_told_by_the_errors_of_the_library(no_control_node):
    """
    Where libdevmapper cannot reach a driver it makes no task, also the second time; its errors say why.

    They are about to become an exception, so for logging they are debug lines; others are not even delivered.
    """
    tasks, levels, every, serious, kept = printed(FAILING, no_control_node, "WARNING")
    assert tasks == [False, False]
    assert set(levels) == {3}
    assert every == serious
    assert any("Failure to communicate with kernel device-mapper driver" in line for line in serious)
    assert kept == []


def test_debug_lines_come_while_somebody_listens(no_control_node):
    """With the logger at DEBUG, all of the library's lines are passed on, each with a level of its own."""
    quiet = printed(FAILING, no_control_node, "WARNING")
    tasks, levels, every, serious, kept = printed(FAILING, no_control_node, "DEBUG")
    assert tasks == [False, False]
    assert {3, 5, 7} <= set(levels)
    assert len(every) == len(levels) > len(serious)
    assert serious == quiet[3]
    assert [text for _, text in kept] == every
    assert [level for level, _ in kept] == ["INFO" if level == 5 else "DEBUG" for level in levels]


def test_the_library_prints_nothing(no_control_node, capfd):
    """Neither errors nor debug lines reach standard output or standard error, not as the process exits either."""
    code = """
from dmlib import _ffi
lib, ffi = _ffi.load()
lib.dmlib_log_threshold(7)
lib.dm_set_dev_dir(sys.argv[1].encode())
lib.dm_task_create(lib.DM_DEVICE_INFO)
assert lib.dmlib_log_count() > 5
"""
    done = python(code, no_control_node)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    lib, _ = _ffi.load()
    lib.dmlib_log_threshold(7)
    assert not lib.dm_set_dev_dir(b"relative")
    assert len(_ffi.take_log()[0]) == 1
    _ffi.follow_log_level()
    assert capfd.readouterr() == ("", "")


# -- the suspended section

SECTION = """
from dmlib import _ffi
lib, ffi = _ffi.load()
nothing = ffi.cast("struct dm_task *", 8)  # whoever runs this task dies of it
holds = ffi.new("struct dmlib_hold[]", [{"suspend": nothing, "resume": nothing, "clear": nothing}])
gate, held = ffi.new("int *"), ffi.new("uint64_t *")
if sys.argv[1] == "abandoned":
    assert lib.dmlib_gate_abandon(gate) == 1
    assert lib.dmlib_gate_abandon(gate) == 0
sent = ffi.new("int *")
lib.dmlib_section(holds, 1, ffi.new("struct dm_task *[]", [nothing]), sent, 1, 0, gate, held)
fields = ("suspended", "resumed", "cleared", "restored", "resumed_restored")
print([getattr(holds[0], field) for field in fields], sent[0], gate[0])
"""


def test_a_section_that_was_given_up_does_nothing():
    """A section whose caller gave up before it began sends no task at all; one that was not given up does."""
    done = python(SECTION, "abandoned")
    assert (done.returncode, done.stdout) == (0, "[0, 0, 0, 0, 0] 0 2\n"), done.stderr
    assert python(SECTION, "open", options=()).returncode < 0
