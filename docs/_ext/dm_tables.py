# SPDX-License-Identifier: MIT
"""Directives that write tables of the reference from dmlib.operations, so that they say what the code does."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

from dmlib.operations import FLOOR, GETTERS, INPUTS, RULES, Operation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sphinx.application import Sphinx


def _version(numbers: Sequence[int], floor: Sequence[int]) -> str:
    if tuple(numbers) <= tuple(floor):
        return ""
    return ".".join(map(str, numbers)) if len(numbers) == len((4, 0)) else "{}.{:02}.{}".format(*numbers)


def _names(operations: Iterable[Operation]) -> str:
    return ", ".join(operation.value for operation in Operation if operation in operations)


def _operations() -> Iterator[Sequence[str]]:
    yield "Operation", "What it does", "libdevmapper", "ioctl", "driver"
    for operation, rules in RULES.items():
        yield operation.value, rules.does, rules.c_type, rules.ioctl, _version(rules.driver, (4, 0))


def _inputs() -> Iterator[Sequence[str]]:
    yield "Input", "What it does", "Operations", "libdevmapper", "driver", "library"
    for name, entry in INPUTS.items():
        versions = _version(entry.driver, (4, 0)), _version(entry.library, FLOOR)
        yield name, entry.means, _names(entry.on), entry.setter, *versions


def _getters() -> Iterator[Sequence[str]]:
    yield "Field", "What it holds", "Operations", "libdevmapper"
    for name, entry in GETTERS.items():
        of = "all on a device" if len(entry.of) > len(RULES) // 2 else _names(entry.of)
        yield name, entry.holds, of, entry.getter


class DmTable(Directive):
    """``.. dm-table:: operations`` (or ``inputs``, ``getters``)."""

    required_arguments = 1
    kinds: ClassVar = {"operations": _operations, "inputs": _inputs, "getters": _getters}

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        lines = [".. list-table::", "   :header-rows: 1", ""]
        for row in self.kinds[self.arguments[0]]():
            lines += [f"   {'* -' if not number else '  -'} {text}" for number, text in enumerate(row)]
        parent = nodes.container()
        self.state.nested_parse(StringList(lines, source="dmlib.operations"), self.content_offset, parent)
        return parent.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("dm-table", DmTable)
    return {"parallel_read_safe": True}
