# SPDX-License-Identifier: MIT
"""Taking back what was done when a later step fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

from dmlib.errors import CleanupError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


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
        while self._steps:
            step, after = self._steps.pop()
            try:
                if after is None or after.succeeded:
                    step()
            except Exception as failure:  # noqa: BLE001 - collected, and raised below
                failures.append(failure)
        if not failures:
            return
        left = CleanupError(f"{self._what} failed, and so did taking it back", failures)
        if isinstance(error, Exception):
            raise left from error
        error.add_note(f"{left}: {'; '.join(map(str, failures))}")  # Ctrl-C stays Ctrl-C
