# SPDX-License-Identifier: MIT
"""
A real kernel with a device mapper, for tests and demonstrations, where the host has none or root is not at hand.

    python -m dmlib.testing run -- dmsetup targets

boots a guest whose root is the host's own file tree, read-only, runs the command there as root, passes its output
through and exits with its status. ``run`` does the same from Python, ``Guest`` several at a time. This package needs
neither the compiled extension nor anything else outside the standard library.
"""

from dmlib.testing.errors import GuestDiedError, GuestError, GuestStalledError, GuestTimeoutError, GuestUnavailableError
from dmlib.testing.guest import Backend, Guest
from dmlib.testing.job import Job
from dmlib.testing.runner import Choice, choose, run

__all__ = [
    "Backend",
    "Choice",
    "Guest",
    "GuestDiedError",
    "GuestError",
    "GuestStalledError",
    "GuestTimeoutError",
    "GuestUnavailableError",
    "Job",
    "choose",
    "run",
]
