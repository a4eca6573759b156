# SPDX-License-Identifier: MIT
"""
What all target families share: the two base classes, the reader of words, the checks.

A line of the kernel is words between white space. A family says once how its words become fields
(``_from_words``) and once how fields become words (``_to_words``); who reads leniently and who strictly
is decided by the registry, not here: everything in this package complains by raising ParseError.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final, Self, TypeAlias

from dmlib.errors import ArgumentError, ParseError
from dmlib.ids import DeviceNumber
from dmlib.units import Sectors, Size, as_sectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

TargetDevice: TypeAlias = DeviceNumber | str
"""
A block device inside a target.

The kernel always prints numbers; a path is what people write, and is kept as it is.
"""

U32_LIMIT: Final = (1 << 32) - 1
U64_LIMIT: Final = (1 << 64) - 1
_MAJOR_LIMIT: Final = (1 << 12) - 1
_MINOR_LIMIT: Final = (1 << 20) - 1
_U64_DIGITS: Final = 20
_DEVICE_RULE: Final = "must be a DeviceNumber, or a path of one word"


class Words:
    """
    The words of one line, read from left to right; each complaint names the word.

    Args:
        line: The text as the kernel printed it.
    """

    __slots__ = ("_fields", "_words", "line")

    def __init__(self, line: str) -> None:
        self.line = line
        self._words = line.split()
        self._fields: list[str] = []

    def __len__(self) -> int:
        """Return how many words are left."""
        return len(self._words) - len(self._fields)

    def word(self, field: str) -> str:
        """Return the next word, which is the value of *field*."""
        position = len(self._fields)
        self._fields.append(field)
        try:
            return self._words[position]
        except IndexError:
            raise self.bad(field, "is missing") from None

    def number(self, field: str, limit: int = U64_LIMIT) -> int:
        """Return the next word as a whole number, 0..*limit*."""
        return self.as_number(self.word(field), field, limit)

    def as_number(self, text: str, field: str, limit: int = U64_LIMIT) -> int:
        """Return a part of the word just read as a whole number, 0..*limit*."""
        if text.isdecimal() and text.isascii() and len(text) <= _U64_DIGITS:
            number = int(text)
            if number <= limit:
                return number
        raise self.bad(field, f"must be a whole number 0..{limit}, not {text!r}")

    def number_or_dash(self, field: str) -> int | None:
        """Return the next word as a whole number, or ``None`` for the kernel's ``-``."""
        text = self.word(field)
        return None if text == "-" else self.as_number(text, field)

    def pair(self, field: str) -> tuple[int, int]:
        """Return the next word, ``used/total``, as two numbers."""
        used, slash, total = self.word(field).partition("/")
        if not slash:
            raise self.bad(field, f"must be used/total, not {used!r}")
        return self.as_number(used, field), self.as_number(total, field)

    def sectors(self, field: str) -> Sectors:
        """Return the next word as a number of sectors."""
        return Sectors(self.number(field))

    def device(self, field: str) -> TargetDevice:
        """Return the next word as a device: a number if it is one, else the path."""
        return device_from_word(self.word(field))

    def one_of(self, field: str, choices: Iterable[str]) -> str:
        """Return the next word, which has to be one of *choices*."""
        text = self.word(field)
        if text not in choices:
            raise self.bad(field, f"must be {' or '.join(choices)}, not {text!r}")
        return text

    def rest(self) -> tuple[str, ...]:
        """Return the words that nobody has asked for."""
        return tuple(self._words[len(self._fields) :])

    def bad(self, field: str, problem: str) -> ParseError:
        """Return the complaint about *field*, at the place where it was read (else at the last word)."""
        known = field in self._fields
        position = self._fields.index(field) if known else max(len(self._fields) - 1, 0)
        return ParseError(self.line, field, position, problem)


def device_from_word(word: str) -> TargetDevice:
    """Return a word of a table as a device number if it is one, else as the path it must be."""
    major, colon, minor = word.partition(":")
    if colon and major.isdecimal() and minor.isdecimal() and word.isascii() and len(word) <= _U64_DIGITS:
        number = DeviceNumber(int(major), int(minor))
        if number.major <= _MAJOR_LIMIT and number.minor <= _MINOR_LIMIT:
            return number
    return word


def check_device(device: TargetDevice, field: str) -> TargetDevice:
    """
    Return *device* as a target keeps it.

    Raises:
        TypeError: Neither a number nor a path.
        ArgumentError: A number out of range, or a path that is not one word.
    """
    if isinstance(device, DeviceNumber):
        if not (0 <= device.major <= _MAJOR_LIMIT and 0 <= device.minor <= _MINOR_LIMIT):
            raise ArgumentError(field, device, f"must be 0..{_MAJOR_LIMIT}:0..{_MINOR_LIMIT}")
        return device
    if not isinstance(device, str):
        msg = f"{field}={device!r}: {_DEVICE_RULE} (dmlib.ids.device_number() finds the number)"
        raise TypeError(msg)
    return device_from_word(check_word(device, field, _DEVICE_RULE))


def check_word(word: str, field: str, rule: str = "must be one word, without white space or NUL") -> str:
    """Return *word* if it stays one word in a table."""
    if word.split() != [word] or "\0" in word:
        raise ArgumentError(field, word, rule)
    return word


def check_number(number: int, field: str, limit: int) -> int:
    """Return a number of a table, 0..*limit*."""
    if type(number) is not int or not 0 <= number <= limit:
        raise ArgumentError(field, number, f"must be a whole number 0..{limit}")
    return number


def check_extra(words: Iterable[str], field: str = "extra") -> tuple[str, ...]:
    """Return words that this version of dmlib does not know, each checked to be one word."""
    return tuple(check_word(word, field) for word in words) if words else ()


def check_offset(offset: Size, field: str) -> Sectors:
    """Return an offset into a device as the kernel keeps it, in 64 bits."""
    sectors = as_sectors(offset, field)
    if sectors.count > U64_LIMIT:
        raise ArgumentError(field, sectors, "must fit 64 bits")
    return sectors


class Target:
    """
    One kind of mapping with its parameters; where in a device it lies is the segment's business.

    Targets are immutable values: two are equal when the kernel would be told the same.

    Attributes:
        singleton: The kernel wants this target alone in its table.
    """

    __slots__ = ()
    singleton: ClassVar[bool] = False

    @property
    def type_name(self) -> str:
        """The kernel's name of the target type."""
        raise NotImplementedError

    @property
    def devices(self) -> tuple[TargetDevice, ...]:
        """The devices below, in the order of the parameters."""
        return self._devices()

    def params(self) -> str:
        """Return the parameters as the kernel takes them, and as it prints them, without a space at the end."""
        return " ".join(map(str, self._to_words()))

    def resolved(self, resolve: Callable[[TargetDevice], DeviceNumber]) -> Self:
        """
        Return the same target with each device replaced by its number.

        Args:
            resolve: Finds the number of a path, such as :func:`dmlib.ids.device_number`. It is called for numbers
                too.
        """
        return self._with_devices(resolve)

    def length_problem(self, length: Sectors) -> str | None:
        """Return what the kernel would not like about a segment of this *length*; ``None`` if it will do."""
        del length
        return None

    @classmethod
    def from_params(cls, text: str) -> Self:
        """
        Read parameters, as :meth:`params` or the kernel prints them.

        Raises:
            ParseError: They break the target's grammar or limits.
        """
        words = Words(text)
        try:
            return cls._from_words(words)
        except ArgumentError as error:
            raise words.bad(error.field, error.rule) from error

    @classmethod
    def parse_status(cls, text: str) -> Status:
        """
        Read what the kernel prints as this target's status.

        Raises:
            ParseError: It breaks the target's grammar.
        """
        return cls._status_from_words(Words(text))

    # What a family says about itself; the last three have an answer that suits most.

    def _to_words(self) -> Iterable[object]:
        raise NotImplementedError

    @classmethod
    def _from_words(cls, words: Words) -> Self:
        raise NotImplementedError

    def _devices(self) -> tuple[TargetDevice, ...]:
        return ()

    def _with_devices(self, resolve: Callable[[TargetDevice], DeviceNumber]) -> Self:
        del resolve
        return self

    @classmethod
    def _status_from_words(cls, words: Words) -> Status:
        return EmptyStatus(words.line, words.rest())


@dataclass(frozen=True, slots=True, init=False)
class RawTarget(Target):
    """
    A target that dmlib has no class for, or whose parameters it could not read.

    Nothing is checked here: the kernel is the judge of what it knows and dmlib does not.

    Args:
        type_name: The kernel's name of the target type.
        text: The parameters; white space around them is dropped, as the kernel does.
        problem: Why the parameters of a known type could not be read.
    """

    type_name: str
    text: str = ""
    problem: str | None = field(default=None, compare=False)

    def __init__(self, type_name: str, text: str = "", problem: str | None = None) -> None:
        object.__setattr__(self, "type_name", type_name)
        object.__setattr__(self, "text", text.strip())
        object.__setattr__(self, "problem", problem)

    def _to_words(self) -> Iterable[object]:
        return (self.text,)


@dataclass(frozen=True, slots=True)
class Status:
    """
    What a target reports about itself; the subclass tells which state it is in.

    Attributes:
        raw: The kernel's own text.
        extra: Words at its end that this version of dmlib does not know.
    """

    raw: str = field(compare=False)
    extra: tuple[str, ...] = ()


class EmptyStatus(Status):
    """The target has nothing to report, and never does (linear, zero, error)."""

    __slots__ = ()


class StatusUnavailable(Status):
    """``Error``: the kernel could not read the figures it wanted to report."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class RawStatus(Status):
    """
    The status of a target that dmlib has no class for, or that it could not read.

    Attributes:
        type_name: The kernel's name of the target type.
        raw: The kernel's own text.
        problem: Why the status of a known type could not be read.
    """

    raw: str
    type_name: str = field(kw_only=True)
    problem: str | None = field(default=None, compare=False, kw_only=True)
