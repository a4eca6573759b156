# SPDX-License-Identifier: MIT
"""
Tables: which target lies where in a mapped device.

A table is a row of segments from sector 0 without gaps. One that is built here has to be so; one that is
read from elsewhere is kept as it is, and says in ``problem`` what is wrong with it. Such a table can be
looked at and printed, but not loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from dmlib.errors import ArgumentError, ParseError
from dmlib.targets import parse_status, parse_target
from dmlib.targets._base import U64_LIMIT, Status, Target
from dmlib.units import Sectors, Size, as_sectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from dmlib.ids import DeviceNumber
    from dmlib.targets._base import TargetDevice

_LINE_WORDS: Final = 3
_U64_DIGITS: Final = 20


@dataclass(frozen=True, slots=True, init=False)
class Segment:
    """
    One target and where it lies; one line of a table.

    Args:
        start: Its first sector in the mapped device (512-byte sectors).
        length: Its size (512-byte sectors).
        target: What is mapped there.

    Raises:
        TypeError: A size without a unit.
    """

    start: Sectors
    length: Sectors
    target: Target

    def __init__(self, start: Size, length: Size, target: Target) -> None:
        if not isinstance(target, Target):
            msg = f"target must be a Target, not {target!r}"
            raise TypeError(msg)
        object.__setattr__(self, "start", as_sectors(start, "start"))
        object.__setattr__(self, "length", as_sectors(length, "length"))
        object.__setattr__(self, "target", target)

    @property
    def end(self) -> Sectors:
        """The first sector behind it."""
        return self.start + self.length

    def entry(self) -> tuple[int, int, str, str]:
        """Return ``(start, length, type, params)``, both sizes in sectors."""
        return self.start.count, self.length.count, self.target.type_name, self.target.params()

    def __str__(self) -> str:
        return _line(*self.entry())


@dataclass(frozen=True, slots=True, init=False)
class Table:
    """
    The segments of a mapped device, in order and without gaps. Immutable; equal when the segments are.

    >>> from dmlib.targets import Zero
    >>> from dmlib.units import MiB
    >>> print(Table.single(MiB(1), Zero()))
    0 2048 zero

    Args:
        segments: At least one, the first at sector 0, each one where the one before ends.

    Attributes:
        problem: What is wrong with a table that was read from elsewhere; ``None`` if nothing is.

    Raises:
        ArgumentError: A gap, an overlap, an empty segment or none at all, a target that has to be alone and is not,
            a length that a target cannot have. The segment is named.
    """

    segments: tuple[Segment, ...]
    problem: str | None = field(default=None, compare=False)

    def __init__(self, segments: Iterable[Segment]) -> None:
        segments = tuple(segments)
        found = _layout_problem(segments)
        if found is not None:
            number, rule = found
            if number is None:
                raise ArgumentError("segments", (), rule)
            raise ArgumentError(f"segments[{number}]", str(segments[number]), rule)
        object.__setattr__(self, "segments", segments)
        object.__setattr__(self, "problem", None)

    @classmethod
    def single(cls, length: Size, target: Target) -> Self:
        """
        Return a table of one segment.

        Args:
            length: Its size, and that of the device (512-byte sectors).
            target: What is mapped.

        Raises:
            ArgumentError: A length of 0, or one that the target cannot have.
        """
        return cls.concat([(length, target)])

    @classmethod
    def concat(cls, parts: Iterable[tuple[Size, Target]]) -> Self:
        """
        Return a table of *parts* laid end to end.

        Args:
            parts: Pairs of a length (512-byte sectors) and a target.

        Raises:
            ArgumentError: No parts, a length of 0, or see the class.
        """
        segments = []
        start = Sectors(0)
        for number, (length, target) in enumerate(parts):
            segment = Segment(start, as_sectors(length, f"parts[{number}].length"), target)
            segments.append(segment)
            start = segment.end
        return cls(segments)

    @classmethod
    def from_entries(cls, entries: Iterable[tuple[int, int, str, str]], *, strict: bool = False) -> Self:
        """
        Read a table as the ioctl layer returns it.

        Args:
            entries: ``(start, length, type, params)`` for each segment, both sizes in sectors.
            strict: Raise for parameters that break their target's grammar, and for an impossible layout.

        Returns:
            The table. Unless *strict*, parameters that cannot be read become a RawTarget with a ``problem``, and an
            impossible layout, which the kernel never shows, is kept with a ``problem`` of the table.

        Raises:
            ParseError: In strict mode.
        """
        return cls._read(
            [
                Segment(Sectors(start), Sectors(length), parse_target(type_name, params, strict=strict))
                for start, length, type_name, params in entries
            ],
            None,
            strict=strict,
        )

    @classmethod
    def parse(cls, text: str, *, strict: bool = False) -> Self:
        """
        Read a table as ``str(table)`` and ``dmsetup table`` print it for one device, a line for each segment.

        Args:
            text: The lines, without a device name in front; empty lines do not count.
            strict: Raise for whatever cannot be read, instead of keeping it or leaving it out.

        Returns:
            The table. Unless *strict*, it has a ``problem`` if a line had to be left out.

        Raises:
            ParseError: In strict mode.
        """
        segments = []
        problem = None
        for line in text.split("\n"):
            if not line.strip():
                continue
            try:
                segments.append(_parse_line(line, strict=strict))
            except ParseError as error:
                if strict:
                    raise
                problem = problem or f"left out: {error}"
        return cls._read(segments, problem, strict=strict)

    @classmethod
    def _read(cls, segments: Sequence[Segment], problem: str | None, *, strict: bool) -> Self:
        found = _layout_problem(segments)
        if found is not None:
            number, rule = found
            line = "" if number is None else str(segments[number])
            if strict:
                raise ParseError(line, "segments" if number is None else f"segments[{number}]", 0, rule)
            problem = problem or (rule if number is None else f"segments[{number}]: {rule}")
        self = object.__new__(cls)
        object.__setattr__(self, "segments", tuple(segments))
        object.__setattr__(self, "problem", problem)
        return self

    @property
    def length(self) -> Sectors:
        """The size of the device."""
        return self.segments[-1].end if self.segments else Sectors(0)

    @property
    def devices(self) -> tuple[TargetDevice, ...]:
        """The devices that the targets stand on, each once, in order; those of a RawTarget are not known."""
        return tuple(dict.fromkeys(device for segment in self.segments for device in segment.target.devices))

    def resolved(self, resolve: Callable[[TargetDevice], DeviceNumber]) -> Self:
        """
        Return the same table with each device replaced by its number, as the kernel prints it.

        Args:
            resolve: Finds the number of a path, such as :func:`dmlib.ids.device_number`.
        """
        segments = [Segment(part.start, part.length, part.target.resolved(resolve)) for part in self.segments]
        return self._read(segments, self.problem, strict=False)

    def entries(self) -> tuple[tuple[int, int, str, str], ...]:
        """
        Return ``(start, length, type, params)`` for each segment, sizes in sectors, for the ioctl layer.

        Raises:
            ArgumentError: The table was read from elsewhere and has a ``problem``; it must not be loaded.
        """
        if self.problem is not None:
            raise ArgumentError("table", str(self), f"cannot be loaded: {self.problem}")
        return tuple(segment.entry() for segment in self.segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, number: int) -> Segment:
        return self.segments[number]

    def __str__(self) -> str:
        return "\n".join(map(str, self.segments))


@dataclass(frozen=True, slots=True)
class StatusSegment:
    """
    The status of one segment.

    Attributes:
        start: Its first sector in the mapped device (512-byte sectors).
        length: Its size (512-byte sectors).
        type_name: The kernel's name of the target type.
        status: What the target reports.
    """

    start: Sectors
    length: Sectors
    type_name: str
    status: Status

    def __str__(self) -> str:
        return _line(self.start.count, self.length.count, self.type_name, self.status.raw)


def status_from_entries(
    entries: Iterable[tuple[int, int, str, str]], *, strict: bool = False
) -> tuple[StatusSegment, ...]:
    """
    Read the status of a device as the ioctl layer returns it.

    Args:
        entries: ``(start, length, type, status)`` for each segment, both sizes in sectors.
        strict: Raise for a status that breaks its target's grammar, instead of keeping it as RawStatus.

    Raises:
        ParseError: In strict mode.
    """
    return tuple(
        StatusSegment(Sectors(start), Sectors(length), type_name, parse_status(type_name, params, strict=strict))
        for start, length, type_name, params in entries
    )


def _line(start: int, length: int, type_name: str, rest: str) -> str:
    return f"{start} {length} {type_name} {rest}".rstrip()


def _parse_line(line: str, *, strict: bool) -> Segment:
    words = line.split(None, _LINE_WORDS)
    if len(words) < _LINE_WORDS:
        raise ParseError(line, "segment", len(words), "must be start, length, type and parameters")
    sizes = []
    for position, name in enumerate(("start", "length")):
        word = words[position]
        if not (word.isdecimal() and word.isascii() and len(word) <= _U64_DIGITS):
            raise ParseError(line, name, position, f"must be a whole number of sectors, not {word!r}")
        sizes.append(Sectors(int(word)))
    params = words[_LINE_WORDS] if len(words) > _LINE_WORDS else ""
    return Segment(sizes[0], sizes[1], parse_target(words[2], params, strict=strict))


def _layout_problem(segments: Sequence[Segment]) -> tuple[int | None, str] | None:
    """Return the first segment that is not where or what it has to be, and the rule that it breaks."""
    if not segments:
        return None, "must be at least one"
    end = Sectors(0)
    for number, segment in enumerate(segments):
        rule = _segment_problem(segment, end, alone=len(segments) == 1)
        if rule is not None:
            return number, rule
        end = segment.end
    return None


def _segment_problem(segment: Segment, expected: Sectors, *, alone: bool) -> str | None:
    if segment.start != expected:
        if not expected:
            return "the first segment must start at sector 0"
        kind = "a gap" if segment.start > expected else "an overlap"
        return f"{kind}: must start at sector {expected.count}, where the segment before it ends"
    if not segment.length:
        return "length must not be 0"
    if segment.end.count > U64_LIMIT:
        return "must end within 64 bits"
    if segment.target.singleton and not alone:
        return f"a {segment.target.type_name} target must be alone in its table"
    return segment.target.length_problem(segment.length)
