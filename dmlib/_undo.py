# SPDX-License-Identifier: MIT
"""Taking back what was done when a later step fails, undisturbed by Ctrl-C."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Protocol, Self

from dmlib.errors import CleanupError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


_thread = threading.local()


def interrupted() -> bool:
    """Whether this thread takes something back because of Ctrl-C or the like, so that somebody waits for the end."""
    error = sys.exception()
    return getattr(_thread, "interrupted", False) or not isinstance(error, Exception | None)


def undisturbed(step: Callable[[], object]) -> None:
    """
    Run *step* to its end, once, however often Ctrl-C is pressed meanwhile; the last one is raised afterwards.

    Python runs signal handlers in the main thread only, so there another thread does the work.
    """
    if threading.current_thread() is not threading.main_thread():
        step()
        return
    once, done = threading.Lock(), threading.Event()
    failures: list[BaseException] = []
    interrupt: KeyboardInterrupt | None = None
    hurry = interrupted()

    def run() -> None:
        if once.acquire(blocking=False):
            _thread.interrupted = hurry
            try:
                step()
            except BaseException as failure:  # noqa: BLE001 - raised below, in the thread that waits
                failures.append(failure)
            finally:
                _thread.interrupted = False
                done.set()

    while not done.is_set():
        try:
            # Again after each Ctrl-C: it may have kept the one before from starting.
            threading.Thread(target=run, name="dmlib-undo").start()
            done.wait()
        except KeyboardInterrupt as error:
            interrupt = error
        except RuntimeError:  # no more threads at the end of the interpreter
            run()
    if failures:
        raise failures[0]
    if interrupt is not None:
        raise interrupt


class _Attempt(Protocol):
    @property
    def succeeded(self) -> bool: ...


class Undo:
    """
    Steps that take back what the block has done, run in reverse if it fails; nothing if it succeeds.

    A step is pushed *before* what it takes back is attempted, and runs only if that succeeded: a signal handler may
    raise right after. A step that fails does not keep the others from running.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._steps: list[tuple[Callable[[], object], _Attempt | None]] = []

    def push(self, step: Callable[[], object], after: _Attempt | None = None) -> None:
        """Remember *step*, for the case that *after* succeeds (by default: in any case)."""
        self._steps.append((step, after))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        failures: list[Exception] = []
        undisturbed(lambda: self._take_back(failures))
        if not failures:
            return
        left = CleanupError(f"{self._what} failed, and so did taking it back", failures)
        if isinstance(error, Exception):
            raise left from error
        error.add_note(f"{left}: {'; '.join(map(str, failures))}")  # Ctrl-C stays Ctrl-C

    def _take_back(self, failures: list[Exception]) -> None:
        while self._steps:
            step, after = self._steps.pop()
            try:
                if after is None or after.succeeded:
                    step()
            except Exception as failure:  # noqa: BLE001 - collected for the one error of them all
                failures.append(failure)
