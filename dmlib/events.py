# SPDX-License-Identifier: MIT
"""
Waiting until something happens to mapped devices, and telling what it was.

The driver tells only *that* something happened: its control node becomes readable. What it was shows in the list of all
devices, held against the list before. The monitor arms its descriptor first and lists then, so that what happens
in between wakes it once more than needed and nothing is missed.
"""

from __future__ import annotations

import os
import select
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Self

from dmlib import _control, _ffi
from dmlib._control import EVENT_NR_SINCE, ListedDevice, Listing
from dmlib.errors import ArgumentError, DeviceNotFoundError, StateError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dmlib.ids import DeviceNumber

_BUFFER: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Change:
    """
    What happened to a device between two looks.

    Attributes:
        kind: ``"created"``, ``"removed"``, ``"renamed"``, or ``"changed"``: events were counted, or a uuid was given.
        device: The device as it is now; if it was removed, as it was seen last.
        before: The device as it was at the look before; ``None`` if it was created.
        events: By how much its event counter moved; since its creation, if it was created.
    """

    kind: Literal["created", "removed", "renamed", "changed"]
    device: ListedDevice
    before: ListedDevice | None
    events: int


def compare(before: Iterable[ListedDevice], now: Iterable[ListedDevice]) -> tuple[Change, ...]:
    """
    Return what happened between two lists.

    A device is the same as before if it has the same number and uuid and its event counter has not gone back. One
    without a uuid that has a new name, or that has a uuid now, is the same if the counter has gone up, since a
    rename is an event.

    Returns:
        Removals first, then the rest in the order of *now*.
    """
    gone = {device.number: device for device in before}
    rest = []
    for device in now:
        old = gone.get(device.number)
        if old is None or not _same(old, device):
            rest.append(Change("created", device, None, device.event_nr or 0))
            continue
        del gone[device.number]
        events = (device.event_nr or 0) - (old.event_nr or 0)
        if device.name != old.name:
            rest.append(Change("renamed", device, old, events))
        elif events or device.uuid != old.uuid:
            rest.append(Change("changed", device, old, events))
    return (*(Change("removed", device, device, 0) for device in gone.values()), *rest)


def _same(old: ListedDevice, new: ListedDevice) -> bool:
    counted = (new.event_nr or 0) - (old.event_nr or 0)
    if new.uuid != old.uuid:
        return not old.uuid and new.name == old.name and counted > 0
    return counted >= 0 if new.uuid or new.name == old.name else counted > 0


def check_version(version: tuple[int, int, int]) -> None:
    """
    Raise if a driver cannot be waited on.

    Raises:
        UnsupportedError: It is older than 4.37 (Linux 4.14).
    """
    if version < EVENT_NR_SINCE:
        have, need = (".".join(map(str, one)) for one in (version, EVENT_NR_SINCE))
        raise UnsupportedError("waiting for events", f"driver {need} (Linux 4.14)", have)


class EventMonitor:
    """
    Watches mapped devices: which are made, removed and renamed, and whose event counters move.

    It looks at all of them, or at those that begin with a prefix, through a descriptor of its own on the control node.
    What happens and is undone between two looks leaves no trace; the state after each look, and the sums of the
    counters' movements, are exact.

    One thread may wait at a time; :meth:`close` from another ends its wait. A child after fork() has a descriptor of
    its own as soon as it uses the monitor, and goes on from the last look.

    Args:
        name_prefix: Watch only devices whose name begins so. A device that gets another name looks removed.
        uuid_prefix: Watch only devices whose uuid begins so.

    Attributes:
        devices: The devices at the last look.

    Raises:
        DriverUnavailableError: There is no driver, or no permission to use it (CAP_SYS_ADMIN).
        UnsupportedError: The driver is too old.

    Minimum driver: 4.37 (Linux 4.14).

    Cost: an ioctl to arm, one to list, and a poll for each time that something happens, however many devices there
    are.

    Source: DM_DEV_ARM_POLL, DM_LIST_DEVICES; poll(2) on the control node.
    """

    def __init__(self, *, name_prefix: str = "", uuid_prefix: str = "") -> None:
        _ffi.connect()  # libdevmapper makes the control node where nobody else did
        check_version(_control.probe())
        self._prefixes = name_prefix, uuid_prefix
        self._mutex = threading.Lock()
        self._closed = False
        self._open()
        try:
            self._listing.arm()
            self.devices: tuple[ListedDevice, ...] = tuple(self._listing.read())
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._pid = os.getpid()
        self._waited_on = False
        self._listing = Listing(_control.open_control(), _BUFFER, *self._prefixes)
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BaseException:
            os.close(self._listing.descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptors back. A thread that waits is woken, and finds nothing more to tell."""
        if self._pid != os.getpid():
            self._mutex = threading.Lock()  # the parent's may have been held as it forked
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            if self._waited_on and self._pid == os.getpid():
                os.eventfd_write(self._wake, 1)  # it closes them as it leaves
            else:
                self._close_descriptors()

    def _close_descriptors(self) -> None:
        os.close(self._listing.descriptor)
        os.close(self._wake)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def fileno(self) -> int:
        """
        Return the descriptor, for ``select`` and its like: when it is readable, :meth:`read` has something to look at.

        Raises:
            StateError: The monitor is closed.
        """
        self._see_to_fork()
        return self._listing.descriptor

    def _see_to_fork(self) -> None:
        if self._closed:
            raise StateError("event monitor", "is closed")
        if self._pid != os.getpid():
            # The open file, and with it what poll says, is shared with the parent.
            self._close_descriptors()
            self._mutex = threading.Lock()
            self._open()

    def read(self) -> tuple[Change, ...]:
        """
        Return what has happened since the last look, without waiting.

        Raises:
            StateError: The monitor is closed, or another thread waits on it.
        """
        with self._turn():
            return self._look()

    def _look(self) -> tuple[Change, ...]:
        self._listing.arm()
        now = tuple(self._listing.read())
        changes = compare(self.devices, now)
        self.devices = now
        return changes

    def poll(self, timeout: float | None = None) -> tuple[Change, ...]:
        """
        Wait until something happens and return it.

        Args:
            timeout: Seconds to wait at the most; ``None`` waits for ever.

        Returns:
            What happened; nothing if the time is over, or the monitor was closed meanwhile.

        Raises:
            ArgumentError: A *timeout* below zero.
            StateError: The monitor is closed, or is waited on already.
        """
        deadline = _deadline(timeout)
        with self._turn():
            return self._wait(deadline)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Be the one who waits; whoever is that when the monitor is closed closes the descriptors."""
        self._see_to_fork()
        with self._mutex:
            if self._closed or self._waited_on:
                raise StateError("event monitor", "is closed" if self._closed else "is waited on already")
            self._waited_on = True
        try:
            yield
        finally:
            with self._mutex:
                self._waited_on = False
                if self._closed:
                    self._close_descriptors()

    def _wait(self, deadline: float | None) -> tuple[Change, ...]:
        poller = select.poll()
        poller.register(self._listing.descriptor, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = poller.poll(None if left is None else left * 1000)
            if not ready or any(descriptor == self._wake for descriptor, _ in ready):
                return ()
            if changes := self._look():
                return changes

    def __iter__(self) -> Iterator[Change]:
        """Yield what happens, for ever: until the monitor is closed."""
        return self.changes()

    def changes(self, timeout: float | None = None) -> Iterator[Change]:
        """
        Yield what happens, until nothing has happened for *timeout* seconds or the monitor is closed.

        Raises:
            StateError: The monitor is waited on already.
        """
        while not self._closed:
            found = self.poll(timeout)
            yield from found
            if not found:
                return


def _deadline(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    if not timeout >= 0:
        raise ArgumentError("timeout", timeout, "must be seconds, or None")
    return time.monotonic() + timeout


def wait_for_event(name: str, event_nr: int, timeout: float | None) -> int | None:
    """Return the event number of a device once it is another one; see :meth:`dmlib.Device.wait`."""
    if type(event_nr) is not int:
        raise TypeError(f"event_nr must be an int, not {type(event_nr).__name__}")
    deadline = _deadline(timeout)
    with EventMonitor(name_prefix=name) as monitor:
        number: DeviceNumber | None = None
        while True:
            device = next((one for one in monitor.devices if one.name == name), None)
            if device is None or number not in (None, device.number):
                raise DeviceNotFoundError("wait", name, None)
            if device.event_nr != event_nr:
                return device.event_nr
            number = device.number
            left = None if deadline is None else deadline - time.monotonic()
            if (left is not None and left <= 0) or not monitor.poll(left):
                return None
