# SPDX-License-Identifier: MIT
"""
A plugin for the pytest inside of a guest: runs what the outer one ordered, and tells it what happens, line by line.

    python -m pytest -p dmlib.testing.inner --dm-orders ORDERS 3>&1 1>&2
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

import pytest

from dmlib.testing.protocol import DESCRIPTOR, Event, Line, Orders

if TYPE_CHECKING:
    import warnings


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the orders."""
    parser.addoption("--dm-orders", required=True, help=argparse.SUPPRESS)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Take over the outer options, those of the project's own conftest among them, and listen to all that happens."""
    orders = Orders.read(config.getoption("dm_orders"))
    for name, value in orders.options.items():
        if hasattr(config.option, name):
            setattr(config.option, name, value)
    config.pluginmanager.register(Teller(config, orders))


class Teller:
    """The plugin that tells."""

    def __init__(self, config: pytest.Config, orders: Orders) -> None:
        self._config = config
        self._orders = orders

    def _tell(self, event: Event, data: Any) -> None:
        line = Line(event, data).encode()
        while line:
            line = line[os.write(DESCRIPTOR, line) :]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep what was ordered, in that order."""
        there = {item.nodeid: item for item in items}
        items[:] = [there[node] for node in self._orders.items if node in there]
        self._tell("collected", [item.nodeid for item in items])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Tell what could not be collected."""
        if report.failed:
            self._tell("error", f"{report.nodeid}: {report.longreprtext}")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Tell which test begins."""
        self._tell("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Tell how a phase of a test ended."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._tell("report", data)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Tell that a test is over."""
        self._tell("finish", nodeid)

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, when: str, nodeid: str) -> None:
        """Tell of a warning."""
        told = [str(warning_message.message), warning_message.category.__name__, warning_message.filename]
        self._tell("warning", [*told, warning_message.lineno, when, nodeid])

    def pytest_internalerror(self, excrepr: object) -> None:
        """Tell that pytest itself failed."""
        self._tell("error", str(excrepr))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Tell that there is no more to come."""
        self._tell("done", int(exitstatus))
