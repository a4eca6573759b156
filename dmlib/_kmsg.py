# SPDX-License-Identifier: MIT
"""
What the kernel logged about device mapper during a call.

The log is the only place where a target says why it refused a table. Other processes write to it as well, so
the lines are reported as seen meanwhile and never parsed. One descriptor serves the process: what it has
delivered is kept in a short list with the kernel's sequence numbers, and a mark is the last number read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from typing import Final

_MARKER: Final = b"device-mapper:"
_RECORD_SIZE: Final = 8192

_lock = threading.Lock()
_descriptor: int | None = None
_unreadable = False
_lines: deque[tuple[int, str]] = deque(maxlen=256)
_last = -1


def _open() -> int | None:
    global _descriptor, _unreadable  # noqa: PLW0603 - the process has one
    if _descriptor is None and not _unreadable:
        try:
            _descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(_descriptor, 0, os.SEEK_END)
        except OSError:  # not root, or a container without it: errors come without kernel lines then
            _unreadable = True
    return _descriptor


def _drain() -> None:
    global _last  # noqa: PLW0603
    descriptor = _open()
    while descriptor is not None:
        try:
            record = os.read(descriptor, _RECORD_SIZE)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the kernel overwrote what we had not read; go on with what there is
                continue
            return
        if not record:
            return
        head, _, text = record.partition(b"\n")[0].partition(b";")
        _last = int(head.split(b",")[1])
        if _MARKER in text:
            _lines.append((_last, os.fsdecode(text[text.index(_MARKER) :])))


def mark() -> int:
    """Return a mark for :func:`since`."""
    with _lock:
        _drain()
        return _last


def since(mark: int) -> tuple[str, ...]:
    """Return the device-mapper lines that were logged after *mark*; empty where the log cannot be read."""
    with _lock:
        _drain()
        return tuple(text for number, text in _lines if number > mark)


def forget() -> None:
    """Start anew in a forked child: the descriptor's position is shared with the parent."""
    global _descriptor, _unreadable, _last, _lock  # noqa: PLW0603
    _lock = threading.Lock()
    if _descriptor is not None:
        with contextlib.suppress(OSError):  # closed by the child itself already
            os.close(_descriptor)
    _descriptor, _unreadable, _last = None, False, -1
    _lines.clear()
