# SPDX-License-Identifier: MIT
"""What the documentation shows is run as it stands there: the quickstart, and the Python of README and how-tos."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dmlib import LoopDevice, MiB, PoolMode, ThinPool, create_sparse_file

TREE = Path(__file__).parents[2]
QUICKSTART = TREE / "examples" / "quickstart.py"
SHOWN = (
    "README.md",
    "docs/howto/from-dmsetup.rst",
    "docs/howto/find-a-device.rst",
    "docs/howto/replace-text.rst",
    "docs/howto/watch-events.rst",
    "docs/howto/grow-a-pool.rst",
    "docs/howto/handle-errors.rst",
)

# The quickstart with something put before its main(), such as an act left out.
VARIANT = """
import sys
sys.path.insert(0, {folder!r})
import quickstart
{change}
sys.exit(quickstart.main())
"""


def command(change=""):
    if not change:
        return [sys.executable, str(QUICKSTART)]
    return [sys.executable, "-c", VARIANT.format(folder=str(QUICKSTART.parent), change=change)]


@pytest.fixture
def playground(tmp_path, monkeypatch):
    """Where the quickstart puts its files; empty again at the end."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def without_figures(output):
    """Return output without what may differ from run to run: figures, the pool's name, the largest file's."""
    return re.sub(r"dmlib-[0-9a-f]+:|in \S+ alone|[-+]?\d[\d.]*", "#", output).replace(" ", "")


@pytest.mark.usefixtures("playground")
def test_quickstart():
    """The quickstart checks its figures, fits two screens of 80 columns, and ends by saying that nothing is left."""
    done = subprocess.run(command(), capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 48
    assert [line for line in lines if len(line) > 80] == []
    summary = re.fullmatch(r"All (\d+) figures are as they have to be; it took \d+ s\.", lines[-2])
    assert summary is not None
    assert int(summary[1]) >= 27
    assert lines[-1] == "Everything is taken down: no device, loop device, semaphore or file is left."
    shown = (TREE / "docs/tutorial/quickstart-output.txt").read_text(encoding="utf-8")
    assert without_figures(done.stdout) == without_figures(shown)
    figures = {
        match[1].strip(): int(match[2])
        for match in re.finditer(r"^  (\S.*?)\d+ -> +\d+ +([+-]\d+)$", done.stdout, re.MULTILINE)
    }
    assert figures["write 1 byte"] == 1
    assert figures["write 56 KiB at an aligned offset"] == 1
    assert figures["write 64 KiB at offset 4 KiB, across a boundary"] == 2
    assert figures["write 32 KiB to the snapshot at an aligned offset"] == 1
    assert figures["write 32 KiB to the snapshot across a boundary"] == 2


@pytest.mark.once
@pytest.mark.usefixtures("playground")
def test_quickstart_notices():
    """The quickstart fails, names the figure and takes everything down when a figure is off."""
    change = "quickstart.write = lambda device, offset, content: None"
    done = subprocess.run(command(change), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "quickstart: write 1 byte: blocks taken: 0, which should be 1\n"
    assert "Everything is taken down" not in done.stdout


def read_until(process, word):
    """Return the line with *word* in it."""
    for line in process.stdout:
        if word in line:
            return line
    pytest.fail(f"the quickstart ended without {word!r}: {process.stderr.read()}")


def interrupted(process):
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "quickstart: interrupted; everything was taken down\n")


@pytest.mark.once
@pytest.mark.usefixtures("playground")
def test_quickstart_interrupted_in_a_copy():
    """Ctrl-C while the quickstart copies files into a mounted file system leaves nothing."""
    with subprocess.Popen(
        command("quickstart.what_a_write_takes = lambda report: None"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        read_until(process, "mkfs.ext4")
        time.sleep(0.3)
        interrupted(process)


@pytest.mark.once
@pytest.mark.usefixtures("playground")
def test_quickstart_interrupted_while_full():
    """Ctrl-C while a write waits for space in the full pool ends the writer and leaves nothing."""
    change = """
quickstart.DATA = quickstart.MiB(16)
quickstart.what_a_write_takes = quickstart.snapshots_of_files = lambda *arguments: None
quickstart.grow_sparse_file = lambda *arguments: quickstart.time.sleep(60)
"""
    with subprocess.Popen(
        command(change),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        pool = ThinPool.open(read_until(process, "blocks of").partition(":")[0])
        deadline = time.monotonic() + 30
        while pool.status().mode is not PoolMode.OUT_OF_DATA_SPACE:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        interrupted(process)


def python_blocks(name):
    """Return the Python of a page, as (line number, code), in order; blocks of one page build on each other."""
    text = (TREE / name).read_text(encoding="utf-8")
    if name.endswith(".md"):
        found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    else:
        found = re.finditer(r"^\.\. code-block:: python\n\n((?: {3}.*\n|\n)+)", text, re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), textwrap.dedent(match[1])) for match in found]


@pytest.mark.parametrize("name", SHOWN)
def test_page(name, tmp_path, capsys):
    """The Python of a page runs as it stands there, given two block devices, and leaves nothing."""
    blocks = python_blocks(name)
    assert blocks
    for file, size in (("metadata", MiB(4)), ("data", MiB(64))):
        create_sparse_file(tmp_path / file, size)
    with (
        LoopDevice.temporary(tmp_path / "metadata") as meta,
        LoopDevice.temporary(tmp_path / "data") as data,
    ):
        space = {"meta": meta, "data": data, "data_file": str(tmp_path / "data")}
        for line, code in blocks:
            exec(compile("\n" * line + code, str(TREE / name), "exec"), space)  # noqa: S102 - that is what this is about
    printed = capsys.readouterr().out
    if name == "README.md":
        assert re.fullmatch(r"0 data blocks /dev/mapper/dmlib-[0-9a-f]{12}-thin-1\n", printed)
