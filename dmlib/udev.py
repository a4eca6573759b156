# SPDX-License-Identifier: MIT
"""
Working together with udev: cookies, waits that end, and the device node as it must be afterwards.

udev makes the nodes and links of a device and tells by a cookie, a SysV semaphore, that it is done. A udev that
is dead, stopped or in another IPC namespace never tells, so every wait here has a deadline, after which dmlib takes
the cookie down and makes the node itself.
"""

from __future__ import annotations

import enum
import logging
import os
import stat
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from dmlib import _ffi, _undo, ids
from dmlib.errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

_log: Final = logging.getLogger("dmlib.udev")
_FIRST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.02
_PATIENCE_AFTER_INTERRUPT: Final = 1.0

_timeout = 30.0


class UdevFlags(enum.IntFlag):
    """
    What udev's rules are asked to leave out for a device.

    The rules themselves forget it with the device's next uevent; dmlib asks for the same again, in each verb that
    causes one, unless told otherwise.

    Two names are what fits a role, the others single rules: ``SNAPSHOT`` for a device with the same content as another,
    so that links by uuid and label stay with that one; ``PRIVATE`` for a device that only other devices use, so that
    nobody looks for file systems on it or opens it. dmlib gives ``SNAPSHOT`` to thin snapshots by itself.

    Attributes:
        DISABLE_DM_RULES: Names and links below ``/dev/mapper``; libdevmapper makes the node then.
        DISABLE_SUBSYSTEM_RULES: Rules of the program that keeps the device, such as LVM's.
        DISABLE_DISK_RULES: Looking for what is on it (blkid), and links below ``/dev/disk``.
        DISABLE_OTHER_RULES: All rules that come later.
        LOW_PRIORITY: Links that another device has as well stay with that one.
        SUBSYSTEM_0: The first of eight that mean what the rules of the program that keeps the device make of them.

    Source: libdevmapper, ``dm_task_set_cookie``. (Two more it sets by itself: that the event comes from a program, and
    that udev alone makes the nodes.)
    """

    NONE = 0
    DISABLE_DM_RULES = 0x0001
    DISABLE_SUBSYSTEM_RULES = 0x0002
    DISABLE_DISK_RULES = 0x0004
    DISABLE_OTHER_RULES = 0x0008
    LOW_PRIORITY = 0x0010
    SUBSYSTEM_0 = 0x0100
    SUBSYSTEM_1 = 0x0200
    SUBSYSTEM_2 = 0x0400
    SUBSYSTEM_3 = 0x0800
    SUBSYSTEM_4 = 0x1000
    SUBSYSTEM_5 = 0x2000
    SUBSYSTEM_6 = 0x4000
    SUBSYSTEM_7 = 0x8000
    PRIVATE = DISABLE_SUBSYSTEM_RULES | DISABLE_DISK_RULES | DISABLE_OTHER_RULES
    SNAPSHOT = LOW_PRIORITY


_IN_DATABASE: Final = {
    "DM_UDEV_DISABLE_DM_RULES_FLAG": UdevFlags.DISABLE_DM_RULES,
    "DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG": UdevFlags.DISABLE_SUBSYSTEM_RULES,
    "DM_UDEV_DISABLE_DISK_RULES_FLAG": UdevFlags.DISABLE_DISK_RULES,
    "DM_UDEV_DISABLE_OTHER_RULES_FLAG": UdevFlags.DISABLE_OTHER_RULES,
    "DM_UDEV_LOW_PRIORITY_FLAG": UdevFlags.LOW_PRIORITY,
    **{f"DM_SUBSYSTEM_UDEV_FLAG{bit}": UdevFlags(0x0100 << bit) for bit in range(8)},
}


def flags_in_database(number: ids.DeviceNumber) -> UdevFlags:
    """Return what udev's rules were asked to leave out at a device's last event; nothing if udev does not know it."""
    flags = UdevFlags.NONE
    try:
        with open(f"/run/udev/data/b{number}", encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:  # no udev, or not its device
        return flags
    for line in lines:
        name, _, value = line.removeprefix("E:").partition("=")
        if value == "1":
            flags |= _IN_DATABASE.get(name, UdevFlags.NONE)
    return flags


def udev_timeout() -> float:
    """Return for how many seconds a verb waits for udev before it sees to the device node itself."""
    return _timeout


def set_udev(mode: str = "auto", *, timeout: float = 30.0) -> None:
    """
    Say how this process works together with udev; best called before the first device is touched.

    Args:
        mode: ``"auto"``: synchronise where udev runs. ``"off"``: do not, libdevmapper makes the nodes (containers
            whose udev belongs to somebody else; the environment variable ``DM_DISABLE_UDEV`` does the same).
            ``"on"``: insist.
        timeout: Seconds for which a verb waits for udev. After that, dmlib logs a warning, takes the cookie down
            and makes the node itself. What is taken back after Ctrl-C waits for one second at most.

    Raises:
        ArgumentError: Another word, or a timeout that is not positive.
        UnsupportedError: ``"on"``, and libdevmapper sees no udev.
    """
    global _timeout  # noqa: PLW0603 - libdevmapper's own switch is one per process too
    if mode not in ("auto", "off", "on"):
        raise ArgumentError("mode", mode, "must be auto, off or on")
    if not timeout > 0:
        raise ArgumentError("timeout", timeout, "must be positive")
    lib, _ = _ffi.connect() if mode == "on" else _ffi.load()
    with _ffi.lock:
        lib.dm_udev_set_sync_support(0 if mode == "off" else 1)
        if mode == "on" and not lib.dm_udev_get_sync_support():
            raise UnsupportedError("udev synchronisation", "a running udev that this process can see", "none")
    _timeout = timeout


class Cookie:
    """One cookie of one task; 0 where there is no udev to wait for."""

    __slots__ = ("_cell", "_lib", "_ready", "timed_out")

    def __init__(self) -> None:
        self._lib, ffi = _ffi.connect()
        self._cell: Any = ffi.new("uint32_t *")
        self._ready: Any = ffi.new("int *")
        self.timed_out = 0
        """The cookie that udev did not answer in time."""

    def attach(self, pointer: _ffi.TaskPtr, flags: UdevFlags) -> int:
        """Make the cookie and give it to a task; call under the lock. False if libdevmapper could not."""
        bits = int(flags)
        if self._lib.dm_udev_get_sync_support():
            bits |= self._lib.DM_UDEV_DISABLE_LIBRARY_FALLBACK
        return self._lib.dm_task_set_cookie(pointer, self._cell, bits)

    def wait(self, what: str) -> None:
        """Wait until udev has answered, or the time is over; then the cookie is gone either way."""
        if not self._cell[0]:
            return
        patience = min(_timeout, _PATIENCE_AFTER_INTERRUPT) if _undo.interrupted() else _timeout
        deadline = time.monotonic() + patience
        pause = _FIRST_PAUSE
        try:
            while not self._answered():
                if time.monotonic() > deadline:
                    self.timed_out = self._cell[0]
                    break
                time.sleep(pause)
                pause = min(pause * 1.5, _LONGEST_PAUSE)
        finally:
            self.discard()
        if self.timed_out:
            message = "%s: no answer from udev within %g s (cookie 0x%x), seeing to the node without it"
            _log.warning(message, what, patience, self.timed_out)

    def _answered(self) -> bool:
        with self._looked_after():
            known = self._lib.dm_udev_wait_immediate(self._cell[0], self._ready)
            if not known or self._ready[0]:
                self._cell[0] = 0
        return not self._cell[0]

    def discard(self) -> None:
        """Take the cookie down, whatever udev still owes it."""
        if self._cell[0]:
            with self._looked_after():
                self._lib.dmlib_cookie_discard(self._cell[0])
                self._cell[0] = 0

    @contextmanager
    def _looked_after(self) -> Iterator[None]:
        """Take the lock; and while synchronisation is off, libdevmapper ignores the cookies that it has made before."""
        with _ffi.lock:
            switched_off = not self._lib.dm_udev_get_sync_support()
            try:
                if switched_off:
                    self._lib.dm_udev_set_sync_support(1)
                yield
            finally:
                if switched_off:
                    self._lib.dm_udev_set_sync_support(0)


def node_path(name: str) -> str:
    """Return the path of a device's node; whether it exists is another question."""
    return f"/dev/mapper/{ids.mangle(name)}"


def node_problem(name: str, number: ids.DeviceNumber | None) -> str | None:
    """Return what is wrong with the node of *name*, which must be device *number*, or be gone if that is ``None``."""
    path = node_path(name)
    try:
        found = os.stat(path, follow_symlinks=number is not None)
    except FileNotFoundError:
        return None if number is None else f"{path} is missing"
    if number is None:  # a dangling link would lead to the next device of that number; a file leads nowhere
        return f"{path} is still there" if stat.S_ISLNK(found.st_mode) or stat.S_ISBLK(found.st_mode) else None
    return None if ids.DeviceNumber.from_dev(found.st_rdev) == number else f"{path} is not the device {number}"
