# SPDX-License-Identifier: MIT
"""
The pytest plugin: tests that need a device mapper run where there is one, in the ordinary session.

A test says so with ``@pytest.mark.needs_device_mapper``. Where pytest runs as root on a kernel with the driver, the
test runs right there; else a guest is booted, the marked tests run in it, and their reports appear among the others.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

from dmlib.testing.errors import GuestUnavailableError
from dmlib.testing.job import Job
from dmlib.testing.protocol import GUEST_MARK
from dmlib.testing.runner import WAYS, choose

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

MARKER: Final = "needs_device_mapper"
_HELP: Final = (
    f"{MARKER}(targets=(), driver=(), udev=None): runs as root on a kernel with a device mapper, in a guest if "
    "need be; targets: target types that must be there; driver: least version of the driver's interface; udev: "
    "whether a udevd must run (True) or must not (False)"
)
_HYPOTHESIS: Final = "/tmp/hypothesis"  # noqa: S108 - the guest's own
_UNAVAILABLE: Final = pytest.StashKey[str]()

pytest_plugins = ("dmlib.testing.fixtures",)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("dmlib", "tests that need a device mapper")
    group.addoption(
        "--dm-run", choices=WAYS, default="auto", help="where marked tests run (auto: the first way that works here)"
    )
    group.addoption(
        "--dm-strict", action="store_true", help="what the kernel or this machine lacks is a failure, not a skip"
    )
    group.addoption("--dm-udev", action="store_true", help="run udevd in the guest")
    group.addoption("--dm-cpus", type=int, default=1, metavar="N", help="the guest's processors")
    group.addoption("--dm-memory", default="1G", metavar="SIZE", help="the guest's memory")
    group.addoption("--dm-timeout", type=float, default=1800.0, metavar="SECONDS", help="limit for a whole guest")
    group.addoption("--dm-writable", action="append", default=[], metavar="DIR", help="folder that a guest may change")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", _HELP)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say where the marked tests will run, if the way was asked for."""
    way = config.getoption("dm_run")
    return None if way == "auto" or in_guest() else f"device mapper: {way}"


def in_guest() -> bool:
    """Return whether this is the pytest inside of a guest."""
    return GUEST_MARK in os.environ


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Leave to pytest what can run here; then run the marked tests that cannot in guests."""
    config = session.config
    guests: list[tuple[Sequence[str], list[pytest.Item]]] = []
    if not (in_guest() or config.option.collectonly or hasattr(config, "workerinput")):
        guests = _guests(session)
    result = yield
    if guests:
        from dmlib.testing.outer import Outer  # noqa: PLC0415 - sessions without a marked test do not need it

        for command, items in guests:
            Outer(session, command).run(items)
    return result


def _guests(session: pytest.Session) -> list[tuple[Sequence[str], list[pytest.Item]]]:
    """Take those items out of the session that need a guest; return a runner's command line for each kind of guest."""
    guests = []
    for udev in (False, True):
        group = [item for item in session.items if item.get_closest_marker(MARKER) and _wants_udev(item) is udev]
        command = _command(session.config, group, udev=udev) if group else None
        if command is not None:
            taken = set(group)
            session.items = [item for item in session.items if item not in taken]
            guests.append((command, group))
    return guests


def _requirements(
    *, targets: Iterable[str] = (), driver: Sequence[int] = (), udev: bool | None = None
) -> dict[str, Any]:
    return {"targets": tuple(targets), "driver": tuple(driver), "udev": udev}


def _needs(item: pytest.Item) -> dict[str, Any]:
    """Return what the markers of an item ask for together; the nearest decides on udev."""
    needs = _requirements()
    for marker in reversed(list(item.iter_markers(MARKER))):
        try:
            more = _requirements(*marker.args, **marker.kwargs)
        except TypeError as error:
            raise pytest.UsageError(f"{item.nodeid}: {MARKER}: {error}") from error
        needs["targets"] += more["targets"]
        needs["driver"] = max(needs["driver"], more["driver"])
        needs["udev"] = needs["udev"] if more["udev"] is None else more["udev"]
    return needs


def _wants_udev(item: pytest.Item) -> bool:
    udev = _needs(item)["udev"]
    return bool(item.config.getoption("dm_udev")) if udev is None else bool(udev)


def _command(config: pytest.Config, items: Iterable[pytest.Item], *, udev: bool) -> Sequence[str] | None:
    """Return how to run something in a guest; ``None`` if the tests run here, be it to be skipped."""
    option = config.option
    try:
        job = Job(command=[sys.executable], udev=udev, cpus=option.dm_cpus, memory=option.dm_memory)
        backend, _reason = choose(job, option.dm_run)
    except GuestUnavailableError as error:
        for item in items:
            item.stash[_UNAVAILABLE] = str(error)
        return None
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    if backend is None:
        return None
    command = [sys.executable, "-m", "dmlib.testing", "run", "--on", backend.name, "--timeout", str(option.dm_timeout)]
    command += ["--cpus", str(option.dm_cpus), "--memory", option.dm_memory, *(["--udev"] if udev else [])]
    # The tree is read-only in there.
    command += ["--env", "PYTHONDONTWRITEBYTECODE=1", "--env", f"HYPOTHESIS_STORAGE_DIRECTORY={_HYPOTHESIS}"]
    for folder in option.dm_writable:
        command += ["--writable", folder]
    return command


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a marked test, or fail it if strict, where what it needs is not there."""
    if item.get_closest_marker(MARKER) is None:
        return
    from dmlib.testing.world import missing  # noqa: PLC0415 - it needs the library, which other sessions may lack

    reason = item.stash.get(_UNAVAILABLE, None) or missing(**_needs(item))
    if reason and item.config.getoption("dm_strict"):
        pytest.fail(reason, pytrace=False)
    if reason:
        pytest.skip(reason)
