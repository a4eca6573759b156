# SPDX-License-Identifier: MIT
"""Packages that import their names when one is first used (PEP 562)."""

import sys

TYPE_CHECKING = False  # what typing's is to type checkers, without the cost of importing typing
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def importer(package: str, homes: "Mapping[str, str]") -> "Callable[[str], Any]":
    """
    Return a package's ``__getattr__``: it finds a name in its home, and leaves it in the package for the next time.

    Args:
        package: The package, by its full name.
        homes: For each name, the module below the package that has it.
    """

    def look_up(name: str) -> "Any":
        home = homes.get(name)
        if home is None:
            msg = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(msg)
        from importlib import import_module  # noqa: PLC0415 - only once something is used

        value = getattr(import_module(f"{package}.{home}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return look_up
