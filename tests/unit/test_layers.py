# SPDX-License-Identifier: MIT
"""
The house: which room may import which.

The rule. The rooms of dmlib stand in floors, listed here from the ground up. A module imports dmlib modules of lower
floors only, wherever in the module the import stands, also under TYPE_CHECKING: an import between two modules of
one floor, or upwards, means that a room is missing or that two are one. The pure rooms import nothing but pure rooms,
so that text is parsed and printed where neither libdevmapper nor the compiled extension is. ``_ffi`` alone
imports the extension. ``dmlib.testing`` runs other programs in guests and stands apart: it imports nothing of dmlib
but itself, except for what runs inside of tests. Only it and the command line print.

A new module gets its line in FLOORS with the commit that brings it.
"""

import ast
from pathlib import Path

import pytest

import dmlib

ROOT = Path(dmlib.__file__).parent

FLOORS = (
    {"errors", "_lazy"},
    {"units", "ids"},
    {"owners"},
    {"targets._base"},
    {
        *("targets.linear", "targets.striped", "targets.simple", "targets.thin"),
        *("targets.delay", "targets.dust", "targets.flakey", "targets.log_writes"),
    },
    {"targets.thin_pool"},
    {"targets"},
    {"table"},
    {"archive"},
    {"_kmsg", "_control", "_loopctl", "_undo", "sysfs"},
    {"usage"},
    {"_ffi"},
    {"operations", "results"},
    {"events", "_answers"},
    {"udev"},
    {"task"},
    {"section", "driver", "_asking", "_guard"},
    {"blockdev"},
    {"loop"},
    {"device", "aio"},
    {"tree"},
    {"_active", "_quiesce"},
    {"_pool"},
    {"_pool_life"},
    {"thin"},
)
PURE = {"errors", "_lazy", "units", "ids", "owners", "table", "archive"}
PRINTERS = ("testing", "cli", "__main__")
USERS = {"testing.fixtures", "testing.world"}  # run where there is a device mapper
LAZY = {"_lazy"}  # imports by name, on first use


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def home_of(dotted):
    """Return the dmlib module that a dotted name below ``dmlib`` lies in; "" for the package itself."""
    if dotted == "_dm" or dotted.startswith("_dm."):
        return "_dm"
    while dotted and dotted not in MODULES:
        head, _, last = dotted.rpartition(".")
        if not head and last in dmlib._HOMES:
            return dmlib._HOMES[last]
        dotted = head
    return dotted


def imports(name):
    """Yield each dmlib module that the module imports, as often as it does."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (home_of(x.removeprefix("dmlib").removeprefix(".")) for x in names if x.split(".")[0] == "dmlib")


def floor(name):
    return next((number for number, rooms in enumerate(FLOORS) if name in rooms), None)


HOUSE = [name for name in MODULES if name != "" and name.split(".")[0] != "testing"]


def test_modules_are_found():
    """The walk sees the modules, and the imports in them."""
    assert {"", "errors", "targets", "targets._base", "table"} <= set(MODULES)
    assert set(imports("table")) >= {"errors", "units", "targets", "targets._base", "ids"}
    assert home_of("Sectors") == "units"
    assert home_of("targets.Linear") == "targets"
    assert home_of("__version__") == ""


@pytest.mark.parametrize("name", HOUSE)
def test_imports_point_down(name):
    """A module imports from lower floors only."""
    here = floor(name)
    assert here is not None, f"dmlib.{name} has no floor: add it to FLOORS"
    for other in imports(name):
        if other in {"", "_dm"}:
            continue
        there = floor(other)
        assert there is not None, f"dmlib.{name} imports dmlib.{other}, which has no floor"
        assert there < here, f"dmlib.{name} (floor {here}) imports dmlib.{other} (floor {there})"


def is_pure(name):
    return name in PURE or name.split(".")[0] == "targets"


@pytest.mark.parametrize("name", [name for name in HOUSE if is_pure(name)])
def test_pure_rooms(name):
    """The pure rooms import pure rooms, and neither the package's lazy names nor C."""
    assert [other for other in imports(name) if not is_pure(other)] == []


@pytest.mark.parametrize("name", MODULES)
def test_one_door_to_c(name):
    """Nobody but _ffi imports the compiled extension."""
    assert ("_dm" in set(imports(name))) == (name == "_ffi")


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] == "testing"])
def test_testing_stands_apart(name):
    """The runner of guests needs nothing of the library; what runs inside of tests uses its public names."""
    allowed = {""} if name in USERS else set()
    assert {other for other in imports(name) if other.split(".")[0] != "testing"} <= allowed


@pytest.mark.parametrize("name", MODULES)
def test_calls(name):
    """Only the command line and the runner print; only what serves the lazy packages imports by a computed name."""
    called = {
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    }
    if name.split(".")[0] not in PRINTERS:
        assert "print" not in called
    if name not in LAZY:
        assert not called & {"import_module", "__import__"}


@pytest.mark.parametrize("name", MODULES)
def test_licence_line(name):
    """Each file says its licence in the first line."""
    assert MODULES[name].read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: MIT\n")
