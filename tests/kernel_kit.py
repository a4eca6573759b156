# SPDX-License-Identifier: MIT
"""What several files of the kernel tier use: oracles to ask, things to wait for, writes that stay in flight."""

import json
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from dmlib import Linear, LoopDevice, MiB, Sectors, Table

DELAY_MS = 1500
"""For how long the fixture ``slow`` delays each write."""


def tool(*words):
    """Run a program and return what it printed."""
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def wait_until(true, seconds=5.0):
    """Wait until *true* returns something true, and fail if that takes longer than *seconds*."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)


# -- loop devices


def attached():
    """Return what losetup says is attached, by node."""
    output = tool("losetup", "-l", "-J")
    return {entry["name"]: entry for entry in json.loads(output)["loopdevices"]} if output else {}


def goes(node):
    """Return whether a loop device is detached by itself; udev may keep it for a moment."""
    deadline = time.monotonic() + 5
    while os.path.exists(f"/sys/block/{os.path.basename(node)}/loop"):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def found_no_more(path):
    """Return whether all loop devices of a file go."""
    return all(goes(loop.path) for loop in LoopDevice.find(path))


def sectors_of(device):
    """Return the size of a block device as blockdev has it."""
    return Sectors(int(tool("blockdev", "--getsz", device.path)))


# -- devices that make a suspend wait


def slow_table(below, offset):
    """Return a table for the upper device of the fixture ``slow``."""
    return Table.single(MiB(2), Linear(below.info().number, offset))


def undisturbed(device, table):
    """The device serves I/O with *table* and has nothing waiting."""
    info = device.info()
    assert (info.suspended, info.inactive_table) == (False, False)
    assert device.table() == table


def unbuffered_write(path):
    """Start one O_DIRECT write, which the kernel has in flight when this returns, and return its thread."""
    block = mmap.mmap(-1, 4096)
    block.write(b"x" * 4096)

    def write():
        descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
        try:
            os.pwrite(descriptor, block, 0)
        finally:
            os.close(descriptor)

    thread = threading.Thread(target=write)
    thread.start()
    number = os.stat(path).st_rdev
    inflight = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/inflight"

    def in_flight():
        with open(inflight, encoding="ascii") as file:
            return int(file.read().split()[1]) > 0

    wait_until(in_flight)
    assert thread.is_alive()
    return thread


# -- udev and other processes

MAKE_AND_SHOW = """
import os, stat, sys
from dmlib import Device, MiB, Table, Zero, set_udev
exec(sys.argv[2])
device = Device.create(sys.argv[1], Table.single(MiB(1), Zero()))
print(os.stat(device.path).st_rdev == os.makedev(*device.info().number))
other = device.rename(sys.argv[1] + "-renamed")
print(os.path.lexists(device.path), os.stat(other.path).st_rdev == os.makedev(*other.info().number))
other.remove()
print(os.path.lexists(other.path))
"""


def semaphores():
    """Return the kernel's list of semaphores, cookies among them."""
    return Path("/proc/sysvipc/sem").read_text(encoding="ascii").splitlines()[1:]


def settle():
    """Wait until udev has nothing left to do."""
    subprocess.run(["udevadm", "settle", "--timeout=60"], check=True)


def link(name):
    """Return where udev's link points; the node itself would be a block device."""
    return os.readlink(f"/dev/mapper/{name}")


def child(code, *words, env=None, under=()):
    """Start a Python program that uses dmlib."""
    return subprocess.Popen(
        [*under, sys.executable, "-c", code, *words],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process):
    """Return what a child printed, once it has ended well."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out
