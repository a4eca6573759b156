# SPDX-License-Identifier: MIT
"""Numbers, nodes and users: what else happens to loop devices, held against losetup."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from dmlib import _loopctl
from dmlib.errors import (
    ArgumentError,
    DeviceBusyError,
    DeviceNotFoundError,
    StateError,
)
from dmlib.ids import DeviceNumber
from dmlib.loop import LoopDevice, create_sparse_file
from dmlib.units import KiB, MiB
from kernel_kit import attached, found_no_more, goes, sectors_of, tool

# -- numbers and nodes


def test_threads_race_for_free_numbers(tmp_path):
    """Eight threads that attach ten files each, all at once, all get a device of their own."""
    files = [[tmp_path / f"{thread}-{turn}" for turn in range(10)] for thread in range(8)]
    loops, failures = {}, []
    start = threading.Barrier(8)

    def attach(paths):
        try:
            start.wait()
            for path in paths:
                create_sparse_file(path, KiB(64))
                loops[os.fspath(path)] = LoopDevice.attach(path)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=attach, args=(paths,)) for paths in files]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        shown = {name: entry["back-file"] for name, entry in attached().items()}
        assert len(loops) == 80
        assert {loop.path: path for path, loop in loops.items()} == shown
    finally:
        for loop in loops.values():
            loop.detach()


def test_threads_attach_and_detach_one_file(file):
    """Threads that attach and detach the same file take nothing away from each other."""
    failures = []

    def turn():
        try:
            for _ in range(10):
                with LoopDevice.temporary(file) as loop:
                    if loop.size != MiB(8):
                        failures.append(loop)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=turn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_missing_node_is_made(file, monkeypatch):
    """Where neither devtmpfs nor udev has made the node in time, attach makes it, for root alone."""
    monkeypatch.setattr(_loopctl, "_NODE_WAIT", 0.2)
    node = tool("losetup", "-f")
    os.unlink(node)
    start = time.monotonic()
    with LoopDevice.temporary(file) as loop:
        assert time.monotonic() - start > 0.2
        assert loop.path == node
        made = os.stat(node)
        assert stat.S_ISBLK(made.st_mode)
        assert stat.S_IMODE(made.st_mode) == 0o600
        assert made.st_rdev == os.makedev(*DeviceNumber.parse(_sysfs_dev(node)))
        assert sectors_of(loop) == MiB(8)


def _sysfs_dev(node):
    with open(f"/sys/block/{os.path.basename(node)}/dev", encoding="ascii") as dev:
        return dev.read().strip()


def test_something_else_at_the_node(file):
    """A file that somebody wrote to the node's path by mistake is named, not used."""
    node = tool("losetup", "-f")
    device = os.stat(node).st_rdev
    os.unlink(node)
    try:
        with open(node, "wb") as mistake:
            mistake.write(b"dd of=/dev/loop0")
        with pytest.raises(StateError) as caught:
            LoopDevice.attach(file)
        assert caught.value.subject == node
        with open(node, "rb") as mistake:
            assert mistake.read() == b"dd of=/dev/loop0"
    finally:
        os.unlink(node)
        os.mknod(node, stat.S_IFBLK | 0o660, device)


def in_own_namespace(setup, code, *arguments):
    """Run Python code after shell commands in a mount namespace of its own; return what it printed."""
    script = f'{setup}\nexec "$0" -c "$@"'
    python = [sys.executable, code, *map(os.fspath, arguments)]
    return tool("unshare", "-m", "--propagation", "private", "sh", "-e", "-c", script, *python)


ATTACH_AND_TELL = """
import os, sys
from dmlib import _loopctl
from dmlib.errors import UnsupportedError
from dmlib.loop import LoopDevice
_loopctl._NODE_WAIT = 0.05
before = len(os.listdir("/proc/self/fd"))
try:
    print(LoopDevice.attach(sys.argv[1]))
except UnsupportedError as error:
    print(error)
print(LoopDevice.find(sys.argv[1]), len(os.listdir("/proc/self/fd")) - before)
"""


def test_missing_node_that_cannot_be_made(file):
    """If the node is missing and /dev cannot be written, the error says what makes nodes."""
    node = tool("losetup", "-f")
    device = os.stat(node).st_rdev
    os.unlink(node)
    try:
        setup = "mount --bind /dev /dev; mount -o remount,bind,ro /dev"
        first, second = in_own_namespace(setup, ATTACH_AND_TELL, file).splitlines()
    finally:
        os.mknod(node, stat.S_IFBLK | 0o660, device)
    assert first.startswith(f"attaching {node} needs its node, which devtmpfs or udev makes")
    assert "Read-only file system" in first
    assert second == "[] 0"


def test_without_the_driver(file):
    """Without /dev/loop-control the error says what to load, and nothing is found."""
    first, second = in_own_namespace("mount -t tmpfs none /dev", ATTACH_AND_TELL, file).splitlines()
    assert "modprobe loop" in first
    assert "/dev/loop-control: No such file or directory" in first
    assert second == "[] 0"


def test_a_name_without_a_device(tmp_path):
    """A node that is missing is an absent device; a node of something else is a wrong argument."""
    with pytest.raises(DeviceNotFoundError):
        LoopDevice(os.fspath(tmp_path / "loop0")).status()
    assert not LoopDevice("/dev/loop77777").exists()
    for path in ("/dev/null", os.fspath(tmp_path)):
        with pytest.raises(ArgumentError):
            LoopDevice(path).detach()


# -- autoclear, and devices in use


@pytest.mark.usefixtures("way")
def test_autoclear_goes_when_the_block_has_ended(file):
    """With autoclear the device lives as long as the block, and losetup shows the flag."""
    with LoopDevice.temporary(file, autoclear=True) as loop:
        assert attached()[loop.path]["autoclear"] is True
        assert loop.status().autoclear
        assert sectors_of(loop) == MiB(8)
        held = tool("ls", "-l", f"/proc/{os.getpid()}/fd")
        inherited = subprocess.run(["ls", "-l", "/proc/self/fd"], check=True, capture_output=True, close_fds=False)
        assert loop.path in held
        assert loop.path not in inherited.stdout.decode()
    assert goes(loop.path)


def test_autoclear_waits_for_others(file):
    """With autoclear the end of the block waits for nobody, and the device goes with its last user."""
    with LoopDevice.temporary(file, autoclear=True) as loop:
        user = os.open(loop.path, os.O_RDONLY | os.O_CLOEXEC)
    assert loop.path in attached()
    os.close(user)
    assert goes(loop.path)


KILLED = """
import os, signal, sys
from dmlib import _loopctl, loop
def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "in the block":
    with loop.LoopDevice.temporary(sys.argv[1], autoclear=True) as device:
        print(device.path, flush=True)
        kill()
_loopctl.change_autoclear = kill
loop.LoopDevice.attach(sys.argv[1])
"""


@pytest.mark.parametrize("when", ["in the block", "half-way through attach"])
def test_a_killed_process_leaves_no_device(file, when):
    """SIGKILL within a block with autoclear, or just after the kernel has attached the file, leaves nothing."""
    done = subprocess.run([sys.executable, "-c", KILLED, file, when], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    assert ("/dev/loop" in done.stdout) == (when == "in the block")
    assert found_no_more(file)


def test_detach_of_an_open_device_says_so(file):
    """A device that is open is not gone after a detach: the error says who has it, and it goes when it is closed."""
    loop = LoopDevice.attach(file)
    user = os.open(loop.path, os.O_RDONLY | os.O_CLOEXEC)
    with open("/proc/self/comm", encoding="utf-8") as comm:
        opener = f"open in pid {os.getpid()} ({comm.read().rstrip()})"
    start = time.monotonic()
    with pytest.raises(DeviceBusyError) as caught:
        loop.detach(timeout=0.3)
    assert 0.2 < time.monotonic() - start < 3
    assert caught.value.device == loop.path
    assert opener in caught.value.users
    assert "last user" in caught.value.log[0]
    assert attached()[loop.path]["autoclear"] is True
    os.close(user)
    assert goes(loop.path)


def test_detach_names_all_who_use_the_device(tmp_path, file):
    """A detach that has waited in vain names the mount and the process that are in its way, and says so in one line."""
    loop = LoopDevice.attach(file)
    tool("mkfs.ext4", "-q", loop.path)
    place = tmp_path / "place"
    place.mkdir()
    tool("mount", loop.path, os.fspath(place))
    with open(loop.path, "rb") as node:
        reader = subprocess.Popen(["sleep", "60"], stdin=node)
    try:
        with pytest.raises(DeviceBusyError) as caught:
            loop.detach(timeout=0.2)
    finally:
        reader.kill()
        reader.wait()
        tool("umount", os.fspath(place))
    users = (f"mounted on {place}", f"open in pid {reader.pid} (sleep)")
    assert caught.value.users == users
    assert re.fullmatch(f"loop-detach {loop.path}: in use.* {re.escape(', '.join(users))}", str(caught.value))
    assert goes(loop.path)


def test_detach_waits_for_a_short_user(file):
    """A user who closes the device within the deadline does not make the detach fail."""
    loop = LoopDevice.attach(file)
    user = os.open(loop.path, os.O_RDONLY | os.O_CLOEXEC)
    timer = threading.Timer(0.3, os.close, [user])
    timer.start()
    start = time.monotonic()
    loop.detach(timeout=10)
    assert time.monotonic() - start > 0.2
    timer.join()
    assert loop.path not in attached()


def test_lazy_detach_and_its_way_back(file):
    """A lazy detach returns at once; set_autoclear takes it back as long as somebody has the device open."""
    loop = LoopDevice.attach(file)
    user = os.open(loop.path, os.O_RDONLY | os.O_CLOEXEC)
    loop.detach(lazy=True)
    assert attached()[loop.path]["autoclear"] is True
    loop.set_autoclear(enabled=False)
    os.close(user)
    assert attached()[loop.path]["autoclear"] is False
    user = os.open(loop.path, os.O_RDONLY | os.O_CLOEXEC)
    loop.set_autoclear(enabled=True)
    assert loop.status().autoclear
    os.close(user)
    assert goes(loop.path)


def test_temporary_tells_who_stays(file, monkeypatch):
    """The end of a block raises if somebody keeps the device; a device detached within the block is no error."""
    monkeypatch.setitem(LoopDevice.detach.__kwdefaults__, "timeout", 0.2)
    with pytest.raises(DeviceBusyError), LoopDevice.temporary(file) as loop:
        user = os.open(loop.path, os.O_RDONLY | os.O_CLOEXEC)
    os.close(user)
    assert goes(loop.path)
    with LoopDevice.temporary(file) as loop:
        loop.detach()
    with pytest.raises(ZeroDivisionError), LoopDevice.temporary(file) as loop:
        1 / 0  # noqa: B018 - raised on purpose
    assert not loop.exists()
