# SPDX-License-Identifier: MIT
"""Building the extension: what is missing is said in one sentence, and the shim compiles without a warning."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dmlib

ROOT = Path(dmlib.__file__).parent.parent


@pytest.fixture
def checkout(tmp_path):
    """What the build reads, where it may write."""
    folder = tmp_path / "checkout"
    (folder / "dmlib").mkdir(parents=True)
    shutil.copy(ROOT / "_build_dm.py", folder)
    shutil.copy(ROOT / "dmlib" / "__init__.py", folder / "dmlib")
    return folder


def build(folder, **env):
    env = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    return subprocess.run(
        [sys.executable, "_build_dm.py"], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def tools(tmp_path):
    """A PATH with the programs that are named, and nothing else."""

    def make(*names):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in names:
            found = shutil.which(name)
            assert found, name
            (folder / name).symlink_to(found)
        return str(folder)

    return make


def check_refused(done, problem):
    """One sentence with the problem and the packages of both families, and nothing else."""
    assert done.returncode not in (0, None)
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("dmlib cannot be built: ")
    assert problem in done.stderr
    for package in ("apt install gcc pkg-config libdevmapper-dev", "dnf install gcc pkgconf device-mapper-devel"):
        assert package in done.stderr


def test_without_a_compiler(checkout, tools):
    """A machine without a C compiler is told which packages to install."""
    check_refused(build(checkout, PATH=tools("pkg-config"), CC=None), "there is no C compiler")


def test_with_a_compiler_of_ones_own_that_is_not_there(checkout):
    """The compiler named by CC is the one that is missed, whatever options stand behind it."""
    check_refused(build(checkout, CC="no-such-compiler -O2"), "there is no C compiler (no-such-compiler)")


def test_without_pkg_config(checkout, tools):
    """A machine without pkg-config is told which packages to install."""
    check_refused(build(checkout, PATH=tools("gcc"), CC="gcc", PKG_CONFIG=None), "there is no pkg-config")


def test_without_the_headers(checkout, tmp_path):
    """A machine without libdevmapper's development files is told which packages to install."""
    empty = tmp_path / "empty"
    empty.mkdir()
    done = build(checkout, PKG_CONFIG_LIBDIR=str(empty), PKG_CONFIG_PATH=None)
    check_refused(done, "the headers of libdevmapper are missing")


def test_with_a_library_that_is_too_old(checkout, tmp_path):
    """A libdevmapper below the floor is named with its version, and so is the floor."""
    (tmp_path / "devmapper.pc").write_text(
        "Name: devmapper\nDescription: x\nVersion: 1.02.174\nCflags:\nLibs: -ldevmapper\n", encoding="utf-8"
    )
    done = build(checkout, PKG_CONFIG_PATH=str(tmp_path))
    check_refused(done, "libdevmapper is 1.02.174")
    assert "1.02.175" in done.stderr


def test_the_shim_compiles_without_warnings_and_works(checkout):
    """With all warnings as errors the extension builds, loads, and is of this version."""
    done = build(checkout, DMLIB_CFLAGS="-Wall -Wextra -Werror")
    assert done.returncode == 0, done.stderr
    code = "from dmlib import _dm; print(_dm.ffi.string(_dm.lib.dmlib_version()).decode(), _dm.__file__)"
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    version, place = ran.stdout.split()
    assert version == dmlib.__version__
    assert Path(place).parent == checkout / "dmlib"


def test_the_strict_build_can_fail(checkout):
    """A warning in the shim ends such a build."""
    script = checkout / "_build_dm.py"
    text = script.read_text(encoding="utf-8")
    mark = "static void dmlib_log_install(void) {"
    assert mark in text
    script.write_text(text.replace(mark, f"{mark} int unused_variable;"), encoding="utf-8")
    assert build(checkout, DMLIB_CFLAGS="-Wall -Wextra -Werror").returncode != 0
