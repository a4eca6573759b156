# SPDX-License-Identifier: MIT
"""Options for all tiers; the kernel tier is never skipped where it was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dmlib import _control
from dmlib.errors import DriverUnavailableError

KERNEL_TIER = Path(__file__).parent / "kernel"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-kernel", action="store_true", help="a kernel test that cannot run is a failure, not a skip"
    )


def _udev_runs() -> bool:
    return os.path.exists("/run/udev/control") and "DM_DISABLE_UDEV" not in os.environ


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kernel_items = [item for item in items if KERNEL_TIER in item.path.parents]
    if not kernel_items:
        return
    try:
        _control.probe()
    except DriverUnavailableError as error:
        if config.getoption("--require-kernel"):
            raise pytest.UsageError(f"the kernel tier cannot run: {error}") from error
        for item in kernel_items:
            item.add_marker(pytest.mark.skip(reason=f"{error}; make test boots a kernel that has it"))
        return
    elsewhere = "once" if _udev_runs() else "udev"
    wrong_world = [
        item
        for item in kernel_items
        if item.get_closest_marker(elsewhere) and not item.get_closest_marker("concurrency")
    ]
    if wrong_world:  # they run in the other guest
        config.hook.pytest_deselected(items=wrong_world)
        items[:] = [item for item in items if item not in wrong_world]
