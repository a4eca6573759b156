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
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self, TypedDict, Unpack

from dmlib import _loopctl, ids
from dmlib._loopctl import failing_as, opened
from dmlib.errors import ArgumentError, DeviceBusyError, DeviceNotFoundError, from_task
from dmlib.usage import users_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    from dmlib.units import Sectors, Size

DETACH_TIMEOUT: Final = 5.0
"""Seconds a detach waits for other users, unless told otherwise: udev and blkid open a new device for a moment."""


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
        loop, node, file = _loopctl.claim(_loopctl.wish(path, **options))
        try:
            with failing_as("loop-attach", node):
                _loopctl.change_autoclear(loop, enabled=False)
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
            descriptor, node, file = _loopctl.claim(_loopctl.wish(path, **options))
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
            DeviceBusyError: Somebody still uses it; ``users`` says who, as far as it can be seen. It will go when they
                close it.

        Source: LOOP_CLR_FD.
        """
        with opened("loop-detach", self.path, self.file) as device, failing_as("loop-detach", self.path):
            _loopctl.ioctl(device.descriptor, _loopctl.CLR_FD)
        detached = type(self)(self.path, device.info.file)
        deadline = time.monotonic() + timeout
        pause = _loopctl.PAUSE
        while not lazy and detached._waits_for_user():  # noqa: SLF001 - of its own class
            if time.monotonic() + pause > deadline:
                note = "autoclear is set: the kernel detaches it when the last user closes it"
                users = [str(user) for user in users_of(device.number)]
                raise DeviceBusyError("loop-detach", self.path, log=[note], users=users)
            time.sleep(pause)
            pause = min(pause * 2, _loopctl.LONGEST_PAUSE)

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
        verb = "loop-set-autoclear"
        with opened(verb, self.path, self.file) as device, failing_as(verb, self.path):
            _loopctl.change_autoclear(device.descriptor, enabled=enabled)

    def refresh_size(self) -> Sectors:
        """
        Let the device follow the size of its file, after :func:`grow_sparse_file`.

        Returns:
            The new size.

        Raises:
            DeviceNotFoundError: No file is attached, or another one.

        Source: LOOP_SET_CAPACITY.
        """
        verb = "loop-refresh-size"
        with opened(verb, self.path, self.file) as device, failing_as(verb, self.path):
            _loopctl.ioctl(device.descriptor, _loopctl.SET_CAPACITY)
            return device.size()

    @property
    def size(self) -> Sectors:
        """Size of the device as it is now; DeviceNotFoundError if no file is attached, or another one."""
        with opened("loop-size", self.path, self.file) as device:
            return device.size()

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
        name = _loopctl.path_text(path)
        wanted = _loopctl.file_id(name)
        if wanted is None:
            raise ArgumentError("path", name, "must exist")
        candidates = (cls(f"/dev/loop{number}", wanted) for number in _loopctl.attached_numbers())
        return [loop for loop in candidates if loop.exists()]

    def exists(self) -> bool:
        """Return whether a file is attached, this object's own if it knows one; absence fails every other verb."""
        try:
            with opened("loop-status", self.path, self.file):
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
        with opened("loop-status", self.path, self.file) as device:
            name, deleted = device.backing_file()
        info = device.info
        return LoopStatus(
            backing_file=name,
            deleted=deleted,
            file_device=ids.DeviceNumber.from_dev(info.device),
            inode=info.inode,
            offset_bytes=info.offset,
            size_limit_bytes=info.size_limit or None,
            read_only=info.has(_loopctl.READ_ONLY),
            autoclear=info.has(_loopctl.AUTOCLEAR),
            direct_io=info.has(_loopctl.DIRECT_IO),
        )


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
    name, size_bytes = _loopctl.path_text(path), _loopctl.byte_count(size, "size")
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
    name, size_bytes = _loopctl.path_text(path), _loopctl.byte_count(size, "size")
    descriptor = _loopctl.open_file(name, os.O_RDWR, "grow-file", block_device=False)
    try:
        have = os.fstat(descriptor).st_size
        if size_bytes < have:
            raise ArgumentError("size", size, f"must be at least the {have} bytes that the file has")
        if size_bytes > have:
            with failing_as("grow-file", name):
                os.posix_fallocate(descriptor, size_bytes - 1, 1)
    finally:
        os.close(descriptor)
