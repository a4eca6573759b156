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
import stat
import threading
from collections import deque
from typing import Final

_MARKER: Final = b"device-mapper:"
_RECORD_SIZE: Final = 8192
_DEVICE: Final = os.makedev(1, 11)

_lock = threading.RLock()  # a signal handler may come in between
_descriptor: int | None = None
_unreadable = False
_lines: deque[tuple[int, str]] = deque(maxlen=256)
_last = -1


def _open() -> int | None:
    global _descriptor, _unreadable  # noqa: PLW0603 - the process has one
    if _descriptor is None and not _unreadable:
        try:
            descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError:  # not root, or a container without it: errors come without kernel lines then
            _unreadable = True
            return None
        found = os.fstat(descriptor)
        if stat.S_ISCHR(found.st_mode) and found.st_rdev == _DEVICE:
            os.lseek(descriptor, 0, os.SEEK_END)
            _descriptor = descriptor
        else:  # containers put a pipe, a console or a file there, which somebody else reads
            os.close(descriptor)
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
        number = int(head.split(b",")[1])
        if _MARKER in text:
            _lines.append((number, os.fsdecode(text[text.index(_MARKER) :])))
        _last = max(_last, number)  # a signal handler may have read on meanwhile


def mark() -> int:
    """Return a mark for :func:`since`."""
    with _lock:
        _drain()
        return _last


def since(mark: int) -> tuple[str, ...]:
    """Return the device-mapper lines that were logged after *mark*; empty where the log cannot be read."""
    with _lock:
        _drain()
        return tuple(text for number, text in tuple(_lines) if number > mark)


def forget() -> None:
    """Start anew in a forked child: the descriptor's position is shared with the parent."""
    global _descriptor, _unreadable, _last, _lock  # noqa: PLW0603
    _lock = threading.RLock()
    if _descriptor is not None:
        with contextlib.suppress(OSError):  # closed by the child itself already
            os.close(_descriptor)
    _descriptor, _unreadable, _last = None, False, -1
    _lines.clear()
