# SPDX-License-Identifier: MIT
"""What a pytest in a guest tells the one outside: one line of JSON for each thing that happens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Literal

Event = Literal["collected", "start", "report", "finish", "warning", "error", "done"]

GUEST_MARK: Final = "DMLIB_TESTING_GUEST"
"""Environment variable of a pytest that is the inner one."""

DESCRIPTOR: Final = 3
"""Where the inner one writes its lines: what else is printed must not get among them."""


@dataclass(frozen=True, slots=True)
class Line:
    """
    One line.

    Attributes:
        event: What happened.
        data: What belongs to it: ids, a serialised report, a text.
    """

    event: Event
    data: Any

    def encode(self) -> bytes:
        """Return the line as it is written."""
        return json.dumps([self.event, self.data]).encode() + b"\n"

    @classmethod
    def decode(cls, text: bytes) -> Line | None:
        """Return what a line says; ``None`` for one that is not of this protocol, or was cut off."""
        try:
            event, data = json.loads(text)
        except ValueError:
            return None
        return cls(event, data)


@dataclass(frozen=True, slots=True)
class Orders:
    """
    What the outer pytest wants of the inner one.

    Attributes:
        items: Node ids of the tests to run, in order.
        options: Values of all options that both may share.
    """

    items: list[str]
    options: dict[str, Any]

    def write(self, path: str) -> None:
        """Write them to a new file."""
        with open(path, "x", encoding="utf-8") as file:
            json.dump([self.items, self.options], file)

    @classmethod
    def read(cls, path: str) -> Orders:
        """Read what :meth:`write` wrote."""
        with open(path, encoding="utf-8") as file:
            return cls(*json.load(file))


def as_plain(value: object) -> bool:
    """Return whether JSON gives a value back as it was."""
    if isinstance(value, list):
        return all(as_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool)
