# SPDX-License-Identifier: MIT
"""What goes for all tiers: the kernel tier needs a device mapper, and which of its tests run beside a udevd."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmlib.testing.world import udev_runs

KERNEL_TIER = Path(__file__).parent / "kernel"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    with_udev = config.getoption("dm_udev") or udev_runs()
    wrong_world = []
    for item in items:
        if KERNEL_TIER not in item.path.parents:
            continue
        item.add_marker(pytest.mark.needs_device_mapper(udev=True if item.get_closest_marker("udev") else None))
        elsewhere = item.get_closest_marker("once" if with_udev else "udev")
        if elsewhere and not (item.get_closest_marker("concurrency") and config.getoption("dm_cpus") > 1):
            wrong_world.append(item)
    if wrong_world:  # they run in the other guest
        config.hook.pytest_deselected(items=wrong_world)
        items[:] = [item for item in items if item not in wrong_world]
