# SPDX-License-Identifier: MIT
"""Loop devices and sparse files, held against losetup, blockdev and stat."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from dmlib import loop as loop_module
from dmlib.errors import (
    ArgumentError,
    DeviceBusyError,
    DeviceNotFoundError,
    PermissionDeniedError,
    StateError,
    TaskError,
    UnsupportedError,
)
from dmlib.ids import DeviceNumber
from dmlib.loop import LoopDevice, create_sparse_file, grow_sparse_file
from dmlib.units import KiB, MiB, Sectors

NOBODY = 65534


def tool(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def attached():
    """Return what losetup says is attached, by node."""
    output = tool("losetup", "-l", "-J")
    return {entry["name"]: entry for entry in json.loads(output)["loopdevices"]} if output else {}


def numbers():
    """Return the numbers of what is attached, without a fork."""
    return sorted(name for name in os.listdir("/sys/block") if os.path.exists(f"/sys/block/{name}/loop"))


def goes(node):
    """Return whether a device is detached by itself; udev may keep it for a moment."""
    deadline = time.monotonic() + 5
    while node in attached():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def found_no_more(path):
    return all(goes(loop.path) for loop in LoopDevice.find(path))


def sectors_of(loop):
    return Sectors(int(tool("blockdev", "--getsz", loop.path)))


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_stays():
    """Whatever a test does, it ends with the loop devices and descriptors that it began with."""
    loops, count = numbers(), descriptors()
    yield
    deadline = time.monotonic() + 5
    while numbers() != loops and time.monotonic() < deadline:
        time.sleep(0.05)  # an autoclear waits for udev
    assert numbers() == loops
    assert descriptors() == count


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    create_sparse_file(path, MiB(8))
    return path


@pytest.fixture(params=["one step", "many steps"])
def way(request, monkeypatch):
    """Attach by LOOP_CONFIGURE, and as on a kernel that does not have it."""
    ways = {"one step": loop_module._configure, "many steps": loop_module._configure_in_steps}
    monkeypatch.setattr(loop_module, "_WAYS", (ways[request.param],))
    return request.param


@contextlib.contextmanager
def mounted(device, directory, *options):
    directory.mkdir(exist_ok=True)
    tool("mount", *options, os.fspath(device), os.fspath(directory))
    try:
        yield directory
    finally:
        tool("umount", os.fspath(directory))


@contextlib.contextmanager
def ext4(path, size="32MiB", **options):
    """A file system of its own, for what tmpfs cannot do."""
    create_sparse_file(path, size)
    with LoopDevice.temporary(path, **options) as loop:
        tool("mkfs.ext4", "-q", loop.path)
        with mounted(loop, path.with_suffix(".d")) as directory:
            yield directory


# -- attach and detach


@pytest.mark.usefixtures("way")
def test_attach_is_what_losetup_shows(file):
    """A file attached without options is a writable device of the file's size, known to losetup by the file's name."""
    with LoopDevice.temporary(file) as loop:
        entry = attached()[loop.path]
        assert entry["back-file"] == os.fspath(file)
        assert (entry["offset"], entry["sizelimit"], entry["log-sec"]) == (0, 0, 512)
        assert (entry["ro"], entry["autoclear"], entry["dio"]) == (False, False, False)
        assert loop.size == sectors_of(loop) == MiB(8)
        assert os.fspath(loop) == loop.path
        status = os.stat(loop.path)
        assert loop.number == DeviceNumber(7, os.minor(status.st_rdev))
    assert loop.path not in attached()


def test_attach_works_again_where_the_one_step_is_not_known(file, monkeypatch):
    """A kernel that answers EINVAL to LOOP_CONFIGURE gets the steps that it knows."""
    seen = []

    def unknown(*_arguments):
        seen.append("unknown")
        raise OSError(errno.EINVAL, "as from a kernel before 5.8")

    monkeypatch.setattr(loop_module, "_WAYS", (unknown, loop_module._configure_in_steps))
    with LoopDevice.temporary(file, offset=MiB(2)) as loop:
        assert sectors_of(loop) == MiB(6)
    assert seen == ["unknown"]


@pytest.mark.usefixtures("way")
def test_bytes_written_arrive_in_the_file(file):
    """What is written to the device at a place is in the file at that place plus the offset."""
    with LoopDevice.temporary(file, offset=MiB(1)) as loop:
        descriptor = os.open(loop.path, os.O_RDWR | os.O_CLOEXEC)
        os.pwrite(descriptor, b"through the loop", 4096)
        os.fsync(descriptor)
        os.close(descriptor)
    with file.open("rb") as plain:
        plain.seek(MiB(1).bytes + 4096)
        assert plain.read(16) == b"through the loop"


def test_detach_frees_the_device_once(file):
    """After a detach nothing is attached, and every verb says so."""
    loop = LoopDevice.attach(file)
    assert loop.path in attached()
    loop.detach()
    assert loop.path not in attached()
    assert not loop.exists()
    for verb in (loop.detach, loop.status, loop.refresh_size, lambda: loop.size):
        with pytest.raises(DeviceNotFoundError) as caught:
            verb()
        assert caught.value.errno == errno.ENXIO
        assert caught.value.device == loop.path
    with pytest.raises(DeviceNotFoundError):
        loop.set_autoclear(enabled=True)


@pytest.mark.usefixtures("way")
def test_read_only_refuses_writes(file):
    """A device attached for reading only takes no writes, and its number is writable again when it is next used."""
    with LoopDevice.temporary(file, read_only=True) as loop:
        assert tool("blockdev", "--getro", loop.path) == "1"
        assert attached()[loop.path]["ro"] is True
        assert loop.status().read_only
        with pytest.raises(OSError, match=r"Operation not permitted|Permission denied|Read-only"):
            _write_a_block(loop.path)
        used = loop.path
    with LoopDevice.temporary(file) as loop:
        assert loop.path == used
        assert tool("blockdev", "--getro", loop.path) == "0"
        _write_a_block(loop.path)
        assert not loop.status().read_only


def _write_a_block(path):
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, b"x" * 4096, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.usefixtures("way")
def test_offset_and_size_limit(file):
    """Offset and limit cut a window out of the file."""
    with LoopDevice.temporary(file, offset=MiB(3), size_limit="2MiB") as loop:
        assert sectors_of(loop) == MiB(2)
        entry = attached()[loop.path]
        assert (entry["offset"], entry["sizelimit"]) == (MiB(3).bytes, MiB(2).bytes)
        status = loop.status()
        assert (status.offset_bytes, status.size_limit_bytes) == (MiB(3).bytes, MiB(2).bytes)
    with LoopDevice.temporary(file, offset=MiB(3), size_limit=None) as loop:
        assert sectors_of(loop) == MiB(5)
        assert loop.status().size_limit_bytes is None
    with LoopDevice.temporary(file, offset=MiB(7), size_limit=MiB(2)) as loop:
        assert sectors_of(loop) == MiB(1)


def test_part_of_a_sector_is_not_seen(tmp_path):
    """A file of 1000 bytes makes a device of one sector."""
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 1000)
    with LoopDevice.temporary(path) as loop:
        assert sectors_of(loop) == loop.size == Sectors(1)


@pytest.mark.usefixtures("way")
def test_block_size(file):
    """The logical block size is what was asked for; one that the kernel does not have is refused and leaves nothing."""
    with LoopDevice.temporary(file, block_size=KiB(4)) as loop:
        assert tool("blockdev", "--getss", loop.path) == "4096"
    with pytest.raises(TaskError) as caught:
        LoopDevice.attach(file, block_size=MiB(1))
    assert caught.value.errno == errno.EINVAL
    assert found_no_more(file)


@pytest.mark.parametrize(
    "options",
    [
        {"offset": MiB(8)},
        {"offset": "9MiB"},
        {"offset": "8192PiB"},
        {"size_limit": Sectors(0)},
        {"block_size": Sectors(3)},
        {"block_size": Sectors(0)},
        {"size_limit": "4 horses"},
    ],
)
def test_sizes_that_cannot_be(file, options):
    """A window outside the file, or a block size that is no power of two, is refused and names the argument."""
    with pytest.raises(ArgumentError) as caught:
        LoopDevice.attach(file, **options)
    assert caught.value.field == next(iter(options))
    with pytest.raises(TypeError, match="no unit"):
        LoopDevice.attach(file, **dict.fromkeys(options, 4096))
    assert found_no_more(file)


def test_a_block_device_is_attached_like_a_file(file):
    """A loop device over a block device is as large as that."""
    with LoopDevice.temporary(file) as below, LoopDevice.temporary(below.path, offset=MiB(1)) as above:
        assert above.path != below.path
        assert sectors_of(above) == MiB(7)
        assert LoopDevice.find(below.path) == [above]


def test_attach_that_fails_leaves_nothing(tmp_path, file):
    """What is no file is refused as an argument, without waiting, and without a loop device or a descriptor."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    count, loops = descriptors(), attached()
    for path in (tmp_path / "missing", tmp_path, tmp_path / "fifo", file / "below", tmp_path / "circle", "", "a\0b"):
        with pytest.raises(ArgumentError) as caught:
            LoopDevice.attach(path)
        assert caught.value.field == "path"
    for path in ("/dev/null", tmp_path / ("n" * 300)):
        with pytest.raises(ArgumentError):
            LoopDevice.attach(path)
    with pytest.raises(TypeError):
        LoopDevice.attach(b"bytes")
    assert (descriptors(), attached()) == (count, loops)


@pytest.fixture
def open_directory():
    """A directory that everybody may enter."""
    directory = tempfile.mkdtemp(dir="/tmp")
    os.chmod(directory, 0o755)  # noqa: S103 - that is the point
    yield directory
    shutil.rmtree(directory)


@contextlib.contextmanager
def nobody():
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_attach_without_permission(open_directory):
    """A file that may not be read, and a driver that may not be used, are PermissionDeniedError and leave nothing."""
    hidden, own = f"{open_directory}/hidden", f"{open_directory}/own"
    create_sparse_file(hidden, MiB(1))
    create_sparse_file(own, MiB(1))
    os.chown(own, NOBODY, NOBODY)
    count = descriptors()
    with nobody():
        with pytest.raises(PermissionDeniedError) as caught:
            LoopDevice.attach(hidden)
        assert caught.value.device == hidden
        with pytest.raises(PermissionDeniedError) as caught:
            LoopDevice.attach(own)
        assert caught.value.device == "/dev/loop-control"
        with pytest.raises(PermissionDeniedError):
            grow_sparse_file(hidden, MiB(2))
        with pytest.raises(PermissionDeniedError):
            create_sparse_file(f"{open_directory}/new", MiB(1))
        assert descriptors() == count
    with LoopDevice.temporary(own) as loop, nobody():
        with pytest.raises(PermissionDeniedError):
            loop.detach()
        with pytest.raises(PermissionDeniedError):
            LoopDevice.find(own)


def test_a_file_that_can_only_be_read(tmp_path):
    """A writable device over a file on a read-only file system is refused; a read-only one works."""
    image = tmp_path / "image"
    with ext4(image) as directory:
        create_sparse_file(directory / "inner", MiB(4))
    with LoopDevice.temporary(image) as outer, mounted(outer, tmp_path / "ro", "-o", "ro") as directory:
        with pytest.raises(TaskError) as caught:
            LoopDevice.attach(directory / "inner")
        assert caught.value.errno == errno.EROFS
        with LoopDevice.temporary(directory / "inner", read_only=True) as loop:
            assert sectors_of(loop) == MiB(4)


# -- numbers and nodes


def test_threads_race_for_free_numbers(tmp_path):
    """Eight threads that attach twenty files each, all at once, all get a device of their own."""
    files = [[tmp_path / f"{thread}-{turn}" for turn in range(20)] for thread in range(8)]
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
        assert len(loops) == 160
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


def test_missing_node_is_made(file):
    """Where neither devtmpfs nor udev has made the node, attach makes it, for root alone."""
    node = tool("losetup", "-f")
    os.unlink(node)
    with LoopDevice.temporary(file) as loop:
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
from dmlib.errors import UnsupportedError
from dmlib.loop import LoopDevice
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


# -- identity


def test_a_stale_name_touches_nobody_elses_device(tmp_path, file):
    """After its number has gone to another file, an old LoopDevice refuses to do anything to it."""
    other = tmp_path / "other"
    create_sparse_file(other, MiB(1))
    old = LoopDevice.attach(file)
    old.detach()
    with LoopDevice.temporary(other) as new:
        assert new.path == old.path
        assert not old.exists()
        for verb in (old.detach, old.status, old.refresh_size):
            with pytest.raises(DeviceNotFoundError) as caught:
                verb()
            assert caught.value.log == ("it has another file now",)
        assert attached()[new.path]["back-file"] == os.fspath(other)
        assert LoopDevice(old.path).status().backing_file == os.fspath(other)


def test_find_knows_the_file_by_any_name(tmp_path, file):
    """A device is found by the file's new name, by a hard link and by a symbolic link, and by no other file."""
    link, symlink, other, moved = (tmp_path / name for name in ("link", "symlink", "other", "moved to here"))
    os.link(file, link)
    symlink.symlink_to(link)
    create_sparse_file(other, MiB(8))
    with LoopDevice.temporary(file) as first, LoopDevice.temporary(link) as second:
        os.rename(file, moved)
        for name in (moved, link, symlink):
            assert LoopDevice.find(name) == sorted([first, second], key=lambda loop: loop.number)
        assert LoopDevice.find(other) == []
        assert first.status().backing_file == attached()[first.path]["back-file"] == os.fspath(moved)
        assert not first.status().deleted
        with pytest.raises(ArgumentError):
            LoopDevice.find(file)
        identity = os.stat(moved)
        assert (first.status().inode, first.status().file_device) == (
            identity.st_ino,
            DeviceNumber.from_dev(identity.st_dev),
        )
    assert LoopDevice.find(moved) == []


def test_find_sees_past_a_hole_in_the_numbers(tmp_path, file):
    """A device is found although one with a lower number has gone."""
    create_sparse_file(tmp_path / "low", MiB(1))
    low = LoopDevice.attach(tmp_path / "low")
    with LoopDevice.temporary(file) as high:
        low.detach()
        assert low.number < high.number
        assert LoopDevice.find(file) == [high]


def test_a_deleted_file_is_told_from_one_with_such_a_name(tmp_path, file):
    """``deleted`` is about the file, not about how its name ends; the data can be read until the detach."""
    named = tmp_path / "really (deleted)"
    create_sparse_file(named, MiB(1))
    with LoopDevice.temporary(file) as loop, LoopDevice.temporary(named) as other:
        os.unlink(file)
        assert (loop.status().deleted, loop.status().backing_file) == (True, os.fspath(file))
        assert (other.status().deleted, other.status().backing_file) == (False, os.fspath(named))
        assert loop.size == MiB(8)


@pytest.mark.parametrize("name", ["with space", "new\nline", "percent%20", "n" * 255, "\udcff bytes"])
def test_unusual_names(tmp_path, name):
    """Any name that a file can have is attached, shown whole, and found."""
    path = tmp_path / name
    create_sparse_file(path, MiB(1))
    with LoopDevice.temporary(path) as loop:
        assert loop.status().backing_file == os.fspath(path)
        assert LoopDevice.find(path) == [loop]


# -- growing


def test_growth_of_the_file_is_seen_after_a_refresh(file):
    """The device keeps its size when the file grows, and has the new one after refresh_size."""
    with LoopDevice.temporary(file, offset=MiB(1)) as loop:
        grow_sparse_file(file, "20MiB")
        assert os.stat(file).st_size == MiB(20).bytes
        assert sectors_of(loop) == MiB(7)
        assert loop.refresh_size() == MiB(19)
        assert sectors_of(loop) == loop.size == MiB(19)


def test_grown_file_keeps_data_and_stays_sparse(tmp_path):
    """Growing leaves the data alone, and costs one block; the same size again changes nothing."""
    path = tmp_path / "data"
    create_sparse_file(path, MiB(1))
    path.write_bytes(b"d" * MiB(1).bytes)
    blocks = os.stat(path).st_blocks
    grow_sparse_file(path, MiB(512))
    grow_sparse_file(path, MiB(512))
    grown = os.stat(path)
    assert grown.st_size == MiB(512).bytes
    assert grown.st_blocks - blocks <= 8
    with path.open("rb") as file:
        assert file.read(MiB(1).bytes + 4) == b"d" * MiB(1).bytes + bytes(4)


def test_grow_never_shrinks(tmp_path, file):
    """A smaller size is refused; of several that grow at once, the largest wins."""
    with pytest.raises(ArgumentError) as caught:
        grow_sparse_file(file, MiB(7))
    assert caught.value.field == "size"
    assert os.stat(file).st_size == MiB(8).bytes
    sizes = [MiB(count) for count in range(9, 73)]

    def grow(part):
        for size in part:
            with contextlib.suppress(ArgumentError):  # somebody has made it larger already
                grow_sparse_file(file, size)

    threads = [threading.Thread(target=grow, args=(sizes[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.stat(file).st_size == MiB(72).bytes
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "fifo", "/dev/loop-control"):
        with pytest.raises(ArgumentError):
            grow_sparse_file(path, MiB(1))


def fill(path):
    with open(path, "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(1024)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def test_growth_without_room(tmp_path):
    """On a full file system growing fails with ENOSPC and the file is as it was."""
    with ext4(tmp_path / "image", size=MiB(8)) as directory:
        create_sparse_file(directory / "file", KiB(64))
        fill(directory / "filler")
        with pytest.raises(TaskError) as caught:
            grow_sparse_file(directory / "file", MiB(64))
        assert caught.value.errno == errno.ENOSPC
        assert os.stat(directory / "file").st_size == KiB(64).bytes


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
from dmlib import loop
def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "in the block":
    with loop.LoopDevice.temporary(sys.argv[1], autoclear=True) as device:
        print(device.path, flush=True)
        kill()
loop._change_autoclear = kill
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
    """A device that is open is not gone after a detach: that is an error, and it goes when it is closed."""
    loop = LoopDevice.attach(file)
    user = os.open(loop.path, os.O_RDONLY | os.O_CLOEXEC)
    start = time.monotonic()
    with pytest.raises(DeviceBusyError) as caught:
        loop.detach(timeout=0.3)
    assert 0.2 < time.monotonic() - start < 3
    assert caught.value.device == loop.path
    assert "last user" in caught.value.log[0]
    assert attached()[loop.path]["autoclear"] is True
    os.close(user)
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


def test_temporary_tells_who_stays(file):
    """The end of a block raises if somebody keeps the device; a device detached within the block is no error."""
    with pytest.raises(DeviceBusyError), LoopDevice.temporary(file) as loop:
        user = os.open(loop.path, os.O_RDONLY | os.O_CLOEXEC)
    os.close(user)
    assert goes(loop.path)
    with LoopDevice.temporary(file) as loop:
        loop.detach()
    with pytest.raises(ZeroDivisionError), LoopDevice.temporary(file) as loop:
        1 / 0  # noqa: B018 - raised on purpose
    assert not loop.exists()


# -- direct I/O


@pytest.mark.usefixtures("way")
def test_direct_io_on_a_file_system_that_has_it(tmp_path):
    """On ext4 direct I/O is on, losetup says so too, and the data arrives."""
    with ext4(tmp_path / "image") as directory:
        create_sparse_file(directory / "inner", MiB(4))
        with LoopDevice.temporary(directory / "inner", direct_io=True) as loop:
            assert attached()[loop.path]["dio"] is True
            assert loop.status().direct_io
            _write_a_block(loop.path)
        assert (directory / "inner").read_bytes()[:4097] == b"x" * 4096 + b"\0"


@pytest.mark.usefixtures("way")
def test_direct_io_is_refused_rather_than_pretended(file):
    """Where the file system has no direct I/O, asking for it is an error and nothing stays attached."""
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:  # tmpfs before Linux 6.6
        with pytest.raises(UnsupportedError) as caught:
            LoopDevice.attach(file, direct_io=True)
        assert os.fspath(file) in caught.value.feature
        assert found_no_more(file)
    else:
        with LoopDevice.temporary(file, direct_io=True) as loop:
            assert attached()[loop.path]["dio"] is True


@pytest.mark.usefixtures("way")
def test_direct_io_needs_blocks_that_suit_the_disk(tmp_path):
    """On a disk with blocks of 4 KiB, direct I/O works with such blocks and otherwise is refused or made to fit."""
    with ext4(tmp_path / "image", block_size=KiB(4)) as directory:
        inner = directory / "inner"
        create_sparse_file(inner, MiB(4))
        with LoopDevice.temporary(inner, direct_io=True, block_size=KiB(4)) as loop:
            assert attached()[loop.path]["dio"] is True
        try:
            loop = LoopDevice.attach(inner, direct_io=True)
        except UnsupportedError:
            assert found_no_more(inner)
        else:
            assert attached()[loop.path]["dio"] is True
            assert tool("blockdev", "--getss", loop.path) == "4096"
            loop.detach()


# -- sparse files


@pytest.mark.parametrize("umask", [0, 0o777, 0o022])
def test_sparse_file_has_a_size_and_no_data(tmp_path, umask):
    """A sparse file takes no space, and only its owner may use it, whatever the umask."""
    path = tmp_path / "sparse"
    before = os.umask(umask)
    try:
        create_sparse_file(path, "1TiB")
    finally:
        os.umask(before)
    assert tool("stat", "-c", "%s %b %a", path) == f"{1 << 40} 0 600"


def test_sparse_file_takes_nobodys_place(tmp_path):
    """A file, a directory or a symbolic link that is there, dangling or not, is refused and not touched."""
    existing, link, dangling = tmp_path / "existing", tmp_path / "link", tmp_path / "dangling"
    existing.write_bytes(b"precious")
    link.symlink_to(existing)
    dangling.symlink_to(tmp_path / "nowhere")
    for path in (existing, link, dangling, tmp_path):
        with pytest.raises(ArgumentError) as caught:
            create_sparse_file(path, MiB(1))
        assert (caught.value.field, caught.value.rule) == ("path", "must not exist yet")
    assert existing.read_bytes() == b"precious"
    assert os.readlink(dangling) == os.fspath(tmp_path / "nowhere")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "existing", "link"]


def test_sparse_file_that_fails_is_removed(tmp_path):
    """A file that cannot have its size is not left behind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MiB(1).bytes, hard))
    try:
        with pytest.raises(TaskError) as caught:
            create_sparse_file(tmp_path / "large", MiB(2))
        assert caught.value.errno == errno.EFBIG
        create_sparse_file(tmp_path / "small", MiB(1))
        with pytest.raises(TaskError):
            grow_sparse_file(tmp_path / "small", MiB(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["small"]
    assert os.stat(tmp_path / "small").st_size == MiB(1).bytes
    for path, size in ((tmp_path / "huge", "8192PiB"), ("", MiB(1)), ("a\0b", MiB(1))):
        with pytest.raises(ArgumentError):
            create_sparse_file(path, size)
    with pytest.raises(TaskError) as caught:
        create_sparse_file(tmp_path / "no" / "directory", MiB(1))
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(TypeError):
        create_sparse_file(tmp_path / "bare", 4096)
    assert os.listdir(tmp_path) == ["small"]
