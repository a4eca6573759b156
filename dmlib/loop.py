# SPDX-License-Identifier: MIT
"""
Loop devices: a file used as a block device, and the sparse files for it.

A loop device outlives the process that attached it, so :class:`LoopDevice` is a name, not a handle. Its number
does not outlive the attachment: after a detach, ``/dev/loop3`` may be anybody's. A LoopDevice that came from
:meth:`~LoopDevice.attach` or :meth:`~LoopDevice.find` therefore knows its file as well, and its verbs refuse to touch
a loop device that has another one.
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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Self, TypedDict, TypeVar, Unpack

from dmlib import ids
from dmlib.errors import ArgumentError, DeviceBusyError, DeviceNotFoundError, StateError, UnsupportedError, from_task
from dmlib.units import SECTOR_SIZE, Sectors, Size, as_sectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from os import PathLike

DETACH_TIMEOUT: Final = 5.0
"""Seconds a detach waits for other users, unless told otherwise: udev and blkid open a new device for a moment."""

_CONTROL: Final = "/dev/loop-control"
_MAJOR: Final = 7  # LOOP_MAJOR of linux/major.h
_NODE_WAIT: Final = 1.0
_TRIES: Final = 1000
_PAUSE: Final = 0.002
_LONGEST_PAUSE: Final = 0.05
_LARGEST_FILE: Final = (1 << 63) - 1
_NO_FILE: Final = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)

# linux/loop.h
_SET_FD: Final = 0x4C00
_CLR_FD: Final = 0x4C01
_SET_STATUS64: Final = 0x4C04
_GET_STATUS64: Final = 0x4C05
_SET_CAPACITY: Final = 0x4C07
_SET_DIRECT_IO: Final = 0x4C08
_SET_BLOCK_SIZE: Final = 0x4C09
_CONFIGURE: Final = 0x4C0A
_CTL_GET_FREE: Final = 0x4C82
_READ_ONLY: Final = 1
_AUTOCLEAR: Final = 4
_DIRECT_IO: Final = 16
_INFO: Final = struct.Struct("=2Q8x2Q12xI64s96x16x")  # struct loop_info64 without what was for encryption
_CONFIG: Final = struct.Struct(f"=II{_INFO.size}s64x")  # struct loop_config
_NAME_LIMIT: Final = 63
_NODE_NAME: Final = re.compile(r"loop(\d+)", re.ASCII)
_DELETED: Final = " (deleted)"

_Result = TypeVar("_Result")
_FileId = tuple[int, int]  # device and inode, as the kernel reports them


class _Info(NamedTuple):
    """``struct loop_info64``; sizes in bytes, 0 for no limit."""

    device: int
    inode: int
    offset: int
    size_limit: int
    flags: int
    name: bytes

    @classmethod
    def read(cls, loop: int) -> _Info:
        return cls(*_INFO.unpack(_ioctl(loop, _GET_STATUS64, bytes(_INFO.size))))

    def write(self, loop: int) -> None:
        _ioctl(loop, _SET_STATUS64, _INFO.pack(*self))

    @property
    def file(self) -> _FileId:
        return self.device, self.inode


class _Wish(NamedTuple):
    """What is to be attached, checked."""

    path: str
    info: _Info
    block_size: int

    def has(self, flag: int) -> bool:
        return bool(self.info.flags & flag)


class LoopOptions(TypedDict, total=False):
    """
    How a file is to be attached: keywords, all optional.

    Attributes:
        offset: Where in the file the device begins; by default at its beginning.
        size_limit: Use at most so much of the file; by default all of it. What a file has beyond a whole number of
            512-byte sectors is not seen.
        read_only: Refuse writes; the file is opened for reading only.
        direct_io: Read and write the file past its page cache. It is an error if that cannot be done.
        block_size: Logical block size of the device, 512 bytes to a page; by default the kernel's choice.
    """

    offset: Size
    size_limit: Size | None
    read_only: bool
    direct_io: bool
    block_size: Size | None


@dataclass(frozen=True, slots=True)
class LoopStatus:
    """
    How a loop device is attached.

    Attributes:
        backing_file: The file's path as the kernel knows it; it follows a rename. Without sysfs, the path at the
            time of the attachment, of which the kernel keeps 63 bytes.
        deleted: The name is gone; the data stays until the detach. Seen in sysfs only.
        file_device: Number of the device that the file's file system is on.
        inode: The file's inode there.
        offset_bytes: Where in the file the device begins.
        size_limit_bytes: At most so much of the file is used; ``None`` for all of it.
        read_only: Writes are refused.
        autoclear: The kernel detaches the device when its last user closes it.
        direct_io: The file is read and written past its page cache.
    """

    backing_file: str
    deleted: bool
    file_device: ids.DeviceNumber
    inode: int
    offset_bytes: int
    size_limit_bytes: int | None
    read_only: bool
    autoclear: bool
    direct_io: bool


@dataclass(frozen=True, slots=True)
class LoopDevice:
    """
    A loop device, by its node. Making the object asks the kernel nothing.

    Args:
        path: Its node, such as ``/dev/loop0``.
        file: Device and inode of the file it must have; :meth:`attach` and :meth:`find` fill that in. With it, every
            verb raises DeviceNotFoundError once the number belongs to another file; without, it takes what is there.
    """

    path: str
    file: tuple[int, int] | None = field(default=None, compare=False, repr=False)

    def __fspath__(self) -> str:
        return self.path

    @classmethod
    def attach(cls, path: str | PathLike[str], **options: Unpack[LoopOptions]) -> Self:
        """
        Make a file available as a block device under a free number; all of it happens, or nothing stays.

        If it fails while udev looks at the half-made device, that goes when udev closes it, a moment later.

        Autoclear is no option here: nobody would have the device open when this returns, so the kernel would detach
        it at once. See :meth:`temporary` and :meth:`set_autoclear`.

        Args:
            path: A regular file or a block device; symbolic links are followed.
            **options: See :class:`LoopOptions`.

        Returns:
            The loop device; its node exists. Where neither devtmpfs nor udev makes it, this does.

        Raises:
            ArgumentError: There is no such file, it cannot be attached, or a size cannot be.
            PermissionDeniedError: The file or the loop driver may not be used by this process.
            UnsupportedError: There is no loop driver; or direct I/O, or writing, cannot be had for this file.
            DeviceBusyError: Others took the free number a thousand times.
            TaskError: The kernel refused: EROFS for a file that can only be read, ETXTBSY for one that is swapped to,
                EINVAL for a block size that it does not have.

        Minimum kernel: any; *direct_io* 4.10, *block_size* 4.14. Before 5.8 it takes several steps, and for a moment
        the device is there without offset and limit.

        Source: LOOP_CTL_GET_FREE, LOOP_CONFIGURE; before 5.8 LOOP_SET_FD, LOOP_SET_STATUS64; loop(4).
        """
        loop, node, file = _claim(_check(path, options))
        try:
            _run("loop-attach", node, lambda: _change_autoclear(loop, enabled=False))
        finally:
            os.close(loop)
        return cls(node, file)

    @classmethod
    @contextlib.contextmanager
    def temporary(
        cls, path: str | PathLike[str], *, autoclear: bool = False, **options: Unpack[LoopOptions]
    ) -> Iterator[Self]:
        """
        Attach a file for the length of a ``with`` block. The file itself stays.

        Args:
            path: The file, see :meth:`attach`.
            autoclear: The block holds the device open, and the kernel detaches it when the block has ended, be it by
                SIGKILL, and everybody else has closed it; the block's end does not wait for that. A child made by
                ``os.fork`` within the block holds it too; a program started there does not.
            **options: See :class:`LoopOptions`.

        Raises:
            DeviceBusyError: Without *autoclear*, at the end: somebody still uses it, see :meth:`detach`.

        And whatever :meth:`attach` raises.
        """
        if autoclear:
            descriptor, node, file = _claim(_check(path, options))
            try:
                yield cls(node, file)
            finally:
                os.close(descriptor)
        else:
            loop = cls.attach(path, **options)
            try:
                yield loop
            finally:
                if loop.exists():
                    loop.detach()

    def detach(self, *, lazy: bool = False, timeout: float = DETACH_TIMEOUT) -> None:
        """
        Take the device off its file; the number is free again.

        While anybody has the device open, the kernel only takes a note: it sets autoclear, and the last one to close
        the device detaches it. Only :meth:`set_autoclear` takes that back.

        Args:
            lazy: Leave it at that, without waiting.
            timeout: Seconds to wait until the device is really gone.

        Raises:
            DeviceNotFoundError: No file is attached, or another one.
            DeviceBusyError: Somebody still has it open. It will go when they close it.

        Source: LOOP_CLR_FD.
        """
        with self._open("loop-detach") as (descriptor, info):
            _run("loop-detach", self.path, lambda: _ioctl(descriptor, _CLR_FD, 0))
        attached = type(self)(self.path, info.file)
        deadline = time.monotonic() + timeout
        pause = _PAUSE
        while not lazy and attached._waits_for_user():  # noqa: SLF001 - of its own class
            if time.monotonic() + pause > deadline:
                note = "autoclear is set: the kernel detaches it when the last user closes it"
                raise DeviceBusyError("loop-detach", self.path, log=[note])
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _waits_for_user(self) -> bool:
        # Without autoclear it is not the old attachment: somebody has attached the same file there anew.
        try:
            return self.status().autoclear
        except DeviceNotFoundError:
            return False

    def set_autoclear(self, *, enabled: bool) -> None:
        """
        Say whether the kernel detaches the device when its last user closes it.

        Args:
            enabled: It does. If nobody has the device open, it does so at once. ``False`` takes back a detach that
                still waits for a user.

        Raises:
            DeviceNotFoundError: No file is attached, or another one.

        Source: LOOP_SET_STATUS64 with LO_FLAGS_AUTOCLEAR.
        """
        with self._open("loop-set-autoclear") as (descriptor, _info):
            _run("loop-set-autoclear", self.path, lambda: _change_autoclear(descriptor, enabled=enabled))

    def refresh_size(self) -> Sectors:
        """
        Let the device follow the size of its file, after :func:`grow_sparse_file`.

        Returns:
            The new size.

        Raises:
            DeviceNotFoundError: No file is attached, or another one.

        Source: LOOP_SET_CAPACITY.
        """
        with self._open("loop-refresh-size") as (descriptor, _info):
            _run("loop-refresh-size", self.path, lambda: _ioctl(descriptor, _SET_CAPACITY, 0))
            return _size_of(descriptor)

    @property
    def size(self) -> Sectors:
        """Size of the device as it is now; DeviceNotFoundError if no file is attached, or another one."""
        with self._open("loop-size") as (descriptor, _info):
            return _size_of(descriptor)

    @property
    def number(self) -> ids.DeviceNumber:
        """Its device number, for tables; ArgumentError if there is no node."""
        return ids.device_number(self.path)

    @classmethod
    def find(cls, path: str | PathLike[str]) -> list[Self]:
        """
        Return the loop devices that use a file, whatever its name was when they were attached.

        Args:
            path: The file; symbolic links are followed.

        Returns:
            Them, by rising number; empty if there are none, or no loop driver. One without a node in ``/dev`` cannot
            be asked and is left out.

        Raises:
            ArgumentError: There is no such file.
            PermissionDeniedError: A loop device may not be opened by this process.

        Cost: an open and an ioctl for each attached loop device.

        Source: LOOP_GET_STATUS64, ``lo_device`` and ``lo_inode``.
        """
        name = _text(path)
        wanted = _file_id(name)
        if wanted is None:
            raise ArgumentError("path", name, "must exist")
        candidates = (cls(f"/dev/loop{number}", wanted) for number in _attached_numbers())
        return [loop for loop in candidates if loop.exists()]

    def exists(self) -> bool:
        """Return whether a file is attached, this object's own if it knows one; absence fails every other verb."""
        try:
            with self._open("loop-status"):
                return True
        except DeviceNotFoundError:
            return False

    def status(self) -> LoopStatus:
        """
        Return how the device is attached.

        Raises:
            DeviceNotFoundError: No file is attached, or another one.

        Source: LOOP_GET_STATUS64; sysfs, ``loop/backing_file``.
        """
        with self._open("loop-status") as (descriptor, info):
            name, deleted = _backing_file(ids.DeviceNumber.from_dev(os.fstat(descriptor).st_rdev), info)
        return LoopStatus(
            backing_file=name,
            deleted=deleted,
            file_device=ids.DeviceNumber.from_dev(info.device),
            inode=info.inode,
            offset_bytes=info.offset,
            size_limit_bytes=info.size_limit or None,
            read_only=bool(info.flags & _READ_ONLY),
            autoclear=bool(info.flags & _AUTOCLEAR),
            direct_io=bool(info.flags & _DIRECT_IO),
        )

    @contextlib.contextmanager
    def _open(self, operation: str) -> Iterator[tuple[int, _Info]]:
        # For reading only: udev probes a device that somebody has closed after opening it for writing.
        # While it is open, nobody can detach it, so the file it has here is the file it has in the block.
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            absent = error.errno in (errno.ENOENT, errno.ENODEV)
            raise from_task(operation, self.path, errno.ENXIO if absent else error.errno) from error
        try:
            node = os.fstat(descriptor)
            if not stat.S_ISBLK(node.st_mode) or os.major(node.st_rdev) != _MAJOR:
                raise ArgumentError("path", self.path, "must be the node of a loop device")
            info = _run(operation, self.path, lambda: _Info.read(descriptor))
            if self.file not in (None, info.file):
                raise DeviceNotFoundError(operation, self.path, errno.ENXIO, log=["it has another file now"])
            yield descriptor, info
        finally:
            os.close(descriptor)


# -- files


def create_sparse_file(path: str | PathLike[str], size: Size) -> None:
    """
    Create a file that has a size but no data; it takes space as it is written. Its mode is 0600 whatever the umask.

    Args:
        path: Where nothing may be yet: no file, and no symbolic link either, dangling or not.
        size: Its size.

    Raises:
        ArgumentError: Something is there already (it was not touched), or the size cannot be.
        PermissionDeniedError: The directory may not be written by this process.
        TaskError: The file system refused (EFBIG: too large for it); the file was removed again.

    Source: open(2) with O_EXCL, ftruncate(2).
    """
    name, size_bytes = _text(path), _file_size(size)
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise ArgumentError("path", name, "must not exist yet") from error
    except OSError as error:
        raise from_task("create-file", name, error.errno) from error
    try:
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, size_bytes)
    except BaseException as error:
        if os.path.lexists(name) and os.path.samestat(os.lstat(name), os.fstat(descriptor)):
            os.unlink(name)
        if isinstance(error, OSError):
            raise from_task("create-file", name, error.errno) from error
        raise
    finally:
        os.close(descriptor)


def grow_sparse_file(path: str | PathLike[str], size: Size) -> None:
    """
    Make a file larger, and never smaller, whoever else is growing it meanwhile; its last block gets allocated.

    Args:
        path: A regular file; symbolic links are followed.
        size: Its new size; the size it has already is no error.

    Raises:
        ArgumentError: The file is larger already, is no regular file, or does not exist.
        PermissionDeniedError: The file may not be written by this process.
        TaskError: The file system refused (ENOSPC: no room; EFBIG: too large for it). The file is as it was.

    Source: fallocate(2), which does not shrink.
    """
    name, size_bytes = _text(path), _file_size(size)
    descriptor = _open_file(name, os.O_RDWR, "grow-file", block_device=False)
    try:
        have = os.fstat(descriptor).st_size
        if size_bytes < have:
            raise ArgumentError("size", size, f"must be at least the {have} bytes that the file has")
        if size_bytes > have:
            _run("grow-file", name, lambda: os.posix_fallocate(descriptor, size_bytes - 1, 1))
    finally:
        os.close(descriptor)


def _text(path: str | PathLike[str]) -> str:
    name = os.fspath(path)
    if not isinstance(name, str):
        msg = f"path must be a str, not {type(name).__name__}"
        raise TypeError(msg)
    if not name or "\0" in name:
        raise ArgumentError("path", name, "must not be empty, nor have NUL in it")
    return name


def _file_size(size: Size) -> int:
    size_bytes = as_sectors(size, "size").bytes
    if size_bytes > _LARGEST_FILE:
        raise ArgumentError("size", size, "must be less than 8 EiB")
    return size_bytes


def _file_id(name: str) -> _FileId | None:
    try:
        found = os.stat(name)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _open_file(name: str, flags: int, operation: str, *, block_device: bool) -> int:
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


# -- the loop driver


def _ioctl(descriptor: int, request: int, argument: int | bytes) -> bytes:
    tries = _TRIES
    while True:
        try:
            result = fcntl.ioctl(descriptor, request, argument)
        except OSError as error:
            tries -= 1
            if error.errno != errno.EAGAIN or not tries:
                raise
            time.sleep(_PAUSE)  # somebody reads the device just now, and its layout cannot change under them
        else:
            return result if isinstance(result, bytes) else b""


def _run(operation: str, device: str, step: Callable[[], _Result]) -> _Result:
    try:
        return step()
    except OSError as error:
        raise from_task(operation, device, error.errno) from error


def _size_of(descriptor: int) -> Sectors:
    return Sectors(os.lseek(descriptor, 0, os.SEEK_END) // SECTOR_SIZE)


def _change_autoclear(loop: int, *, enabled: bool) -> None:
    info = _Info.read(loop)
    info._replace(flags=info.flags | _AUTOCLEAR if enabled else info.flags & ~_AUTOCLEAR).write(loop)


def _option(options: LoopOptions, name: Literal["offset", "size_limit", "block_size"]) -> int | None:
    """Return a size that was asked for, in bytes."""
    value = options.get(name)
    if value is None:
        return None
    size_bytes = as_sectors(value, name).bytes
    if size_bytes > _LARGEST_FILE:
        raise ArgumentError(name, value, "must be less than 8 EiB")
    return size_bytes


def _check(path: str | PathLike[str], options: LoopOptions) -> _Wish:
    name = _text(path)
    offset = _option(options, "offset") or 0
    limit = _option(options, "size_limit")
    if limit == 0:
        raise ArgumentError("size_limit", options["size_limit"], "must be at least one sector")
    block_size = _option(options, "block_size")
    if block_size is not None and (not block_size or block_size & (block_size - 1)):
        raise ArgumentError("block_size", options["block_size"], "must be a power of two, at least 512 bytes")
    # Autoclear until all has gone well: so the kernel takes it back when, and however, this process stops half-way.
    flags = _AUTOCLEAR
    flags |= _READ_ONLY if options.get("read_only") else 0
    flags |= _DIRECT_IO if options.get("direct_io") else 0
    lo_name = os.fsencode(os.path.abspath(name))[:_NAME_LIMIT]
    return _Wish(name, _Info(0, 0, offset, limit or 0, flags, lo_name), block_size or 0)


def _configure(loop: int, file: int, wish: _Wish) -> None:
    info = _INFO.pack(*wish.info)
    _ioctl(loop, _CONFIGURE, _CONFIG.pack(file, wish.block_size, info))


def _configure_in_steps(loop: int, file: int, wish: _Wish) -> None:
    _ioctl(loop, _SET_FD, file)
    try:
        if wish.block_size:
            _ioctl(loop, _SET_BLOCK_SIZE, wish.block_size)
        wish.info.write(loop)
    except BaseException:
        _ioctl(loop, _CLR_FD, 0)  # after the last step, autoclear does that
        raise
    if wish.has(_DIRECT_IO):
        with contextlib.suppress(OSError):  # whether it worked is read back afterwards, as it is for LOOP_CONFIGURE
            _ioctl(loop, _SET_DIRECT_IO, 1)


_WAYS: tuple[Callable[[int, int, _Wish], None], ...] = (_configure, _configure_in_steps)


def _bind(loop: int, file: int, wish: _Wish) -> _FileId:
    """Attach the file with autoclear, and see that all wishes came true; if not, to close *loop* takes it back."""
    for way in _WAYS:
        try:
            way(loop, file, wish)
            break
        except OSError as error:  # a kernel before 5.8 answers EINVAL, but so does one that refuses the file
            if way is _WAYS[-1] or error.errno not in (errno.EINVAL, errno.ENOTTY):
                raise
    info = _Info.read(loop)
    if info.flags & _READ_ONLY and not wish.has(_READ_ONLY):
        feature = f"writing to {wish.path} as a loop device"
        raise UnsupportedError(feature, "a file that the kernel can write (or read_only)", "one that it can only read")
    if wish.has(_DIRECT_IO) and not info.flags & _DIRECT_IO:
        need = "a file system with O_DIRECT, and block_size and offset to suit the logical blocks of its disk"
        raise UnsupportedError(f"direct I/O on {wish.path}", need, "a kernel that went back to the page cache")
    return info.file


def _claim(wish: _Wish) -> tuple[int, str, _FileId]:
    """Attach to a free number; return the open loop device, set to autoclear, its node, and its file."""
    access = os.O_RDONLY if wish.has(_READ_ONLY) else os.O_RDWR
    with contextlib.ExitStack() as stack:
        file = _open_file(wish.path, access, "loop-attach", block_device=True)
        stack.callback(os.close, file)
        if wish.info.offset and wish.info.offset >= os.lseek(file, 0, os.SEEK_END):
            raise ArgumentError("offset", wish.info.offset, "must lie within the file")
        control = _open_control()
        stack.callback(os.close, control)
        for attempt in range(_TRIES):
            time.sleep(random.uniform(0, min(attempt * _PAUSE, _LONGEST_PAUSE)))  # noqa: S311 - parts rivals
            number = _run("loop-attach", _CONTROL, lambda: fcntl.ioctl(control, _CTL_GET_FREE))
            node = f"/dev/loop{number}"
            try:
                loop = _open_node(node, number, access)
            except DeviceNotFoundError:
                continue  # somebody has removed the free number again
            try:
                return loop, node, _bind(loop, file, wish)
            except BaseException as error:
                os.close(loop)
                if not isinstance(error, OSError):
                    raise
                if error.errno != errno.EBUSY:
                    raise from_task("loop-attach", wish.path, error.errno) from error
    raise DeviceBusyError("loop-attach", wish.path, log=["others were first at every free number"])


def _open_control() -> int:
    try:
        return os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            raise from_task("loop-attach", _CONTROL, error.errno) from error
        need = f"the loop driver (modprobe loop) and its node {_CONTROL}"
        raise UnsupportedError("attaching a loop device", need, f"{_CONTROL}: {error.strerror}") from error


def _open_node(node: str, number: int, access: int) -> int:
    """Open the node of a loop device that the kernel has; make the node if nobody else does."""
    deadline = time.monotonic() + _NODE_WAIT
    while True:
        expected = _device_of(number)
        try:
            loop = os.open(node, access | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            if time.monotonic() < deadline:
                time.sleep(_PAUSE)
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


def _attached_numbers() -> list[int]:
    """Return the numbers that have a file; without sysfs, those that have a node."""
    try:
        names = [name for name in os.listdir("/sys/block") if os.path.exists(f"/sys/block/{name}/loop")]
    except FileNotFoundError:
        names = os.listdir("/dev")
    return sorted(int(match[1]) for name in names if (match := _NODE_NAME.fullmatch(name)))


def _backing_file(number: ids.DeviceNumber, info: _Info) -> tuple[str, bool]:
    try:
        with open(f"/sys/dev/block/{number}/loop/backing_file", "rb") as attribute:
            name = attribute.read().removesuffix(b"\n")
    except FileNotFoundError:  # no sysfs, or detached by now
        name = info.name.split(b"\0", 1)[0]
    text = os.fsdecode(name)
    if text.endswith(_DELETED) and _file_id(text) != info.file:
        return text.removesuffix(_DELETED), True
    return text, False
