# SPDX-License-Identifier: MIT
"""
Sizes with a unit.

One pool call mixes 512-byte sectors, pool blocks and 4 KiB metadata blocks, every wrong value is
*valid*, and the result of a mix-up is lost data. So a size is never a bare number here: adding
sectors to blocks, or passing ``65536`` where sectors are meant, is a TypeError at once.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, Final, Self, TypeAlias

from dmlib.errors import ArgumentError

SECTOR_SIZE: Final = 512
"""Bytes in a sector; device mapper counts in these whatever the disk's own sector size."""

METADATA_BLOCK_SIZE: Final = 4096
"""Bytes in a block of thin-pool metadata."""

_BINARY: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "PiB": 1 << 50}
_DECIMAL: Final = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
_SUFFIXES: Final = {"B": 1, "s": SECTOR_SIZE, **_BINARY, **_DECIMAL}
_TEXT: Final = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]+)\s*", re.ASCII)


class _Count:
    """A non-negative number of one kind of block; mixes with nothing but its own kind."""

    __slots__ = ("count",)
    count: int

    def __init__(self, count: int) -> None:
        if type(count) is not int:
            msg = f"{type(self).__name__} takes a whole number, not {count!r}"
            raise TypeError(msg)
        if count < 0:
            raise ArgumentError("count", count, f"{type(self).__name__} cannot be negative")
        object.__setattr__(self, "count", count)

    def __setattr__(self, name: str, value: object) -> None:
        msg = f"{type(self).__name__} cannot be changed"
        raise AttributeError(msg)

    def __delattr__(self, name: str) -> None:
        msg = f"{type(self).__name__} cannot be changed"
        raise AttributeError(msg)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.count,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.count})"

    def __bool__(self) -> bool:
        return self.count != 0

    def __hash__(self) -> int:
        return hash((type(self), self.count))

    def __eq__(self, other: object) -> bool:
        return self.count == other.count if type(other) is type(self) else NotImplemented

    def __lt__(self, other: Self) -> bool:
        return self.count < other.count if type(other) is type(self) else NotImplemented

    def __le__(self, other: Self) -> bool:
        return self.count <= other.count if type(other) is type(self) else NotImplemented

    def __gt__(self, other: Self) -> bool:
        return self.count > other.count if type(other) is type(self) else NotImplemented

    def __ge__(self, other: Self) -> bool:
        return self.count >= other.count if type(other) is type(self) else NotImplemented

    def __add__(self, other: Self) -> Self:
        return type(self)(self.count + other.count) if type(other) is type(self) else NotImplemented

    def __sub__(self, other: Self) -> Self:
        return type(self)(self.count - other.count) if type(other) is type(self) else NotImplemented

    def __mul__(self, factor: int) -> Self:
        return type(self)(self.count * factor) if type(factor) is int else NotImplemented

    __rmul__ = __mul__

    def __floordiv__(self, other: Self) -> int:
        return self.count // other.count if type(other) is type(self) else NotImplemented

    def __mod__(self, other: Self) -> Self:
        return type(self)(self.count % other.count) if type(other) is type(self) else NotImplemented


class Sectors(_Count):
    """
    A size or an offset in 512-byte sectors, device mapper's own unit.

    ``+``, ``-``, ``%`` and comparison take Sectors only, ``*`` a whole number, and ``//`` gives a
    plain whole number. There is no silent way to a number of bytes: ask for :attr:`bytes`.

    >>> KiB(64)
    Sectors(128)
    >>> print(MiB(1) + KiB(512))
    1536KiB
    >>> Sectors.parse("10GiB").bytes
    10737418240
    """

    __slots__ = ()

    @property
    def bytes(self) -> int:
        """The same size in bytes."""
        return self.count * SECTOR_SIZE

    @classmethod
    def from_bytes(cls, size_bytes: int) -> Self:
        """
        Return *size_bytes* as sectors.

        Raises:
            ArgumentError: It is not a multiple of 512, or negative.
        """
        if size_bytes % SECTOR_SIZE:
            raise ArgumentError("size_bytes", size_bytes, "must be a multiple of 512 bytes")
        return cls(size_bytes // SECTOR_SIZE)

    @classmethod
    def parse(cls, text: str, field: str = "size") -> Self:
        """
        Read a size with its unit, such as ``"64KiB"``, ``"1.5 GiB"``, ``"10GB"`` or ``"2048s"``.

        KiB to PiB are powers of 1024, kB to PB powers of 1000, ``s`` is sectors, ``B`` bytes. A bare number or a
        lone letter is refused: programs disagree about what they mean.

        Args:
            text: Number and unit.
            field: What to call the value in the error.

        Raises:
            ArgumentError: No such form, unknown unit, or not a whole number of sectors.
        """
        match = _TEXT.fullmatch(text)
        factor = _SUFFIXES.get(match[2]) if match else None
        if match is None or factor is None:
            raise ArgumentError(field, text, f"write a number and a unit ({', '.join(_SUFFIXES)})")
        size = Fraction(match[1]) * factor / SECTOR_SIZE
        if size.denominator != 1:
            raise ArgumentError(field, text, "must be a whole number of 512-byte sectors")
        return cls(int(size))

    def __str__(self) -> str:
        """Return the size exactly, in the largest binary unit that divides it."""
        for unit, factor in reversed(_BINARY.items()):
            if self.count and self.bytes % factor == 0:
                return f"{self.bytes // factor}{unit}"
        return f"{self.count}s"


class DataBlocks(_Count):
    """A number of thin-pool data blocks; how large one is, is the pool's ``data_block_size``."""

    __slots__ = ()

    def to_sectors(self, data_block_size: Sectors) -> Sectors:
        """Return the size that so many blocks of *data_block_size* have."""
        return data_block_size * self.count

    def __str__(self) -> str:
        return f"{self.count} data blocks"


class MetaBlocks(_Count):
    """A number of 4 KiB blocks of thin-pool metadata."""

    __slots__ = ()

    @property
    def bytes(self) -> int:
        """The same size in bytes."""
        return self.count * METADATA_BLOCK_SIZE

    def to_sectors(self) -> Sectors:
        """Return the same size in sectors."""
        return Sectors(self.count * (METADATA_BLOCK_SIZE // SECTOR_SIZE))

    def __str__(self) -> str:
        return f"{self.count} metadata blocks"


Size: TypeAlias = Sectors | str
"""What public calls take as a size: Sectors, or text with a unit such as ``"10GiB"``."""


def KiB(count: int) -> Sectors:  # noqa: N802 - the unit's own spelling
    """Return *count* x 1024 bytes."""
    return Sectors(count * 2)


def MiB(count: int) -> Sectors:  # noqa: N802
    """Return *count* x 1024 KiB."""
    return Sectors(count << 11)


def GiB(count: int) -> Sectors:  # noqa: N802
    """Return *count* x 1024 MiB."""
    return Sectors(count << 21)


def TiB(count: int) -> Sectors:  # noqa: N802
    """Return *count* x 1024 GiB."""
    return Sectors(count << 31)


def as_sectors(value: Size, field: str) -> Sectors:
    """
    Return *value* as Sectors; the door through which every size enters a public call.

    Raises:
        TypeError: A bare number, or anything else without a unit.
        ArgumentError: Text that is not a size.
    """
    if isinstance(value, Sectors):
        return value
    if isinstance(value, str):
        return Sectors.parse(value, field)
    msg = f'{field}={value!r} has no unit: write KiB(64), MiB(4), Sectors(128) or "10GiB"'
    raise TypeError(msg)


def format_bytes(size_bytes: int) -> str:
    """
    Return a size for people, rounded: ``"1.5 GiB"``.

    >>> format_bytes(1610612736), format_bytes(512)
    ('1.5 GiB', '512 B')
    """
    for unit, factor in reversed(_BINARY.items()):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.4g} {unit}"
    return f"{size_bytes} B"
