# SPDX-License-Identifier: MIT
"""
Block devices from outside: how large, and what the metadata of a thin pool says on its first block.

Reads and writes here are direct: the kernel's metadata code bypasses the page cache, so what the cache holds of
such a device may be old.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dmlib import ids
from dmlib.errors import DeviceBusyError, DeviceNotFoundError, from_task
from dmlib.udev import node_path
from dmlib.units import METADATA_BLOCK_SIZE, Sectors
from dmlib.usage import users_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SUPERBLOCK: Final = struct.Struct("<4x4xQ16xQII Q")  # csum, flags, blocknr, uuid, magic, version, time, transaction
_MAGIC: Final = 27022010
_BLOCK_SIZE: Final = struct.Struct("<I")
_BLOCK_SIZE_OFFSET: Final = 336


def size_of(number: ids.DeviceNumber) -> Sectors:
    """
    Return the size of a block device.

    Raises:
        DeviceNotFoundError: There is none of this number.

    Source: sysfs, ``size``.
    """
    try:
        with open(f"/sys/dev/block/{number}/size", encoding="ascii") as size:
            return Sectors(int(size.read()))
    except OSError as error:
        raise DeviceNotFoundError("size", str(number), errno.ENXIO) from error


def node_of(number: ids.DeviceNumber) -> str:
    """
    Return a path of a block device: the kernel's own, such as ``/dev/dm-3``, or that of a mapped device's name.

    Raises:
        DeviceNotFoundError: There is no such device, or it has no node.

    Source: sysfs, ``uevent`` and ``dm/name``.
    """
    paths = []
    with contextlib.suppress(FileNotFoundError):  # no such device, or not a mapped one
        with open(f"/sys/dev/block/{number}/uevent", encoding="utf-8") as uevent:
            paths += [f"/dev/{line.rstrip()[8:]}" for line in uevent if line.startswith("DEVNAME=")]
        with open(f"/sys/dev/block/{number}/dm/name", "rb") as name:  # where /dev has only what libdevmapper made
            paths.append(node_path(ids.unmangle(name.read().rstrip(b"\n"))))
    for path in paths:
        if os.path.exists(path) and ids.device_number(path) == number:
            return path
    raise DeviceNotFoundError("find the node of", str(number), errno.ENXIO)


def mapped_holders(number: ids.DeviceNumber) -> frozenset[ids.DeviceNumber]:
    """
    Return the mapped devices directly on top of a device, by a live or an inactive table.

    Source: sysfs, ``holders``.
    """
    found = set()
    for entry in os.listdir(f"/sys/dev/block/{number}/holders"):
        with (
            contextlib.suppress(FileNotFoundError),  # removed meanwhile
            open(f"/sys/block/{entry}/dev", encoding="ascii") as device,
        ):
            found.add(ids.DeviceNumber.parse(device.read().strip()))
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class PoolSuperblock:
    """
    What the first block of a metadata device says.

    Attributes:
        data_block_size: Block size for which the pool was made.
        transaction_id: The transaction id of the last commit.
        version: Version of the metadata format.
    """

    data_block_size: Sectors
    transaction_id: int
    version: int


@contextlib.contextmanager
def exclusive(path: str, *, write: bool = False) -> Iterator[int]:
    """
    Open a block device that nobody else claims (file systems, swap and device mapper do), for direct I/O.

    Raises:
        DeviceBusyError: It is claimed; ``users`` says by whom.
        TaskError: It cannot be opened.
    """
    try:
        flags = (os.O_RDWR | os.O_DSYNC) if write else os.O_RDONLY
        descriptor = os.open(path, flags | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            users = [str(user) for user in users_of(ids.device_number(path))]
            raise DeviceBusyError("open", path, users=users) from error
        raise from_task("open", path, error.errno) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_first_block(path: str) -> bytes:
    """
    Return the first 4 KiB of a block device that nobody claims.

    Raises:
        DeviceBusyError: It is claimed.
        TaskError: It cannot be read.
    """
    with exclusive(path) as descriptor, mmap.mmap(-1, METADATA_BLOCK_SIZE) as page:
        _transfer("read", path, lambda: os.preadv(descriptor, [page], 0))
        return page[:]


def zero_first_block(path: str) -> None:
    """
    Overwrite the first 4 KiB of a block device that nobody claims; what a thin pool kept there is lost.

    Raises:
        DeviceBusyError: It is claimed.
        TaskError: It cannot be written.
    """
    with exclusive(path, write=True) as descriptor, mmap.mmap(-1, METADATA_BLOCK_SIZE) as page:
        _transfer("write", path, lambda: os.pwritev(descriptor, [page], 0))


def _transfer(verb: str, path: str, move: Callable[[], int]) -> None:
    try:
        moved = move()
    except OSError as error:
        raise from_task(verb, path, error.errno) from error
    if moved != METADATA_BLOCK_SIZE:
        raise from_task(verb, path, errno.EIO)


def parse_superblock(block: bytes) -> PoolSuperblock | None:
    """Return what a first block says if it is that of thin-pool metadata, ``None`` if it is not."""
    _blocknr, magic, version, _time, transaction_id = _SUPERBLOCK.unpack_from(block)
    if magic != _MAGIC:
        return None
    (data_block_size,) = _BLOCK_SIZE.unpack_from(block, _BLOCK_SIZE_OFFSET)
    return PoolSuperblock(Sectors(data_block_size), transaction_id, version)
