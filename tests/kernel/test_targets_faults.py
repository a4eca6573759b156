# SPDX-License-Identifier: MIT
"""The targets that make faults, on a kernel: what they do; table and status are read back as they were made."""

import os
import threading
import time

import pytest

from dmlib import (
    CorruptByte,
    Delay,
    DelayedPath,
    Device,
    Dust,
    Flakey,
    KiB,
    LogWrites,
    MiB,
    Sectors,
    Table,
)
from kernel_kit import tool, wait_until

pytestmark = [
    pytest.mark.once,
    pytest.mark.needs_device_mapper(targets=["delay", "flakey", "dust", "log-writes"]),
]


@pytest.fixture
def made(loop_device, unique_name):
    """Make a device of 4 MiB of one target over loop devices; its table is what was asked for, and dmsetup's text."""
    devices = []

    def make(target_over, *sizes):
        loops = [loop_device(size).number for size in (MiB(4), *sizes)]
        target = target_over(*loops)
        device = Device.create(unique_name(), Table.single(MiB(4), target))
        devices.append(device)
        assert device.table(strict=True) == Table.single(MiB(4), target)
        printed = tool("dmsetup", "table", device.name)
        assert printed == str(device.table())
        assert tool("dmsetup", "status", device.name).split(maxsplit=3)[3:] == (
            [device.status()[0].status.raw.strip()] if device.status()[0].status.raw.strip() else []
        )
        return device

    yield make
    for device in devices:
        device.remove()


def read(device, size=4096):
    tool("blockdev", "--flushbufs", device.path)
    with open(device.path, "rb", buffering=0) as file:
        return file.read(size)


def write(device, content):
    with open(device.path, "r+b", buffering=0) as file:
        file.write(content)
        os.fsync(file)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_delay(made, count):
    """Writes take their time, and are counted while they wait."""
    late = [100, 700, 0][:count] if count > 1 else [700]
    device = made(lambda number: Delay(*(DelayedPath(number, Sectors(0), one) for one in late)))
    begin = time.monotonic()
    writing = threading.Thread(target=write, args=(device, b"x" * 4096))
    writing.start()
    wait_until(lambda: device.status(strict=True)[0].status.writes == 1)
    status = device.status(strict=True)[0].status
    writing.join()
    assert (status.reads, status.flushes) == (0, 0)
    assert time.monotonic() - begin >= 0.7
    assert device.status(strict=True)[0].status.writes == 0


def test_flakey_in_turn(made):
    """A device that is bad all the time fails; one that is good, does not."""
    good = made(lambda number: Flakey(number, up=60, down=0))
    write(good, b"content")
    assert read(good)[:7] == b"content"
    bad = made(lambda number: Flakey(number, up=0, down=60))
    with pytest.raises(OSError, match="Input/output error"):
        read(bad)


def test_flakey_with_features(made):
    """Dropped writes vanish, failed ones fail, and a byte is changed on the way down."""
    dropping = made(lambda number: Flakey(number, up=0, down=60, drop_writes=True))
    write(dropping, b"content")
    assert read(dropping)[:7] == bytes(7)
    failing = made(lambda number: Flakey(number, up=0, down=60, error_writes=True))
    with pytest.raises(OSError, match="Input/output error"):
        write(failing, b"content")
    assert read(failing)[:7] == bytes(7)
    corrupting = made(lambda number: Flakey(number, up=0, down=60, corrupt_byte=CorruptByte(3, "w", ord("x"))))
    write(corrupting, b"content")
    assert read(corrupting)[:7] == b"coxtent"


def test_dust(made):
    """A block that is listed as bad cannot be read once that is in effect, until it is written."""
    device = made(lambda number: Dust(number, Sectors(0), KiB(4)))
    status = device.status(strict=True)[0].status
    assert (status.device, status.failing, status.verbose) == (device.deps()[0], False, True)
    device.message("addbadblock 0")
    assert read(device) == bytes(4096)
    device.message("enable")
    device.message("quiet")
    status = device.status(strict=True)[0].status
    assert (status.failing, status.verbose) == (True, False)
    assert device.message("countbadblocks").startswith("countbadblocks: 1 badblock(s) found")
    with pytest.raises(OSError, match="Input/output error"):
        read(device)
    write(device, b"y" * 4096)
    assert read(device) == b"y" * 4096


def test_log_writes(made):
    """Writes and marks become entries of the log."""
    device = made(LogWrites, MiB(8))
    before = device.status(strict=True)[0].status
    write(device, b"z" * 4096)
    device.message("mark here")
    after = device.status(strict=True)[0].status
    assert after.logging
    assert after.entries >= before.entries + 2
    assert after.highest_sector > before.highest_sector
