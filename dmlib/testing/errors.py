# SPDX-License-Identifier: MIT
"""What can keep a command from giving an exit status of its own."""

from __future__ import annotations

from typing import ClassVar

# Exit statuses of the runner itself. A command may return the same numbers; the sentence on standard error tells.
EXIT_UNAVAILABLE = 69  # this machine lacks something
EXIT_GUEST_DIED = 70  # no status came out of the guest
EXIT_TIMEOUT = 124  # as timeout(1)


class GuestError(RuntimeError):
    """The command did not run to its end; never raised itself."""

    exit_status: ClassVar[int] = 1


class GuestUnavailableError(GuestError):
    """This machine lacks what the guest needs; the message names the package."""

    exit_status = EXIT_UNAVAILABLE


class GuestDiedError(GuestError):
    """
    The guest panicked, did not boot, or went away without reporting a status.

    Attributes:
        console: The last lines of the guest kernel's console.
    """

    exit_status = EXIT_GUEST_DIED

    def __init__(self, message: str, console: str = "") -> None:
        super().__init__(message)
        self.console = console


class GuestTimeoutError(GuestError):
    """The time limit passed; guest and command were killed."""

    exit_status = EXIT_TIMEOUT


class GuestStalledError(GuestDiedError):
    """The guest showed no sign of life within the time that a boot may take."""
