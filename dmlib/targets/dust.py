# SPDX-License-Identifier: MIT
"""
The ``dust`` target: a disk with bad blocks, which are listed by messages.

Parameters: ``<device> <offset> <block size in bytes>``.
Status: ``<device> fail_read_on_bad_block|bypass verbose|quiet``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Self

from dmlib.errors import ArgumentError
from dmlib.targets._base import (
    Status,
    Target,
    TargetDevice,
    Words,
    check_device,
    check_extra,
    check_offset,
)
from dmlib.units import Sectors, Size, as_sectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dmlib.ids import DeviceNumber

_BLOCK_MAX: Final = 1 << 21  # sectors: 1 GiB
_FAILING: Final = {"fail_read_on_bad_block": True, "bypass": False}
_VERBOSE: Final = {"verbose": True, "quiet": False}


@dataclass(frozen=True, slots=True, init=False)
class Dust(Target):
    """
    A device on which chosen blocks cannot be read, until they are written.

    The blocks are chosen, and the failing switched on, by messages: ``addbadblock 60``, ``removebadblock 60``,
    ``queryblock 60``, ``countbadblocks``, ``clearbadblocks``, ``enable``, ``disable``, ``quiet``.

    Args:
        device: The device below.
        offset: Where the segment begins there.
        block_size: 512 bytes to 1 GiB, a power of two.
        extra: Words after these that dmlib does not know; for tables read from elsewhere.

    Raises:
        TypeError: A size without a unit.
        ArgumentError: A device, an offset or a block size that cannot be.

    Minimum kernel: Linux 5.2.

    Source: kernel admin-guide, dm-dust.
    """

    type_name: ClassVar[str] = "dust"
    device: TargetDevice
    offset: Sectors
    block_size: Sectors
    extra: tuple[str, ...] = ()

    def __init__(self, device: TargetDevice, offset: Size, block_size: Size, *, extra: Iterable[str] = ()) -> None:
        block_size = as_sectors(block_size, "block_size")
        count = block_size.count
        if not 1 <= count <= _BLOCK_MAX or count & (count - 1):
            raise ArgumentError("block_size", block_size, "must be 512 bytes to 1 GiB, and a power of two")
        object.__setattr__(self, "device", check_device(device, "device"))
        object.__setattr__(self, "offset", check_offset(offset, "offset"))
        object.__setattr__(self, "block_size", block_size)
        object.__setattr__(self, "extra", check_extra(extra))

    def _to_words(self) -> Iterable[object]:
        return self.device, self.offset.count, self.block_size.bytes, *self.extra

    def _devices(self) -> tuple[TargetDevice, ...]:
        return (self.device,)

    def _with_devices(self, resolve: Callable[[TargetDevice], DeviceNumber]) -> Self:
        return type(self)(resolve(self.device), self.offset, self.block_size, extra=self.extra)

    @classmethod
    def _from_words(cls, words: Words) -> Self:
        device, offset, size = words.device("device"), words.sectors("offset"), words.number("block_size")
        if size % Sectors(1).bytes:
            raise words.bad("block_size", f"must be whole sectors, not {size} bytes")
        return cls(device, offset, Sectors.from_bytes(size), extra=words.rest())

    @classmethod
    def _status_from_words(cls, words: Words) -> DustStatus:
        device = words.device("device")
        failing = _FAILING[words.one_of("failing", _FAILING)]
        verbose = _VERBOSE[words.one_of("verbose", _VERBOSE)] if words else True
        return DustStatus(words.line, words.rest(), device=device, failing=failing, verbose=verbose)


@dataclass(frozen=True, slots=True, kw_only=True)
class DustStatus(Status):
    """
    Whether the bad blocks are in effect.

    Attributes:
        device: The device below.
        failing: Bad blocks cannot be read.
        verbose: The kernel logs what is added and removed. (Older kernels do not tell, and always log.)
    """

    device: TargetDevice
    failing: bool
    verbose: bool
