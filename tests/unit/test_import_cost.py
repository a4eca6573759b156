# SPDX-License-Identifier: MIT
"""What importing costs: nothing that is not used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dmlib

ROOT = Path(dmlib.__file__).parent.parent

# -S: no site-packages, so neither cffi nor anything else that is installed; -I: nothing of the surroundings.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
exec(sys.argv[2])
new = sorted(set(sys.modules) - before)
import json
print(json.dumps(new))
"""


def loaded_by(code):
    """Return what a bare interpreter loads for *code*, beyond what it has anyway."""
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PROGRAM, str(ROOT), code], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout))


def ours(modules):
    return {name for name in modules if name.split(".")[0] == "dmlib"}


def test_the_package_loads_nothing():
    """Importing dmlib loads what finds its names later, and nothing of the standard library."""
    assert loaded_by("import dmlib") == {"dmlib", "dmlib._lazy"}


def test_listing_the_names_loads_nothing():
    """Completion in a shell does not pull in the library."""
    assert loaded_by("import dmlib; dir(dmlib); dmlib.__all__; hasattr(dmlib, 'nothing')") == {"dmlib", "dmlib._lazy"}


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("from dmlib import KiB", {"errors", "units"}),
        ("from dmlib import ArgumentError", {"errors"}),
        ("from dmlib import Linear", {"errors", "units", "ids", "targets", "targets._base", "targets.linear"}),
        ("import dmlib.targets", {"errors", "targets"}),
        (
            "from dmlib import Table; Table.parse('0 8 linear 8:0 0\\n8 8 zero')",
            {"errors", "units", "ids", "targets", "targets._base", "targets.linear", "targets.simple", "table"},
        ),
        (
            "from dmlib.targets import parse_status; parse_status('mirror', 'x')",
            {"errors", "units", "ids", "targets", "targets._base"},
        ),
        (
            "from dmlib.targets import parse_status; parse_status('thin-pool', 'Fail').raw",
            {"errors", "units", "ids", "targets", "targets._base", "targets.thin", "targets.thin_pool"},
        ),
    ],
)
def test_a_name_loads_its_room_only(code, modules):
    """Using a name loads the room that it lives in and what that stands on, without cffi or the extension."""
    loaded = loaded_by(code)
    assert ours(loaded) == {"dmlib", "dmlib._lazy", *(f"dmlib.{name}" for name in modules)}
    assert not {name for name in loaded if name.split(".")[0] in {"cffi", "_cffi_backend", "asyncio", "sqlite3"}}


def test_vocabulary_needs_no_dataclasses():
    """Sizes, ids and errors are made without the cost of dataclasses."""
    assert "dataclasses" not in loaded_by("import dmlib.units, dmlib.ids, dmlib.errors")
