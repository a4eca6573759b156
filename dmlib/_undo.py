# SPDX-License-Identifier: MIT
"""Taking back what was done when a later step fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from dmlib.errors import CleanupError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class Undo:
    """
    Steps that take back what the block has done, run in reverse if it fails; nothing if it succeeds.

    Push the step *before* doing what it takes back, and let it look whether there is anything to do: a signal
    handler may raise between the two. A step that fails does not keep the others from running.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._steps: list[Callable[[], object]] = []

    def push(self, step: Callable[[], object]) -> None:
        """Remember *step*."""
        self._steps.append(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        failures: list[Exception] = []
        while self._steps:
            try:
                self._steps.pop()()
            except Exception as failure:  # noqa: BLE001 - collected, and raised below
                failures.append(failure)
        if not failures:
            return
        left = CleanupError(f"{self._what} failed, and so did taking it back", failures)
        if isinstance(error, Exception):
            raise left from error
        error.add_note(f"{left}: {'; '.join(map(str, failures))}")  # Ctrl-C stays Ctrl-C
