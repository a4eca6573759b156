# SPDX-License-Identifier: MIT
"""The real-kernel runner as its users meet it: a command line that boots real guests."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import dmlib.testing
from dmlib.testing import GuestDiedError, GuestTimeoutError, GuestUnavailableError, Job, choose
from dmlib.testing.streams import OutputStream

TREE = Path(dmlib.testing.__file__).parents[2]
NOBODY = 65534
PATIENCE = 120


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TREE), **more}


class Runner:
    """Runs the command line with temporary files in a folder of its own, which tells its guests from others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def command(self, *arguments: str, on: str = "uml") -> list[str]:
        return [sys.executable, "-m", "dmlib.testing", "run", "--on", on, *arguments]

    def __call__(self, *arguments: str, on: str = "uml", **options) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.command(*arguments, on=on), env=environment(TMPDIR=str(self.folder)), capture_output=True,
            check=False, timeout=PATIENCE, **options,
        )  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(*arguments), env=environment(TMPDIR=str(self.folder)), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def processes(self) -> list[str]:
        """Command lines of living processes that belong to guests of this runner."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and entry.name != str(os.getpid()):
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                except OSError:
                    continue
                if str(self.folder) in line:
                    found.append(line)
        return found

    def assert_nothing_left(self, within: float = 0.0) -> None:
        deadline = time.monotonic() + within
        while (self.processes() or list(self.folder.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.processes() == []
        assert list(self.folder.iterdir()) == []


@pytest.fixture
def runner():
    # Not tmp_path: its length grows with the test's name, and a guest's folder takes a short path.
    folder = Path(tempfile.mkdtemp(prefix="dmlib-t-"))
    folder.chmod(0o755)
    made = Runner(folder)
    yield made
    made.assert_nothing_left(within=5)
    shutil.rmtree(folder)


def wait_for_line(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == line


def test_command_runs_as_root_on_a_kernel_with_device_mapper_in_the_callers_folder(runner):
    """Exit status 0; root; the driver; the caller's folder, variables and interpreter."""
    script = (
        "import os,sys;print(os.getuid(),os.getcwd(),sys.prefix,os.environ['FOO'],os.environ['DM_DISABLE_UDEV']);"
        "os.close(os.open('/dev/mapper/control',os.O_RDWR));print(sys.stdout.isatty(),sys.stdin.read())"
    )
    done = runner("--env", "FOO=b a'r", "--", sys.executable, "-c", script)
    assert done.stdout.decode().splitlines() == [f"0 {os.getcwd()} {sys.prefix} b a'r 1", "False "]
    assert done.returncode == 0
    assert b"in a guest (uml)" in done.stderr


@pytest.mark.parametrize(
    ("command", "status"),
    [(["sh", "-c", "exit 3"], 3), (["sh", "-c", "kill -TERM $$"], 128 + 15), (["no-such-command"], 127)],
    ids=["status", "signal", "not found"],
)
def test_exit_status_is_the_commands(runner, command, status):
    """What the command returns is what the runner returns, in the shell's convention."""
    done = runner("--", *command)
    assert done.returncode == status
    if status == 127:
        assert b"no-such-command" in done.stderr


def test_output_is_complete_binary_and_apart(runner):
    """Megabytes of any bytes arrive unchanged, standard error beside standard output."""
    program = (
        "import random,sys;r=random.Random(7);data=r.randbytes(5_000_000);"
        "sys.stdout.buffer.write(data);sys.stderr.buffer.write(data[:100_000])"
    )
    done = runner("--", sys.executable, "-c", program)
    data = random.Random(7).randbytes(5_000_000)  # noqa: S311 - the same bytes on both sides
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()
    assert done.stderr.endswith(data[:100_000])
    assert done.returncode == 0


def test_output_is_live_and_one_stream_keeps_its_order(runner):
    """A line is there when it is written; with 2>&1 both outputs keep their order."""
    process = subprocess.Popen(
        runner.command("--", "sh", "-c", "echo one; echo two >&2; echo three; sleep 100"),
        env=environment(TMPDIR=str(runner.folder)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(4)][1:] == [b"one\n", b"two\n", b"three\n"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    runner.assert_nothing_left()


def test_a_daemon_left_behind_does_not_hold_the_runner(runner):
    """The command's end counts, not the end of all that holds its output."""
    begin = time.monotonic()
    done = runner("--", "sh", "-c", "sleep 1000 & echo done; exit 4")
    assert (done.stdout, done.returncode) == (b"done\n", 4)
    assert time.monotonic() - begin < 30


def test_time_limit_kills_the_guest(runner):
    """After the time limit: status 124, a sentence, and nothing left."""
    done = runner("--timeout", "3", "--", "sleep", "1000")
    assert done.returncode == 124
    assert b"did not end within 3 seconds" in done.stderr
    runner.assert_nothing_left()


def test_interrupt_leaves_nothing(runner):
    """Ctrl-C ends guest and runner with 130; no process and no file stays."""
    with runner.start("--", "sh", "-c", "echo up; sleep 1000") as process:
        wait_for_line(process, b"up\n")
        assert runner.processes()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        runner.assert_nothing_left()


def test_a_killed_runner_takes_its_guest_along(runner):
    """SIGKILL of the runner, which can clean up nothing: its guest and files go within seconds."""
    with runner.start("--", "sh", "-c", "echo up; sleep 1000") as process:
        wait_for_line(process, b"up\n")
        process.kill()
        process.wait(PATIENCE)
        runner.assert_nothing_left(within=5)


def test_panic_is_no_success(runner):
    """A guest that dies is told as such, with the kernel's last words, whatever was printed before."""
    done = runner("--", "sh", "-c", "echo before; echo c >/proc/sysrq-trigger; echo after")
    assert done.returncode == 70
    assert done.stdout == b"before\n"
    assert b"died" in done.stderr
    assert b"Kernel panic" in done.stderr


def test_the_tree_is_read_only_and_named_folders_are_not(runner, tmp_path):
    """What is not named cannot be changed, wherever it lies; what is named is changed on the host."""
    here, other = Path(__file__), tmp_path / "other"
    before = here.read_bytes()
    open_folder = tmp_path / "open"
    for folder in (other, open_folder):
        folder.mkdir()
    script = f"""
        echo x >>{here} && exit 10
        echo x >{TREE}/new && exit 11
        mkdir -p {other} && echo x >{other}/new
        echo 'written in a guest' >{open_folder}/file && mv {open_folder}/file {open_folder}/renamed"""
    done = runner("--writable", str(open_folder), "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert here.read_bytes() == before
    assert not (TREE / "new").exists()
    assert list(other.iterdir()) == []
    assert [path.name for path in open_folder.iterdir()] == ["renamed"]
    assert (open_folder / "renamed").read_text() == "written in a guest\n"


def test_folder_and_files_of_the_command_below_tmp_are_shown(runner, tmp_path):
    """The guest has a /tmp of its own, yet a command finds its folder and the files that it names."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="dmlib a'b ") as name:
        program, data = Path(name) / "program.py", tmp_path / "data"
        program.write_text("import os,sys;print(os.getcwd(),open(sys.argv[1]).read())")
        data.write_text("contents")
        done = runner("--", "python3", "program.py", str(data), cwd=name)
    assert done.stdout.decode() == f"{name} contents\n", done.stderr


def test_two_guests_at_once(runner):
    """Guests side by side have devices of the same name and do not meet."""
    script = "dmsetup create same --notable && echo up && sleep 1 && dmsetup ls"
    both = [runner.start("--", "sh", "-c", script) for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=PATIENCE)
        assert output.split(b"\n")[0] == b"up"
        assert b"same" in output.split(b"\n")[1]
        assert process.returncode == 0


def test_udev_runs_in_the_guest(runner):
    """With --udev, udevd makes the links below /dev/mapper and finishes cookies."""
    script = "dmsetup create --table '0 8 zero' a && readlink /dev/mapper/a && env | grep -c DM_DISABLE_UDEV"
    done = runner("--udev", "--", "sh", "-c", script)
    assert done.stdout == b"../dm-0\n0\n", done.stderr


def test_ordinary_user(runner):
    """Without root, extension or anything but the standard library, a guest gives root and a driver."""
    # The tree and the interpreter of the tests may be out of that user's reach.
    tree = runner.folder / "tree"
    (tree / "dmlib").mkdir(parents=True)
    shutil.copytree(TREE / "dmlib/testing", tree / "dmlib/testing", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "dmlib/__init__.py").touch()
    subprocess.run(["chmod", "-R", "a+rX", str(tree)], check=True)
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    python = next(path for path in (sys.executable, "/usr/bin/python3") if usable(path, user))
    done = subprocess.run(
        [python, "-S", "-m", "dmlib.testing", "run", "--", "sh", "-c", "id -u; dmsetup version"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tree), "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tree, capture_output=True, check=False, timeout=PATIENCE, **user,
    )  # fmt: skip
    shutil.rmtree(tree)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"0\nLibrary version:")
    assert b"in a guest (uml): running directly takes root" in done.stderr


def usable(python: str, user: dict[str, object]) -> bool:
    try:
        done = subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], check=False, **user)
    except OSError:
        return False
    return done.returncode == 0


def test_a_machine_without_user_mode_linux_is_told_the_package(runner):
    """One sentence with the package's name, status 69."""
    done = subprocess.run(
        runner.command("--", "true"), env=environment(PATH="/nonexistent"), capture_output=True, check=False
    )
    assert done.returncode == 69
    assert b"install the package user-mode-linux" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_qemu_runs_a_stock_kernel_with_two_processors(runner, tmp_path):
    """The same protocol in QEMU: status, outputs, writable folder, read-only rest."""
    script = f"nproc; echo x >{TREE}/new; echo kept >{tmp_path}/file; echo err >&2; exit 6"
    done = runner("--cpus", "2", "--writable", str(tmp_path), "--", "sh", "-c", script, on="qemu")
    assert (done.returncode, done.stdout) == (6, b"2\n"), done.stderr
    assert done.stderr.endswith(b"err\n")
    assert not (TREE / "new").exists()
    assert (tmp_path / "file").read_text() == "kept\n"


def test_python_api_raises_and_returns(runner, monkeypatch):
    """`run` returns the status and raises where there is none; output goes to the descriptors named."""
    monkeypatch.setattr(tempfile, "tempdir", str(runner.folder))
    reader, writer = os.pipe()
    assert dmlib.testing.run(["sh", "-c", "echo hi; exit 9"], on="uml", stdout=writer, stderr=2) == 9
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read() == b"hi\n"
    with pytest.raises(GuestTimeoutError):
        dmlib.testing.run(["sleep", "100"], on="uml", timeout=1)
    with pytest.raises(GuestDiedError, match="Kernel panic") as caught:
        dmlib.testing.run(["sh", "-c", "echo c >/proc/sysrq-trigger"], on="uml")
    assert "sysrq" in caught.value.console
    runner.assert_nothing_left()


@pytest.mark.parametrize(
    "wrong",
    [
        {"command": []},
        {"command": "true"},
        {"command": ["true"], "memory": "lots"},
        {"command": ["true"], "cpus": 0},
        {"command": ["true"], "timeout": 0},
        {"command": ["true"], "writable": ["/no/such/folder"]},
        {"command": ["true"], "extra_env": {"A=B": "c"}},
    ],
)
def test_wrong_jobs_are_refused_before_anything_starts(wrong):
    """A job that cannot work is a ValueError."""
    with pytest.raises(ValueError, match=r"command|memory|cpus|timeout|writable|variable"):
        Job(**wrong)


def test_one_processor_is_all_that_user_mode_linux_has():
    """More than one processor is refused there, with the way out."""
    with pytest.raises(GuestUnavailableError, match="--on qemu"):
        choose(Job(command=["true"], cpus=2), "uml")


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_the_token_is_cut_off_however_it_arrives(size):
    """The end of an output is found in pieces of any size, and what only looks like it passes."""
    token = "abcabd"  # noqa: S105
    data = b"xx abcab abcabc" + token.encode() + b"never seen"
    reader, writer = os.pipe()
    stream = OutputStream(writer, token)
    for start in range(0, len(data), size):
        stream.feed(data[start : start + size], None)
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read() == b"xx abcab abcabc"
    assert stream.ended


@pytest.mark.parametrize("on", ["uml", "qemu"])
def test_disks(runner, on):
    """Disks are there by name, as large as asked for and empty, can be written, and take no room on the host."""
    script = (
        "for name in data meta-data; do blockdev --getsize64 /dev/dmlib/$name; done; "
        "printf x | dd of=/dev/dmlib/data bs=1 seek=1000000000 status=none conv=notrunc; "
        "dd if=/dev/dmlib/data bs=1 skip=1000000000 count=1 status=none; cmp -n 1000000 /dev/dmlib/data /dev/zero"
    )
    done = runner("--disk", "data=16G", "--disk", "meta-data=5M", "--", "sh", "-c", script, on=on)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [b"17179869184", b"5242880", b"x"]


@pytest.mark.parametrize("disk", ["data=16", "data=0G", "Data=1G", "a b=1G", "/x=1G", "data=1Gi", "=1G", "data"])
def test_disks_that_cannot_be(runner, disk):
    """A size without unit or a name that is no word is refused before anything is started."""
    done = runner("--disk", disk, "--", "true")
    assert done.returncode == 2
    assert b"usage:" in done.stderr


def test_disks_directly(runner):
    """On the machine's own kernel there are no disks to be had, and that is said."""
    done = runner("--disk", "data=1G", "--", "true", on="direct")
    assert done.returncode == 69
    assert b"use loop devices" in done.stderr
