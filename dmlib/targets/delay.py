# SPDX-License-Identifier: MIT
"""
The ``delay`` target: I/O that takes its time.

Parameters: ``<device> <offset> <delay> [<device> <offset> <delay> [<device> <offset> <delay>]]``, delays in
milliseconds: one for all I/O, or reads and the rest, or reads, writes and flushes.
Status: ``<reads> <writes> <flushes>`` that wait at the moment.
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
    check_number,
    check_offset,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dmlib.ids import DeviceNumber
    from dmlib.units import Sectors


class DelayedPath(NamedTuple):
    """
    Where one kind of I/O goes, and how late.

    Attributes:
        device: The device below.
        offset: Where the segment begins there.
        milliseconds: How long the I/O waits first.
    """

    device: TargetDevice
    offset: Sectors
    milliseconds: int


@dataclass(frozen=True, slots=True, init=False)
class Delay(Target):
    """
    Let I/O wait before it is sent on.

    Args:
        read: Path of reads; of all I/O, if it is the only one.
        write: Path of writes; of flushes too, if there is no third.
        flush: Path of flushes. Minimum delay: 1.2.
        extra: Words after these that dmlib does not know; for tables read from elsewhere.

    Raises:
        TypeError: An offset without a unit.
        ArgumentError: A device, an offset or a delay that cannot be; *flush* without *write*.

    Source: kernel admin-guide, delay.
    """

    type_name: ClassVar[str] = "delay"
    read: DelayedPath
    write: DelayedPath | None = None
    flush: DelayedPath | None = None
    extra: tuple[str, ...] = ()

    def __init__(
        self,
        read: DelayedPath,
        write: DelayedPath | None = None,
        flush: DelayedPath | None = None,
        *,
        extra: Iterable[str] = (),
    ) -> None:
        if flush is not None and write is None:
            raise ArgumentError("flush", flush, "needs a path of writes as well")
        object.__setattr__(self, "read", _checked(read, "read"))
        object.__setattr__(self, "write", None if write is None else _checked(write, "write"))
        object.__setattr__(self, "flush", None if flush is None else _checked(flush, "flush"))
        object.__setattr__(self, "extra", check_extra(extra))

    @property
    def paths(self) -> tuple[DelayedPath, ...]:
        """The paths that are given, in order."""
        return tuple(path for path in (self.read, self.write, self.flush) if path is not None)

    def _to_words(self) -> Iterable[object]:
        return (
            *(word for path in self.paths for word in (path.device, path.offset.count, path.milliseconds)),
            *self.extra,
        )

    def _devices(self) -> tuple[TargetDevice, ...]:
        return tuple(path.device for path in self.paths)

    def _with_devices(self, resolve: Callable[[TargetDevice], DeviceNumber]) -> Self:
        return type(self)(*(path._replace(device=resolve(path.device)) for path in self.paths), extra=self.extra)

    @classmethod
    def _from_words(cls, words: Words) -> Self:
        paths = [_read(words, "read")]
        paths += [_read(words, field) for field in ("write", "flush") if words]
        return cls(*paths, extra=words.rest())

    @classmethod
    def _status_from_words(cls, words: Words) -> DelayStatus:
        waiting = [words.number(field) for field in ("reads", "writes", "flushes")]
        return DelayStatus(words.line, words.rest(), reads=waiting[0], writes=waiting[1], flushes=waiting[2])


def _checked(path: DelayedPath, field: str) -> DelayedPath:
    device, offset, milliseconds = path
    return DelayedPath(
        check_device(device, f"{field}.device"),
        check_offset(offset, f"{field}.offset"),
        check_number(milliseconds, f"{field}.milliseconds", U32_LIMIT),
    )


def _read(words: Words, field: str) -> DelayedPath:
    device, offset = words.device(f"{field}.device"), words.sectors(f"{field}.offset")
    return DelayedPath(device, offset, words.number(f"{field}.milliseconds", U32_LIMIT))


@dataclass(frozen=True, slots=True, kw_only=True)
class DelayStatus(Status):
    """
    What waits at the moment.

    Attributes:
        reads: Reads.
        writes: Writes.
        flushes: Flushes.
    """

    reads: int
    writes: int
    flushes: int
