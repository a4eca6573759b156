# SPDX-License-Identifier: MIT
"""QEMU with a stock kernel."""

from __future__ import annotations

from typing import ClassVar

from dmlib.testing.errors import GuestUnavailableError
from dmlib.testing.guest import Backend, Channels, Launch
from dmlib.testing.job import Job


class Qemu(Backend):
    name: ClassVar[str] = "qemu"

    def check(self, job: Job) -> None:
        raise GuestUnavailableError("not yet")

    def launch(self, job: Job, folder: str, channels: Channels, token: str) -> Launch:
        raise GuestUnavailableError("not yet")
