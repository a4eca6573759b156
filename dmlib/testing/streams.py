# SPDX-License-Identifier: MIT
"""What the runner does with the bytes that come out of a guest."""

from __future__ import annotations

import os
import select
import time

_TAIL = 16384


def write_all(descriptor: int, data: bytes, deadline: float | None) -> None:
    """
    Write *data*, however slowly it is taken, but not beyond *deadline*.

    What is left at the deadline is dropped: the caller looks at the clock next.
    """
    view = memoryview(data)
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    while view:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not poll.poll(remaining):
            return
        # A pipe that polls as writable takes this much without blocking, and no more for certain.
        try:
            view = view[os.write(descriptor, view[: select.PIPE_BUF]) :]
        except BlockingIOError:
            time.sleep(0.001)  # a terminal in non-blocking mode with less room than that


class OutputStream:
    """One output of the command on its way to a descriptor, up to the token that ends it."""

    def __init__(self, descriptor: int, token: str) -> None:
        self._descriptor = descriptor
        self._token = token.encode()
        self._held = b""
        self.ended = False

    def feed(self, data: bytes, deadline: float | None) -> None:
        """Pass *data* on, except the token and what may be its beginning."""
        if self.ended:
            return
        data = self._held + data
        before, found, _ = data.partition(self._token)
        if found:
            self.ended = True
            self._held = b""
            write_all(self._descriptor, before, deadline)
            return
        keep = next(
            (n for n in range(min(len(self._token) - 1, len(data)), 0, -1) if self._token.startswith(data[-n:])), 0
        )
        self._held = data[len(data) - keep :]
        write_all(self._descriptor, data[: len(data) - keep], deadline)

    def flush(self) -> None:
        """Pass on what was held back for looking like the token."""
        if not self.ended and self._held:
            write_all(self._descriptor, self._held, time.monotonic() + 1)
            self._held = b""


class ControlStream:
    """The status protocol: lines ``ready`` and ``status N``."""

    def __init__(self) -> None:
        self._data = b""
        self.ready = False
        self.status: int | None = None

    def feed(self, data: bytes, _deadline: float | None) -> None:
        """Take in whole lines; a terminal may have put carriage returns before their ends."""
        *lines, self._data = (self._data + data).split(b"\n")
        for line in lines:
            match line.split():
                case [b"ready"]:
                    self.ready = True
                case [b"status", number] if number.isdigit():
                    self.status = int(number)
                case _:
                    continue


class Tail:
    """The last lines of a console, and the way on for all of it where somebody wants to see it."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor
        self._data = b""

    def feed(self, data: bytes, deadline: float | None) -> None:
        """Keep the last of it."""
        self._data = (self._data + data)[-_TAIL:]
        if self._descriptor is not None:
            write_all(self._descriptor, data, deadline)

    def text(self) -> str:
        """Return what is kept, as text."""
        return self._data.decode(errors="replace").replace("\r", "")
