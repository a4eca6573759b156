# SPDX-License-Identifier: MIT
"""
Taking back what was done when a later step fails, undisturbed by Ctrl-C.

The standard library's ``Thread.start`` and ``Event.wait`` do not survive a signal handler that raises in the midst of
them: a lock stays held, or is released twice, and the other thread waits for ever. So threads whose end matters are
started here by the one call of C below, and waited for with a :class:`Latch`.
"""

from __future__ import annotations

import _thread
import sys
import threading
import time
from typing import TYPE_CHECKING, Final, Protocol, Self

from dmlib.errors import CleanupError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


_local: Final = threading.local()
_LOOK_EVERY: Final = 0.5

start_thread: Final = _thread.start_new_thread
"""Start a thread that nothing waits for by itself: ``start_thread(function, ())``."""


class Latch:
    """Something that happens once; whole at each moment in which a signal handler may raise."""

    __slots__ = ("_lock", "is_set")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()  # released when it has happened
        self.is_set = False

    def set(self) -> None:
        """Say that it has happened; called once."""
        self.is_set = True
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has happened, for at most *timeout* seconds; return whether it has."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.is_set:
            # In steps: a waiter that is interrupted right here would keep the lock, and the others from waking.
            rest = _LOOK_EVERY if deadline is None else min(_LOOK_EVERY, deadline - time.monotonic())
            if self._lock.acquire(timeout=max(0.0, rest)):
                self._lock.release()
            elif deadline is not None and time.monotonic() >= deadline:
                break
        return self.is_set


def interrupted() -> bool:
    """Whether this thread takes something back because of Ctrl-C or the like, so that somebody waits for the end."""
    error = sys.exception()
    return getattr(_local, "interrupted", False) or not isinstance(error, Exception | None)


def outlast(latch: Latch) -> KeyboardInterrupt | None:
    """Wait for *latch* through any number of Ctrl-C; return the last."""
    interrupt: KeyboardInterrupt | None = None
    while not latch.is_set:
        try:
            latch.wait()
        except KeyboardInterrupt as error:
            interrupt = error
    return interrupt


def undisturbed(step: Callable[[], object]) -> None:
    """
    Run *step* to its end, once, however often Ctrl-C is pressed meanwhile; the last one is raised afterwards.

    Python runs signal handlers in the main thread only, so there another thread does the work.
    """
    if _thread.get_ident() != threading.main_thread().ident:
        step()
        return
    once, done = threading.Lock(), Latch()
    failures: list[BaseException] = []
    interrupt: KeyboardInterrupt | None = None
    hurry = interrupted()

    def run() -> None:
        if once.acquire(blocking=False):
            _local.interrupted = hurry
            try:
                step()
            except BaseException as failure:  # noqa: BLE001 - raised below, in the thread that waits
                failures.append(failure)
            finally:
                _local.interrupted = False
                done.set()

    while not done.is_set:
        try:
            # Again after each Ctrl-C: it may have kept the one before from starting.
            start_thread(run, ())
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
