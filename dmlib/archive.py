# SPDX-License-Identifier: MIT
"""
What ``dmsetup table`` and ``dmsetup status`` print for many devices, read: from a running system or a support archive.

No root, no driver and no libdevmapper is needed for it.
"""

from __future__ import annotations

import re
from typing import Final, Generic, TypeVar

from dmlib.errors import ParseError
from dmlib.table import StatusSegment, Table, status_from_entries

_T = TypeVar("_T")

# A name may have blanks and colons in it; what follows it is a colon, a blank, and two numbers and a word.
_NAMED: Final = re.compile(r"(.*?): +(?=[0-9]+ +[0-9]+ +\S)")
_BARE: Final = re.compile(r"[0-9]+ +[0-9]+ +\S")
_NOTHING: Final = "No devices found"
_U64_DIGITS: Final = 20
_WORDS: Final = 3


class ByDevice(dict[str, _T], Generic[_T]):
    """
    What was read, by name of the device, in the order of the text; a text about one device has the name ``""``.

    Attributes:
        unread: Lines that are no line of a device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unread: tuple[str, ...] = ()


def parse_table(text: str, *, strict: bool = False) -> ByDevice[Table]:
    r"""
    Read what ``dmsetup table`` prints.

    >>> tables = parse_table("root: 0 2048 linear 8:1 0\nroot: 2048 2048 zero\nhome: 0 8 zero\n")
    >>> [(name, len(table)) for name, table in tables.items()]
    [('root', 2), ('home', 1)]

    Args:
        text: The lines, with the name of the device in front of each unless they are all about one.
        strict: Raise for what cannot be read, instead of keeping it raw or in ``unread``.

    Returns:
        The tables; a device without one has a table without segments, whose ``problem`` says so.

    Raises:
        ParseError: In strict mode.
    """
    lines = _lines_by_device(text, strict=strict)
    tables: ByDevice[Table] = ByDevice()
    tables.unread = lines.unread
    for name, own in lines.items():
        tables[name] = Table.parse("\n".join(own), strict=strict and bool(own))
    return tables


def parse_status(text: str, *, strict: bool = False) -> ByDevice[tuple[StatusSegment, ...]]:
    r"""
    Read what ``dmsetup status`` prints.

    >>> status = parse_status("pool: 0 2048 thin-pool 0 9/64 3/16 - rw discard_passdown queue_if_no_space - 1024\n")
    >>> str(status["pool"][0].status.free_data)
    '13 data blocks'

    Args:
        text: The lines, with the name of the device in front of each unless they are all about one.
        strict: Raise for what cannot be read, instead of keeping it raw or in ``unread``.

    Returns:
        The status of each device's segments.

    Raises:
        ParseError: In strict mode.
    """
    lines = _lines_by_device(text, strict=strict)
    status: ByDevice[tuple[StatusSegment, ...]] = ByDevice()
    status.unread = lines.unread
    for name, own in lines.items():
        status[name] = status_from_entries(map(_entry, own), strict=strict)
    return status


def _entry(line: str) -> tuple[int, int, str, str]:
    start, length, kind, *rest = line.split(None, _WORDS)
    return int(start), int(length), kind, rest[0] if rest else ""


def _lines_by_device(text: str, *, strict: bool) -> ByDevice[list[str]]:
    lines: ByDevice[list[str]] = ByDevice()
    unread = []
    for line in text.split("\n"):
        named = _NAMED.match(line)
        if named is not None and _fits(line[named.end() :]):
            lines.setdefault(named[1], []).append(line[named.end() :])
        elif _BARE.match(line) and _fits(line):
            lines.setdefault("", []).append(line)
        elif line.rstrip(" ").endswith(":"):  # a device without a table
            lines.setdefault(line.rstrip(" ")[:-1], [])
        elif line.strip() and line.strip() != _NOTHING:
            if strict:
                raise ParseError(line, "line", 0, "must be a name, a colon, and start, length, type and parameters")
            unread.append(line)
    lines.unread = tuple(unread)
    return lines


def _fits(line: str) -> bool:
    return all(len(word) <= _U64_DIGITS for word in line.split(None, _WORDS)[:2])
