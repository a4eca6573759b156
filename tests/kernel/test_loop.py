# SPDX-License-Identifier: MIT
"""Loop devices attached and detached, and each option, held against losetup and blockdev."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile

import pytest

from dmlib import _loopctl
from dmlib.errors import (
    ArgumentError,
    DeviceNotFoundError,
    PermissionDeniedError,
    TaskError,
    UnsupportedError,
)
from dmlib.ids import DeviceNumber
from dmlib.loop import LoopDevice, create_sparse_file, grow_sparse_file
from dmlib.units import KiB, MiB, Sectors
from kernel_kit import attached, found_no_more, sectors_of, tool

NOBODY = 65534


def descriptors():
    return len(os.listdir("/proc/self/fd"))


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

    monkeypatch.setattr(_loopctl, "_WAYS", (unknown, _loopctl._in_several_steps))
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


def test_an_option_that_does_not_exist(file):
    """A misspelt option is refused, not ignored."""
    with pytest.raises(TypeError, match="ofset"):
        LoopDevice.attach(file, ofset=MiB(1))


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
