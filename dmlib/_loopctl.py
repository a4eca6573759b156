# SPDX-License-Identifier: MIT
"""
The loop driver: its ioctls, attaching a file to a free number in one step or in several, and the nodes.

No lock is held here and none is needed: of several who attach to one free number, the kernel answers EBUSY to all but
the first. A file is attached with autoclear, which is taken away when all has gone well; until then the kernel detaches
the device when this process stops, however it does. Only before Linux 5.8 is there a moment without it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import re
import stat
import struct
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from dmlib import ids
from dmlib.errors import ArgumentError, DeviceBusyError, DeviceNotFoundError, StateError, UnsupportedError, from_task
from dmlib.units import SECTOR_SIZE, Sectors, Size, as_sectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from os import PathLike

PAUSE: Final = 0.002
LONGEST_PAUSE: Final = 0.05
_TRIES: Final = 1000
_NODE_WAIT: Final = 1.0
_LARGEST_FILE: Final = (1 << 63) - 1
_NO_FILE: Final = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)

_CONTROL: Final = "/dev/loop-control"
_MAJOR: Final = 7  # LOOP_MAJOR of linux/major.h
_NODE_NAME: Final = re.compile(r"loop(\d+)", re.ASCII)
_DELETED: Final = " (deleted)"

# linux/loop.h
_SET_FD: Final = 0x4C00
CLR_FD: Final = 0x4C01
_SET_STATUS64: Final = 0x4C04
_GET_STATUS64: Final = 0x4C05
SET_CAPACITY: Final = 0x4C07
_SET_DIRECT_IO: Final = 0x4C08
_SET_BLOCK_SIZE: Final = 0x4C09
_CONFIGURE: Final = 0x4C0A
_CTL_GET_FREE: Final = 0x4C82
READ_ONLY: Final = 1
AUTOCLEAR: Final = 4
DIRECT_IO: Final = 16
_INFO: Final = struct.Struct("=2Q8x2Q12xI64s96x16x")  # struct loop_info64 without what was for encryption
_CONFIG: Final = struct.Struct(f"=II{_INFO.size}s64x")  # struct loop_config
_NAME_LIMIT: Final = 63

FileId = tuple[int, int]
"""Device and inode of a file, as the kernel reports them."""


@contextlib.contextmanager
def failing_as(operation: str, device: str) -> Iterator[None]:
    """Turn the OSError of a plain call within the block into dmlib's error for that operation and device."""
    try:
        yield
    except OSError as error:
        raise from_task(operation, device, error.errno) from error


# -- one attached device


def ioctl(descriptor: int, request: int, argument: int | bytes = 0) -> bytes:
    """Ask the driver; EAGAIN means that somebody reads the device just now, and that its layout cannot change."""
    tries = _TRIES
    while True:
        try:
            result = fcntl.ioctl(descriptor, request, argument)
        except OSError as error:
            tries -= 1
            if error.errno != errno.EAGAIN or not tries:
                raise
            time.sleep(PAUSE)
        else:
            return result if isinstance(result, bytes) else b""


class Info(NamedTuple):
    """``struct loop_info64``; sizes in bytes, 0 for no limit."""

    device: int
    inode: int
    offset: int
    size_limit: int
    flags: int
    name: bytes

    @classmethod
    def read(cls, loop: int) -> Info:
        return cls(*_INFO.unpack(ioctl(loop, _GET_STATUS64, bytes(_INFO.size))))

    def pack(self) -> bytes:
        return _INFO.pack(*self)

    def has(self, flag: int) -> bool:
        return bool(self.flags & flag)

    @property
    def file(self) -> FileId:
        return self.device, self.inode


class Opened(NamedTuple):
    """An attached loop device that is open: nobody can take the file off it meanwhile."""

    descriptor: int
    number: ids.DeviceNumber
    info: Info

    def size(self) -> Sectors:
        return Sectors(os.lseek(self.descriptor, 0, os.SEEK_END) // SECTOR_SIZE)

    def backing_file(self) -> tuple[str, bool]:
        """Return the name of the file, and whether that name is gone."""
        try:
            with open(f"/sys/dev/block/{self.number}/loop/backing_file", "rb") as attribute:
                name = attribute.read().removesuffix(b"\n")
        except FileNotFoundError:  # no sysfs
            name = self.info.name.split(b"\0", 1)[0]
        text = os.fsdecode(name)
        if text.endswith(_DELETED) and file_id(text) != self.info.file:
            return text.removesuffix(_DELETED), True
        return text, False


@contextlib.contextmanager
def opened(operation: str, node: str, file: FileId | None) -> Iterator[Opened]:
    """Open a loop device that has that file, or any if it is None; DeviceNotFoundError if it has not."""
    # For reading only: udev probes a device that somebody has closed after opening it for writing.
    try:
        descriptor = os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        absent = error.errno in (errno.ENOENT, errno.ENODEV)
        raise from_task(operation, node, errno.ENXIO if absent else error.errno) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISBLK(status.st_mode) or os.major(status.st_rdev) != _MAJOR:
            raise ArgumentError("path", node, "must be the node of a loop device")
        with failing_as(operation, node):
            info = Info.read(descriptor)
        if file not in (None, info.file):
            raise DeviceNotFoundError(operation, node, errno.ENXIO, log=["it has another file now"])
        yield Opened(descriptor, ids.DeviceNumber.from_dev(status.st_rdev), info)
    finally:
        os.close(descriptor)


def attached_numbers() -> list[int]:
    """Return the numbers that have a file; without sysfs, those that have a node."""
    try:
        names = [name for name in os.listdir("/sys/block") if os.path.exists(f"/sys/block/{name}/loop")]
    except FileNotFoundError:
        names = os.listdir("/dev")
    return sorted(int(match[1]) for name in names if (match := _NODE_NAME.fullmatch(name)))


def change_autoclear(loop: int, *, enabled: bool) -> None:
    info = Info.read(loop)
    flags = info.flags | AUTOCLEAR if enabled else info.flags & ~AUTOCLEAR
    ioctl(loop, _SET_STATUS64, info._replace(flags=flags).pack())


# -- files


def path_text(path: str | PathLike[str]) -> str:
    name = os.fspath(path)
    if not isinstance(name, str):
        msg = f"path must be a str, not {type(name).__name__}"
        raise TypeError(msg)
    if not name or "\0" in name:
        raise ArgumentError("path", name, "must not be empty, nor have NUL in it")
    return name


def byte_count(size: Size, field: str) -> int:
    """Return a size in bytes that a file can have."""
    count = as_sectors(size, field).bytes
    if count > _LARGEST_FILE:
        raise ArgumentError(field, size, "must be less than 8 EiB")
    return count


def file_id(name: str) -> FileId | None:
    try:
        found = os.stat(name)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def open_file(name: str, flags: int, operation: str, *, block_device: bool) -> int:
    """Open what exists, without waiting for the other end of a pipe."""
    try:
        descriptor = os.open(name, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise ArgumentError("path", name, f"must be a file ({error.strerror})") from error
        raise from_task(operation, name, error.errno) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode) and not (block_device and stat.S_ISBLK(mode)):
        os.close(descriptor)
        raise ArgumentError("path", name, "must be a regular file" + " or a block device" * block_device)
    os.set_blocking(descriptor, True)
    return descriptor


# -- attaching


class Wish(NamedTuple):
    """What is to be attached, and how; checked by :func:`wish`."""

    path: str
    info: Info
    block_size: int


def wish(
    path: str | PathLike[str],
    *,
    offset: Size | None = None,
    size_limit: Size | None = None,
    read_only: bool = False,
    direct_io: bool = False,
    block_size: Size | None = None,
) -> Wish:
    """Check the options of an attachment; :class:`dmlib.loop.LoopOptions` explains them."""
    name = path_text(path)
    start, limit, block = (
        0 if size is None else byte_count(size, field)
        for field, size in (("offset", offset), ("size_limit", size_limit), ("block_size", block_size))
    )
    if size_limit is not None and not limit:
        raise ArgumentError("size_limit", size_limit, "must be at least one sector")
    if block_size is not None and (not block or block & (block - 1)):
        raise ArgumentError("block_size", block_size, "must be a power of two, at least 512 bytes")
    flags = AUTOCLEAR | (READ_ONLY if read_only else 0) | (DIRECT_IO if direct_io else 0)
    lo_name = os.fsencode(os.path.abspath(name))[:_NAME_LIMIT]
    return Wish(name, Info(0, 0, start, limit, flags, lo_name), block)


def _in_one_step(loop: int, file: int, wanted: Wish) -> None:
    ioctl(loop, _CONFIGURE, _CONFIG.pack(file, wanted.block_size, wanted.info.pack()))


def _in_several_steps(loop: int, file: int, wanted: Wish) -> None:
    ioctl(loop, _SET_FD, file)
    try:
        if wanted.block_size:
            ioctl(loop, _SET_BLOCK_SIZE, wanted.block_size)
        ioctl(loop, _SET_STATUS64, wanted.info.pack())
    except BaseException:
        ioctl(loop, CLR_FD)  # after the last step, autoclear does that
        raise
    if wanted.info.has(DIRECT_IO):
        with contextlib.suppress(OSError):  # whether it worked is read back afterwards, as it is for LOOP_CONFIGURE
            ioctl(loop, _SET_DIRECT_IO, 1)


_WAYS: tuple[Callable[[int, int, Wish], None], ...] = (_in_one_step, _in_several_steps)


def _attach(loop: int, file: int, wanted: Wish) -> FileId:
    """Attach the file with autoclear, and see that all wishes came true; if not, to close *loop* takes it back."""
    for way in _WAYS:
        try:
            way(loop, file, wanted)
            break
        except OSError as error:  # a kernel before 5.8 answers EINVAL, but so does one that refuses the file
            if way is _WAYS[-1] or error.errno not in (errno.EINVAL, errno.ENOTTY):
                raise
    info = Info.read(loop)
    if info.has(READ_ONLY) and not wanted.info.has(READ_ONLY):
        feature = f"writing to {wanted.path} as a loop device"
        raise UnsupportedError(feature, "a file that the kernel can write (or read_only)", "one that it can only read")
    if wanted.info.has(DIRECT_IO) and not info.has(DIRECT_IO):
        need = "a file system with O_DIRECT, and block_size and offset to suit the logical blocks of its disk"
        raise UnsupportedError(f"direct I/O on {wanted.path}", need, "a kernel that went back to the page cache")
    return info.file


def claim(wanted: Wish) -> tuple[int, str, FileId]:
    """Attach to a free number; return the open loop device, set to autoclear, its node, and its file."""
    access = os.O_RDONLY if wanted.info.has(READ_ONLY) else os.O_RDWR
    with contextlib.ExitStack() as stack:
        file = open_file(wanted.path, access, "loop-attach", block_device=True)
        stack.callback(os.close, file)
        have = os.lseek(file, 0, os.SEEK_END)
        if wanted.info.offset and wanted.info.offset >= have:
            offset = Sectors(wanted.info.offset // SECTOR_SIZE)
            raise ArgumentError("offset", offset, f"must lie within the file, which has {have} bytes")
        control = _open_control()
        stack.callback(os.close, control)
        for attempt in range(_TRIES):
            time.sleep(random.uniform(0, min(attempt * PAUSE, LONGEST_PAUSE)))  # noqa: S311 - parts rivals
            with failing_as("loop-attach", _CONTROL):
                number = fcntl.ioctl(control, _CTL_GET_FREE)
            node = f"/dev/loop{number}"
            try:
                loop = _open_node(node, number, access)
            except DeviceNotFoundError:
                continue  # somebody has removed the free number again
            try:
                with failing_as("loop-attach", wanted.path):
                    return loop, node, _attach(loop, file, wanted)
            except DeviceBusyError:
                os.close(loop)
            except BaseException:
                os.close(loop)
                raise
    raise DeviceBusyError("loop-attach", wanted.path, log=["others were first at every free number"])


def _open_control() -> int:
    try:
        return os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            raise from_task("loop-attach", _CONTROL, error.errno) from error
        need = f"the loop driver (modprobe loop) and its node {_CONTROL}"
        raise UnsupportedError("attaching a loop device", need, f"{_CONTROL}: {error.strerror}") from error


# -- nodes


def _open_node(node: str, number: int, access: int) -> int:
    """Open the node of a loop device that the kernel has; make the node if nobody else does."""
    deadline = time.monotonic() + _NODE_WAIT
    while True:
        expected = _device_of(number)
        try:
            loop = os.open(node, access | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            if time.monotonic() < deadline:
                time.sleep(PAUSE)
            else:
                _make_node(node, expected)
        except OSError as error:
            gone = error.errno in (errno.ENXIO, errno.ENODEV)
            raise from_task("loop-attach", node, errno.ENXIO if gone else error.errno) from error
        else:
            found = os.fstat(loop)
            if stat.S_ISBLK(found.st_mode) and found.st_rdev == expected:
                return loop
            os.close(loop)
            raise StateError(node, f"is not the node of loop device {number}; remove it")


def _make_node(node: str, device: int) -> None:
    try:
        os.mknod(node, stat.S_IFBLK | 0o600, device)
    except FileExistsError:
        return  # udev was late, not absent
    except OSError as error:
        have = f"none, and making it failed: {error.strerror}"
        raise UnsupportedError(f"attaching {node}", "its node, which devtmpfs or udev makes", have) from error


def _device_of(number: int) -> int:
    try:
        with open(f"/sys/block/loop{number}/dev", encoding="ascii") as dev:
            return os.makedev(*ids.DeviceNumber.parse(dev.read().strip()))
    except FileNotFoundError as error:
        if os.path.exists("/sys/block"):
            raise DeviceNotFoundError("loop-attach", f"/dev/loop{number}", errno.ENXIO) from error
        return os.makedev(_MAJOR, number)  # true unless the driver was loaded with max_part
