# SPDX-License-Identifier: MIT
"""The sample project as an outsider has it: dmlib from a wheel, in an environment of its own, as an ordinary user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
NOBODY = 65534


@pytest.fixture
def folder():
    made = Path(tempfile.mkdtemp(prefix="dmlib-s-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def python_of_an_ordinary_user(user):
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            code = "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))"
            if subprocess.run([python, "-c", code], check=False, **user).returncode == 0:
                return python
        except OSError:
            continue
    pytest.fail("no Python here that an ordinary user may run")


def test_sample_project(folder):
    """Its tests run, those for a kernel in a guest, and all pass; nothing is skipped."""
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    quiet = ["--quiet", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "wheel", *quiet, "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
    subprocess.run([*pip, str(TREE)], check=True, stderr=subprocess.DEVNULL)
    (wheel,) = folder.glob("dmlib_linux-*.whl")
    venv = folder / "venv"
    subprocess.run([python_of_an_ordinary_user(user), "-m", "venv", str(venv)], check=True)
    subprocess.run([venv / "bin/pip", "install", *quiet, f"{wheel}[testing]"], check=True, stderr=subprocess.DEVNULL)
    project = folder / "project"
    shutil.copytree(TREE / "examples/sample-project", project, ignore=shutil.ignore_patterns("__pycache__"))
    temporary = folder / "t"
    temporary.mkdir(mode=0o777)
    temporary.chmod(0o777)
    done = subprocess.run(
        [venv / "bin/python", "-B", "-m", "pytest", "-p", "no:cacheprovider", "--dm-run=uml", "--dm-strict", "-v"],
        cwd=project, env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "TMPDIR": str(temporary)},
        capture_output=True, text=True, check=False, timeout=120, **user,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed in" in done.stdout
    assert "dmlib-linux-" in done.stdout  # the plugin came by its entry point
