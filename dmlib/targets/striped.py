# SPDX-License-Identifier: MIT
"""
The ``striped`` target: chunks laid round-robin over several devices.

Parameters: ``<number of stripes> <chunk size> [<device> <offset>]...``.
Status: ``<number of stripes> <device>... 1 <health>``, where health is one letter a stripe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from dmlib.errors import ArgumentError
from dmlib.targets._base import (
    U32_LIMIT,
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


class Stripe(NamedTuple):
    """A device of a striped target, and where its part begins there (512-byte sectors)."""

    device: TargetDevice
    offset: Sectors


@dataclass(frozen=True, slots=True, init=False)
class Striped(Target):
    """
    Spread a segment over several devices, a chunk at a time.

    A segment's length has to be a multiple of chunk size times number of stripes.

    Args:
        chunk_size: What goes to one device before the next has its turn (512-byte sectors, at least 1).
        stripes: Pairs of a device and an offset into it (512-byte sectors); at least one.
        extra: Words after these that dmlib does not know; for tables read from elsewhere.

    Raises:
        TypeError: A size without a unit.
        ArgumentError: No stripes, no chunk size, or a device or offset that cannot be.

    Source: kernel admin-guide, striped.
    """

    type_name: ClassVar[str] = "striped"
    chunk_size: Sectors
    stripes: tuple[Stripe, ...]
    extra: tuple[str, ...] = ()

    def __init__(
        self, chunk_size: Size, stripes: Iterable[tuple[TargetDevice, Size]], *, extra: Iterable[str] = ()
    ) -> None:
        chunk_size = as_sectors(chunk_size, "chunk_size")
        if not 1 <= chunk_size.count <= U32_LIMIT:
            raise ArgumentError("chunk_size", chunk_size, f"must be 1..{U32_LIMIT} sectors")
        pairs = tuple(
            Stripe(check_device(device, f"stripes[{number}].device"), check_offset(offset, f"stripes[{number}].offset"))
            for number, (device, offset) in enumerate(stripes)
        )
        if not pairs:
            raise ArgumentError("stripes", pairs, "must have at least one")
        object.__setattr__(self, "chunk_size", chunk_size)
        object.__setattr__(self, "stripes", pairs)
        object.__setattr__(self, "extra", check_extra(extra))

    def length_problem(self, length: Sectors) -> str | None:
        """Return a complaint about a *length* that does not hold whole rows of chunks."""
        row = self.chunk_size * len(self.stripes)
        if length % row:
            return f"length must be a multiple of chunk size times stripes, {row.count} sectors"
        return None

    def _to_words(self) -> Iterable[object]:
        stripes = (word for stripe in self.stripes for word in (stripe.device, stripe.offset.count))
        return len(self.stripes), self.chunk_size.count, *stripes, *self.extra

    def _devices(self) -> tuple[TargetDevice, ...]:
        return tuple(stripe.device for stripe in self.stripes)

    def _with_devices(self, resolve: Callable[[TargetDevice], DeviceNumber]) -> Self:
        stripes = [(resolve(stripe.device), stripe.offset) for stripe in self.stripes]
        return type(self)(self.chunk_size, stripes, extra=self.extra)

    @classmethod
    def _from_words(cls, words: Words) -> Self:
        count = _stripe_count(words)
        chunk_size = words.sectors("chunk_size")
        stripes = [
            (words.device(f"stripes[{number}].device"), words.sectors(f"stripes[{number}].offset"))
            for number in range(count)
        ]
        return cls(chunk_size, stripes, extra=words.rest())

    @classmethod
    def _status_from_words(cls, words: Words) -> StripedStatus:
        count = _stripe_count(words)
        devices = tuple(words.device(f"devices[{number}]") for number in range(count))
        words.one_of("health_words", ("1",))
        health = words.word("health")
        if len(health) != count:
            raise words.bad("health", f"must be {count} letters, not {health!r}")
        return StripedStatus(words.line, words.rest(), devices=devices, health=health)


def _stripe_count(words: Words) -> int:
    """Return the number of stripes, which cannot be larger than the number of words that follow."""
    count = words.number("stripe_count", U32_LIMIT)
    if not 1 <= count <= len(words):
        raise words.bad("stripe_count", f"is {count}, but {len(words)} words follow")
    return count


@dataclass(frozen=True, slots=True, kw_only=True)
class StripedStatus(Status):
    """
    How the stripes are doing.

    Attributes:
        devices: The devices, in order.
        health: A letter for each: ``A`` alive, ``D`` had an I/O error since the table was loaded.
    """

    devices: tuple[TargetDevice, ...]
    health: str

    @property
    def failed_devices(self) -> tuple[TargetDevice, ...]:
        """The devices that are not alive."""
        return tuple(device for device, letter in zip(self.devices, self.health, strict=True) if letter != "A")
