# SPDX-License-Identifier: MIT
"""
The ``thin`` target, and the limits that thin provisioning sets.

Parameters: ``<pool> <thin id> [<external origin>]``.

Status::

    <mapped sectors> <highest mapped sector>|-
    Fail
    Error
    -        not bound to its pool
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Self

from dmlib.errors import ArgumentError
from dmlib.ids import check_thin_id
from dmlib.targets._base import (
    Status,
    StatusUnavailable,
    Target,
    TargetDevice,
    Words,
    check_device,
    check_extra,
)
from dmlib.units import KiB, MetaBlocks, MiB, Sectors, Size, as_sectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dmlib.ids import DeviceNumber

DATA_BLOCK_SIZE_MIN: Final = KiB(64)
"""Smallest data block; every block size is a multiple of it."""

DATA_BLOCK_SIZE_MAX: Final = MiB(1024)
"""Largest data block."""

METADATA_MIN: Final = KiB(68)
"""
Smallest metadata device with which the smallest pool works.

Measured on Linux 6.1: the kernel refuses up to 28 KiB, starts the pool read-only from 32 KiB on, and from 48 to 64 KiB
lets it begin and fail at the first message or write. A data device of many blocks needs more:
:func:`recommended_metadata_size`.
"""

METADATA_RECOMMENDED_MIN: Final = MiB(2)
"""The least that the kernel's guide recommends."""

METADATA_MAX: Final = MetaBlocks(255 * ((1 << 14) - 64)).to_sectors()
"""What a pool can use of its metadata device, 15.88 GiB; the kernel ignores the rest of a larger one."""

_METADATA_BYTES_PER_BLOCK: Final = 48


def check_data_block_size(size: Size, field: str = "data_block_size") -> Sectors:
    """
    Return *size* if a pool can have it as its data block size.

    Raises:
        TypeError: No unit.
        ArgumentError: Not 64 KiB..1 GiB (128..2097152 sectors), or not a multiple of 64 KiB.
    """
    sectors = as_sectors(size, field)
    if not DATA_BLOCK_SIZE_MIN <= sectors <= DATA_BLOCK_SIZE_MAX or sectors % DATA_BLOCK_SIZE_MIN:
        raise ArgumentError(field, sectors, "must be 128..2097152 sectors (64KiB..1GiB) and a multiple of 128 (64KiB)")
    return sectors


def check_metadata_size(size: Size, field: str = "metadata_size") -> Sectors:
    """
    Return *size* if a metadata device of that size will do; what exceeds METADATA_MAX is never used.

    Raises:
        TypeError: No unit.
        ArgumentError: Less than METADATA_MIN.
    """
    sectors = as_sectors(size, field)
    if sectors < METADATA_MIN:
        raise ArgumentError(field, sectors, f"must be at least {METADATA_MIN}")
    return sectors


def recommended_metadata_size(data_size: Size, data_block_size: Size) -> Sectors:
    """
    Return how large to make the metadata device of a pool.

    The kernel's rule of thumb is 48 bytes for each data block; a pool with many snapshots that diverge wants more.

    Args:
        data_size: The data device, at the size to which it may grow.
        data_block_size: The pool's data block size.

    Returns:
        A whole number of 4 KiB blocks, METADATA_RECOMMENDED_MIN..METADATA_MAX.

    Source: kernel admin-guide, thin-provisioning.
    """
    block = check_data_block_size(data_block_size)
    blocks = -(-as_sectors(data_size, "data_size").count // block.count)
    needed = MetaBlocks(-(-blocks * _METADATA_BYTES_PER_BLOCK // MetaBlocks(1).bytes)).to_sectors()
    return max(METADATA_RECOMMENDED_MIN, min(needed, METADATA_MAX))


@dataclass(frozen=True, slots=True, init=False)
class ThinTarget(Target):
    """
    A thin device of a pool.

    Its size is that of its segment: the pool keeps none. A shorter table hides blocks, a longer one has more
    to be provisioned.

    Args:
        pool: The pool's mapped device.
        thin_id: Its number in the pool, 0..16777215.
        external_origin: A device outside of the pool that is read where nothing is mapped yet. Nobody may write it,
            and every descendant of this thin device has to name it too. Minimum thin: 1.1; of another size
            than the thin device: 1.13.
        extra: Words after these that dmlib does not know; for tables read from elsewhere.

    Raises:
        TypeError: The id is not a whole number.
        ArgumentError: The id does not fit 24 bits, or the pool is its own external origin.

    Source: kernel admin-guide, thin-provisioning.
    """

    type_name: ClassVar[str] = "thin"
    pool: TargetDevice
    thin_id: int
    external_origin: TargetDevice | None = None
    extra: tuple[str, ...] = ()

    def __init__(
        self,
        pool: TargetDevice,
        thin_id: int,
        external_origin: TargetDevice | None = None,
        *,
        extra: Iterable[str] = (),
    ) -> None:
        pool = check_device(pool, "pool")
        check_thin_id(thin_id)
        if external_origin is not None:
            external_origin = check_device(external_origin, "external_origin")
        if external_origin == pool:
            raise ArgumentError("external_origin", str(external_origin), "must not be the pool")
        object.__setattr__(self, "pool", pool)
        object.__setattr__(self, "thin_id", thin_id)
        object.__setattr__(self, "external_origin", external_origin)
        object.__setattr__(self, "extra", check_extra(extra))
        if self.extra and external_origin is None:
            raise ArgumentError("extra", self.extra, "the first would be taken for the external origin")

    def _to_words(self) -> Iterable[object]:
        origin = () if self.external_origin is None else (self.external_origin,)
        return self.pool, self.thin_id, *origin, *self.extra

    def _devices(self) -> tuple[TargetDevice, ...]:
        return (self.pool,) if self.external_origin is None else (self.pool, self.external_origin)

    def _with_devices(self, resolve: Callable[[TargetDevice], DeviceNumber]) -> Self:
        origin = None if self.external_origin is None else resolve(self.external_origin)
        return type(self)(resolve(self.pool), self.thin_id, origin, extra=self.extra)

    @classmethod
    def _from_words(cls, words: Words) -> Self:
        pool = words.device("pool")
        thin_id = words.number("thin_id")
        external_origin = words.device("external_origin") if words else None
        return cls(pool, thin_id, external_origin, extra=words.rest())

    @classmethod
    def _status_from_words(cls, words: Words) -> ThinStatus | ThinFailed | ThinUnbound | StatusUnavailable:
        first = words.word("mapped")
        special = _WORDS.get(first)
        if special is not None:
            return special(words.line, words.rest())
        mapped = Sectors(words.as_number(first, "mapped"))
        highest = words.number_or_dash("highest_mapped") if words else None
        return ThinStatus(
            words.line,
            words.rest(),
            mapped=mapped,
            highest_mapped=None if highest is None else Sectors(highest),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinStatus(Status):
    """
    A thin device at work.

    Attributes:
        mapped: How much of it has blocks of the pool, also blocks shared with others (512-byte sectors).
        highest_mapped: Its last sector that has a block; ``None``: none has.
    """

    mapped: Sectors
    highest_mapped: Sectors | None = None


class ThinFailed(Status):
    """``Fail``: the pool is in fail mode, and all I/O to the thin device fails."""

    __slots__ = ()


class ThinUnbound(Status):
    """``-``: the target has not opened its thin device in the pool. The kernel's code allows for that."""

    __slots__ = ()


_WORDS: Final[dict[str, type[ThinFailed | ThinUnbound | StatusUnavailable]]] = {
    "Fail": ThinFailed,
    "Error": StatusUnavailable,
    "-": ThinUnbound,
}
