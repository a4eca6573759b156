# SPDX-License-Identifier: MIT
"""
The outer side of a pytest in a guest: gives the orders, and makes what it is told part of the ordinary session.

A test that takes the guest down with it fails; the tests after it get another guest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from typing import TYPE_CHECKING, Any, Final

import pytest

from dmlib.testing.protocol import DESCRIPTOR, GUEST_MARK, Line, Orders, as_plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# What the inner pytest must not inherit: where files go, which tests run, how it is shown, other plugins' processes.
_OWN_OPTIONS: Final = {
    *("basetemp", "cacheclear", "cacheshow", "collectonly", "confcutdir", "deselect", "dm_run", "failedfirst"),
    "file_or_dir",
    *("help", "ignore", "ignore_glob", "inifilename", "keyword", "lf", "log_file", "markers", "markexpr", "newfirst"),
    *("no_header", "no_summary", "numprocesses", "override_ini", "pastebin", "plugins", "rootdir", "showfixtures"),
    *("show_fixtures_per_test", "stepwise", "stepwise_skip", "trace", "usepdb", "usepdb_cls", "version", "xmlpath"),
}
_OWN_PREFIXES: Final = ("cov", "report")
_TAIL: Final = 4000
_SPEAKER: Final = "dmlib.testing: "  # how the runner begins its sentences


class Outer:
    """
    Runs tests of a session in guests.

    Args:
        session: The session.
        command: The real-kernel runner with its options; what to run comes after it.
    """

    def __init__(self, session: pytest.Session, command: Sequence[str]) -> None:
        self._session = session
        self._config = session.config
        aside = ["sh", "-c", f'exec "$@" {DESCRIPTOR}>&1 1>&2', "sh"]
        inner = [sys.executable, "-m", "pytest", "-p", "dmlib.testing.inner", *self._arguments()]
        # A pytest that is killed takes the runner along, and with it the guest.
        along = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
        self._command = [*along, *command, "--env", f"{GUEST_MARK}=1", "--", *aside, *inner, "--dm-orders"]
        self._pending: dict[str, pytest.Item] = {}
        self._running: str | None = None
        self._done = False
        self._errors: list[str] = []

    def run(self, items: Sequence[pytest.Item]) -> None:
        """Run *items* in a guest, and in another one what is left if that dies."""
        self._pending = {item.nodeid: item for item in items}
        while self._pending:
            before = len(self._pending)
            self._running, self._done, self._errors = None, False, []
            trouble = self._one_guest()
            self._stop_if_asked()
            if self._running is not None:
                self._fail(self._running, f"the guest ended while this test ran: {trouble}")
            if self._done or len(self._pending) == before:
                for node in list(self._pending):
                    self._fail(node, self._why_not_run(trouble))
            self._stop_if_asked()

    def _why_not_run(self, trouble: str) -> str:
        if not self._done:
            return f"the guest did not get as far as this test: {trouble}"
        return "\n".join(["the pytest in the guest did not find this test", *self._errors])

    def _stop_if_asked(self) -> None:
        if self._session.shouldfail:
            raise self._session.Failed(self._session.shouldfail)
        if self._session.shouldstop:
            raise self._session.Interrupted(self._session.shouldstop)

    # -- the guest

    def _one_guest(self) -> str:
        """Run what is pending; return what standard error ended with."""
        with tempfile.TemporaryDirectory(prefix="dmlib-orders-") as folder, tempfile.TemporaryFile() as said:
            path = os.path.join(folder, "orders")
            Orders(list(self._pending), self._options()).write(path)
            with self._process([*self._command, path], said.fileno()) as output:
                for raw in output:
                    line = Line.decode(raw)
                    if line is not None:
                        self._take(line)
                    if self._session.shouldfail or self._session.shouldstop:
                        break
            said.seek(max(0, said.seek(0, os.SEEK_END) - _TAIL))
            text = said.read().decode(errors="replace").strip()
            return text[text.rfind(_SPEAKER) :].removeprefix(_SPEAKER) if _SPEAKER in text else text

    @contextlib.contextmanager
    def _process(self, command: list[str], errors: int) -> Iterator[Any]:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process:
            try:
                yield process.stdout
            finally:  # after the last line it ends by itself; otherwise it takes its guest down
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10 if self._done else 0)
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)

    def _arguments(self) -> list[str]:
        config = self._config
        words = [*config.args, f"--rootdir={config.rootpath}", "-p", "no:cacheprovider", "--no-header", "--no-summary"]
        if config.inipath is not None:
            words += ["-c", str(config.inipath)]
        for plugin in config.option.plugins:
            words += ["-p", plugin]
        for override in config.option.override_ini or ():
            words += ["-o", override]
        return words

    def _options(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(self._config.option).items()
            if name not in _OWN_OPTIONS and not name.startswith(_OWN_PREFIXES) and as_plain(value)
        }

    # -- what it tells

    def _take(self, line: Line) -> None:
        match line.event:
            case "start":
                self._running = line.data
                self._log("start", line.data)
            case "report":
                report = self._config.hook.pytest_report_from_serializable(config=self._config, data=line.data)
                if report.skipped and isinstance(report.longrepr, list):
                    report.longrepr = tuple(report.longrepr)  # JSON has no tuples
                self._pending[report.nodeid].ihook.pytest_runtest_logreport(report=report)
            case "finish":
                self._log("finish", line.data)
                self._running = None
                del self._pending[line.data]
            case "warning":
                self._warn(*line.data)
            case "error":
                self._errors.append(line.data)
            case "done":
                self._done = True

    def _log(self, what: str, node: str) -> None:
        item = self._pending[node]
        hook = item.ihook.pytest_runtest_logstart if what == "start" else item.ihook.pytest_runtest_logfinish
        hook(nodeid=node, location=item.location)

    def _warn(self, text: str, category: str, filename: str, lineno: int, when: str, node: str) -> None:
        warning = warnings.WarningMessage(UserWarning(f"{category}: {text}"), UserWarning, filename, lineno)
        self._config.hook.pytest_warning_recorded.call_historic(
            kwargs={"warning_message": warning, "when": when, "nodeid": node, "location": None}
        )

    def _fail(self, node: str, why: str) -> None:
        item = self._pending[node]
        if node != self._running:
            self._log("start", node)
        report = pytest.TestReport(
            nodeid=node, location=item.location, keywords={}, outcome="failed", longrepr=why, when="call"
        )
        item.ihook.pytest_runtest_logreport(report=report)
        self._log("finish", node)
        self._running = None
        del self._pending[node]
