# SPDX-License-Identifier: MIT
"""Waiting for events in asyncio. The other verbs are short, or are for ``asyncio.to_thread``."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from dmlib.events import Change, EventMonitor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class AsyncEventMonitor(EventMonitor):
    """
    An :class:`dmlib.EventMonitor` for ``async for``; no thread waits.

    One task may iterate at a time. :meth:`dmlib.EventMonitor.close`, in the same loop or in another thread, ends the
    iteration.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[Change]:
        """Yield what happens, until the monitor is closed."""
        return self._changes()

    async def _changes(self) -> AsyncIterator[Change]:
        while not self.closed:
            for change in self.read():
                yield change
            if not self.closed:
                await self._readable()

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        readable = loop.create_future()

        def wake() -> None:
            if not readable.done():
                readable.set_result(None)

        with self._turn():
            descriptors = self.fileno(), self._wake
            for descriptor in descriptors:
                loop.add_reader(descriptor, wake)
            try:
                await readable
            finally:
                for descriptor in descriptors:
                    loop.remove_reader(descriptor)
