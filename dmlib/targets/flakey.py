# SPDX-License-Identifier: MIT
"""
The ``flakey`` target: a device that is good for a while and bad for a while, in turn.

Parameters: ``<device> <offset> <up interval> <down interval> [<count> <feature words>...]``, intervals in seconds.
Status: empty.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final, Literal, NamedTuple, Self

from dmlib.errors import ArgumentError
from dmlib.targets._base import (
    U32_LIMIT,
    Target,
    TargetDevice,
    Words,
    check_device,
    check_extra,
    check_number,
    check_offset,
)
from dmlib.units import Sectors, Size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dmlib.ids import DeviceNumber

_START: Final = Sectors(0)
_BYTE: Final = 255
_PROBABILITY: Final = 1_000_000_000


class CorruptByte(NamedTuple):
    """
    One byte of each request that is changed while the device is bad.

    Attributes:
        nth: Which byte of the request, counted from 1.
        direction: ``"r"`` for what is read, ``"w"`` for what is written.
        value: What it becomes, 0..255.
        flags: Change only requests that have all these bits of the kernel's flags; 0 for every request.
    """

    nth: int
    direction: Literal["r", "w"]
    value: int
    flags: int = 0


@dataclass(frozen=True, slots=True, init=False)
class Flakey(Target):
    """
    Serve I/O for some seconds, misbehave for some, and so on. Without any feature, everything fails while it is bad.

    Args:
        device: The device below.
        offset: Where the segment begins there.
        up: Seconds for which it is good.
        down: Seconds for which it is bad; one of the two must be more than 0.
        drop_writes: While it is bad, writes vanish without an error, and reads work.
        error_writes: While it is bad, writes fail, and reads work.
        error_reads: While it is bad, reads fail. Minimum flakey: 1.5.
        corrupt_byte: While it is bad, this byte is changed, and nothing fails. (Linux 6.1 changes writes alone.)
        random_read_corrupt: While it is bad, a random byte of a read is changed, in so many of 1,000,000,000 requests.
            Minimum flakey: 1.5 (Linux 6.5).
        random_write_corrupt: The same for writes.
        extra_features: Further feature words; for tables read from elsewhere.
        extra: Words after the features; for tables read from elsewhere.

    Raises:
        TypeError: An offset without a unit.
        ArgumentError: Numbers or features that cannot be, or exclude each other.

    Source: kernel admin-guide, flakey.
    """

    type_name: ClassVar[str] = "flakey"
    device: TargetDevice
    offset: Sectors
    up: int
    down: int
    drop_writes: bool = False
    error_writes: bool = False
    error_reads: bool = False
    corrupt_byte: CorruptByte | None = None
    random_read_corrupt: int = 0
    random_write_corrupt: int = 0
    extra_features: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    def __init__(
        self,
        device: TargetDevice,
        offset: Size = _START,
        *,
        up: int,
        down: int,
        drop_writes: bool = False,
        error_writes: bool = False,
        error_reads: bool = False,
        corrupt_byte: CorruptByte | None = None,
        random_read_corrupt: int = 0,
        random_write_corrupt: int = 0,
        extra_features: Iterable[str] = (),
        extra: Iterable[str] = (),
    ) -> None:
        fields = {
            "device": check_device(device, "device"),
            "offset": check_offset(offset, "offset"),
            "up": check_number(up, "up", U32_LIMIT),
            "down": check_number(down, "down", U32_LIMIT),
            "drop_writes": drop_writes,
            "error_writes": error_writes,
            "error_reads": error_reads,
            "corrupt_byte": None if corrupt_byte is None else _checked(corrupt_byte),
            "random_read_corrupt": check_number(random_read_corrupt, "random_read_corrupt", _PROBABILITY),
            "random_write_corrupt": check_number(random_write_corrupt, "random_write_corrupt", _PROBABILITY),
            "extra_features": check_extra(extra_features, "extra_features"),
            "extra": check_extra(extra),
        }
        if not up + down or up + down > U32_LIMIT:
            raise ArgumentError("down", down, f"must make 1..{U32_LIMIT} seconds together with up, which is {up}")
        if drop_writes and error_writes:
            raise ArgumentError("error_writes", error_writes, "excludes drop_writes")
        if (drop_writes or error_writes) and corrupt_byte is not None and corrupt_byte.direction == "w":
            raise ArgumentError("corrupt_byte", corrupt_byte, "must be of reads where writes are dropped or fail")
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def features(self) -> tuple[str, ...]:
        """The feature words, in the kernel's order."""
        switches = ("error_reads", "drop_writes", "error_writes")
        words = [name for name in switches if getattr(self, name)]
        if self.corrupt_byte is not None:
            words += ["corrupt_bio_byte", *map(str, self.corrupt_byte)]
        for name in ("random_read_corrupt", "random_write_corrupt"):
            if getattr(self, name):
                words += [name, str(getattr(self, name))]
        return (*words, *self.extra_features)

    def _to_words(self) -> Iterable[object]:
        features = self.features
        return self.device, self.offset.count, self.up, self.down, len(features), *features, *self.extra

    def _devices(self) -> tuple[TargetDevice, ...]:
        return (self.device,)

    def _with_devices(self, resolve: Callable[[TargetDevice], DeviceNumber]) -> Self:
        return replace(self, device=resolve(self.device))

    @classmethod
    def _from_words(cls, words: Words) -> Self:
        device, offset = words.device("device"), words.sectors("offset")
        up, down = words.number("up", U32_LIMIT), words.number("down", U32_LIMIT)
        features = _Features()
        if words:
            features.read(words, words.number("feature_count", U32_LIMIT))
        return cls(
            device,
            offset,
            up=up,
            down=down,
            drop_writes="drop_writes" in features.switches,
            error_writes="error_writes" in features.switches,
            error_reads="error_reads" in features.switches,
            corrupt_byte=features.corrupt_byte,
            random_read_corrupt=features.numbers.get("random_read_corrupt", 0),
            random_write_corrupt=features.numbers.get("random_write_corrupt", 0),
            extra_features=features.unknown,
            extra=words.rest(),
        )


def _checked(byte: CorruptByte) -> CorruptByte:
    nth, direction, value, flags = byte
    if direction not in ("r", "w"):
        raise ArgumentError("corrupt_byte", direction, "must be of reads (r) or writes (w)")
    if not check_number(nth, "corrupt_byte.nth", U32_LIMIT):
        raise ArgumentError("corrupt_byte", nth, "must be a byte counted from 1")
    check_number(value, "corrupt_byte.value", _BYTE)
    check_number(flags, "corrupt_byte.flags", U32_LIMIT)
    return CorruptByte(*byte)


class _Features:
    """The feature words of a line, taken apart."""

    def __init__(self) -> None:
        self.switches: set[str] = set()
        self.numbers: dict[str, int] = {}
        self.corrupt_byte: CorruptByte | None = None
        self.unknown: tuple[str, ...] = ()

    def read(self, words: Words, count: int) -> None:
        if count > len(words):
            raise words.bad("feature_count", f"is {count}, but {len(words)} words follow")
        end = len(words) - count
        while len(words) > end:
            match words.word("feature"):
                case "drop_writes" | "error_writes" | "error_reads" as name:
                    self.switches.add(name)
                case "random_read_corrupt" | "random_write_corrupt" as name:
                    self.numbers[name] = words.number(name, _PROBABILITY)
                case "corrupt_bio_byte":
                    nth = words.number("corrupt_byte.nth", U32_LIMIT)
                    direction = words.one_of("corrupt_byte.direction", ("r", "w"))
                    value = words.number("corrupt_byte.value", _BYTE)
                    flags = words.number("corrupt_byte.flags", U32_LIMIT)
                    self.corrupt_byte = CorruptByte(nth, "r" if direction == "r" else "w", value, flags)
                case name:
                    self.unknown = (*self.unknown, name)
        if len(words) < end:
            raise words.bad("feature_count", "ends in the middle of a feature")
