# SPDX-License-Identifier: MIT
"""What the kernel logged during a call: with the error it belongs to, with no other, and never from anything else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmlib import (
    Device,
    DeviceNotFoundError,
    MiB,
    RawTarget,
    Table,
    TargetRefusedError,
    Zero,
    _kmsg,
)

pytestmark = pytest.mark.once

NO_SECTOR = Table.single(MiB(1), RawTarget("linear", "7:0 x"))
TOO_FEW_WORDS = Table.single(MiB(1), RawTarget("linear", "7:0"))


def say(text):
    """Have the kernel log a line."""
    Path("/dev/kmsg").write_text(f"{text}\n", encoding="utf-8")


@pytest.fixture
def empty_device(unique_name):
    """A device without a table."""
    return Device.create(unique_name())


def refusal(device, table):
    with pytest.raises(TargetRefusedError) as caught:
        device.load(table)
    return caught.value


def test_a_refused_table_comes_with_the_kernels_reason(empty_device):
    """The kernel's own line about a refused table is a field of the error and part of its text."""
    error = refusal(empty_device, NO_SECTOR)
    assert any("linear: Invalid device sector" in line for line in error.kernel_log)
    assert all(line.startswith("device-mapper:") for line in error.kernel_log)
    assert f"kernel, meanwhile: {error.kernel_log[0]}" in str(error)


def test_lines_of_an_earlier_failure_are_not_repeated(empty_device):
    """Each error has the lines of its own call, in any order of calls."""
    lookup, count = "Invalid device sector", "Invalid argument count"
    for table, own, other in (
        (NO_SECTOR, lookup, count),
        (TOO_FEW_WORDS, count, lookup),
        (NO_SECTOR, lookup, count),
        (NO_SECTOR, lookup, count),
    ):
        text = "\n".join(refusal(empty_device, table).kernel_log)
        assert text.count(own) == 1
        assert other not in text


def test_a_refused_resume_and_message_have_lines_too(pool, unique_name):
    """A target that refuses as its table becomes live, or that refuses a message, is quoted as well."""
    with pytest.raises(TargetRefusedError) as caught:
        pool.device.message("no_such_message 1")
    assert any("thin" in line for line in caught.value.kernel_log)
    device = Device.create(unique_name(), Table.single(MiB(1), Zero()))
    with pytest.raises(TargetRefusedError) as caught:
        device.message("hello")
    assert all("thin" not in line for line in caught.value.kernel_log)


def test_other_verbs_have_no_lines(unique_name):
    """A missing device is no matter for the kernel's log, whatever is logged at the time."""
    say("device-mapper: from elsewhere")
    with pytest.raises(DeviceNotFoundError) as caught:
        Device(unique_name()).info()
    assert caught.value.kernel_log == ()


def test_only_device_mapper_lines_since_the_mark_are_given():
    """Lines of other parts of the kernel, and those from before the mark, are left out; nested marks work."""
    say("device-mapper: before")
    outer = _kmsg.mark()
    say("device-mapper: one")
    say("another part: two")
    inner = _kmsg.mark()
    say("device-mapper: three")
    assert [line.split()[1] for line in _kmsg.since(outer)] == ["one", "three"]
    assert [line.split()[1] for line in _kmsg.since(inner)] == ["three"]
    assert _kmsg.since(_kmsg.mark()) == ()


def test_a_log_that_ran_over_still_gives_the_last_lines(empty_device):
    """After more lines than the kernel keeps, the lines of a call are still found."""
    limit = Path("/proc/sys/kernel/printk_devkmsg")
    before = limit.read_text(encoding="ascii")
    limit.write_text("on\n", encoding="ascii")
    mark = _kmsg.mark()
    try:
        with open("/dev/kmsg", "wb", buffering=0) as log:
            log.writelines(b"filling %d %s\n" % (number, b"x" * 200) for number in range(4000))
    finally:
        limit.write_text(before, encoding="ascii")
    assert _kmsg.since(mark) == ()
    text = "\n".join(refusal(empty_device, NO_SECTOR).kernel_log)
    assert text.count("Invalid device sector") == 1


# -- where the log cannot be read

WITHOUT_LOG = """
import json, os, sys
from dmlib import Device, MiB, RawTarget, Table, TargetRefusedError
out = []
for attempt in range(2):
    try:
        Device(sys.argv[1]).load(Table.single(MiB(1), RawTarget("linear", "7:0 x")))
    except TargetRefusedError as error:
        out.append([str(error), error.errno, list(error.kernel_log)])
held = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 20) if os.path.lexists(f"/proc/self/fd/{fd}")]
print(json.dumps([out, [path for path in held if not path.endswith("/mapper/control")]]))
"""

WITH_MOUNT = ["unshare", "--mount", "sh", "-c"]
STAND_INS = {
    "forbidden": "mount --bind /dev/kmsg /dev/kmsg && mount -o remount,bind,nodev /dev/kmsg",
    "null": "mount --bind /dev/null /dev/kmsg",
    "zero": "mount --bind /dev/zero /dev/kmsg",
    "file": "echo '6,1,1,-;device-mapper: forged' >$0/file && mount --bind $0/file /dev/kmsg",
    "pipe": "mkfifo $0/pipe && mount --bind $0/pipe /dev/kmsg",
    "terminal": "mount --bind /dev/ptmx /dev/kmsg",
}


@pytest.mark.parametrize("cover", STAND_INS.values(), ids=STAND_INS)
def test_errors_come_without_lines_where_there_is_no_log(empty_device, cover, tmp_path):
    """Where /dev/kmsg may not be opened, or is something else, a refusal has no lines, and nothing is read or held."""
    done = subprocess.run(
        [*WITH_MOUNT, f'{cover} && exec "$@"', tmp_path, sys.executable, "-c", WITHOUT_LOG, empty_device.name],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    refusals, held = json.loads(done.stdout)
    assert len(refusals) == 2
    for text, errno, lines in refusals:
        assert lines == []
        assert errno
        assert "kernel" not in text
    assert held == []


def test_a_pipe_in_its_place_is_not_emptied(empty_device, tmp_path):
    """What somebody else put into a pipe at /dev/kmsg is still there afterwards."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY)
    try:
        os.write(writer, b"6,1,1,-;device-mapper: for others\n")
        words = [*WITH_MOUNT, 'mount --bind "$0" /dev/kmsg && exec "$@"', pipe]
        subprocess.run(
            [*words, sys.executable, "-c", WITHOUT_LOG, empty_device.name], check=True, capture_output=True, timeout=60
        )
        assert os.read(reader, 100) == b"6,1,1,-;device-mapper: for others\n"
    finally:
        os.close(reader)
        os.close(writer)


INTERRUPTED = """
import itertools, signal, sys, threading
from dmlib import Device, MiB, RawTarget, Table, TargetRefusedError, library_version
library_version()  # Python cannot import one thing in two depths of one thread
device, refused = Device(sys.argv[1]), Table.single(MiB(1), RawTarget("linear", "7:0 x"))
def fail():
    try:
        device.load(refused)
    except TargetRefusedError as error:
        return len([line for line in error.kernel_log if "Invalid device sector" in line])
handled = []
def handler(number, frame):
    handled.append(fail())
    signal.setitimer(signal.ITIMER_REAL, 0.0004)
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0004)
own = [fail() for _ in range(300)]
signal.signal(signal.SIGALRM, signal.SIG_IGN)
print(len(handled), min(own), min(handled))
"""


def test_a_signal_handler_may_come_in_between(empty_device):
    """A handler that fails in the middle of a failing load gets its lines, and the load gets its own."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, empty_device.name], capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 0, done.stderr
    handled, own, of_handler = map(int, done.stdout.split())
    assert handled > 50
    assert own >= 1
    assert of_handler >= 1
