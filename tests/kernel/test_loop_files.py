# SPDX-License-Identifier: MIT
"""The file under a loop device: how it is known again, how it grows, and how it is made."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading

import pytest

from dmlib.errors import (
    ArgumentError,
    DeviceNotFoundError,
    TaskError,
)
from dmlib.ids import DeviceNumber
from dmlib.loop import LoopDevice, create_sparse_file, grow_sparse_file
from dmlib.units import KiB, MiB
from kernel_kit import attached, sectors_of, tool

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


@contextlib.contextmanager
def small_ext4(image):
    """A file system with room for 8 MiB at most."""
    create_sparse_file(image, MiB(8))
    directory = image.with_suffix(".d")
    directory.mkdir()
    with LoopDevice.temporary(image) as loop:
        tool("mkfs.ext4", "-q", loop.path)
        tool("mount", loop.path, os.fspath(directory))
        try:
            yield directory
        finally:
            tool("umount", os.fspath(directory))


def write_until_it_fails(file, size):
    while file.write(bytes(size)):
        pass


def fill(path):
    with open(path, "wb", buffering=0) as filler:
        for size in (65536, 1024):  # a page that does not fit as a whole leaves blocks free
            with pytest.raises(OSError, match="No space left"):
                write_until_it_fails(filler, size)


def test_growth_without_room(tmp_path):
    """On a full file system growing fails with ENOSPC and the file is as it was."""
    with small_ext4(tmp_path / "image") as directory:
        create_sparse_file(directory / "file", KiB(64))
        fill(directory / "filler")
        with pytest.raises(TaskError) as caught:
            grow_sparse_file(directory / "file", MiB(64))
        assert caught.value.errno == errno.ENOSPC
        assert os.stat(directory / "file").st_size == KiB(64).bytes


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
