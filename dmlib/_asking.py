# SPDX-License-Identifier: MIT
"""
What a mapped device can be asked. Nothing here changes one.

:class:`dmlib.Device` adds the verbs that do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from dmlib import ids
from dmlib.errors import DeviceNotFoundError
from dmlib.events import wait_for_event
from dmlib.operations import Operation
from dmlib.table import Table, status_from_entries
from dmlib.task import Task
from dmlib.udev import node_path
from dmlib.units import KiB
from dmlib.usage import device_under

if TYPE_CHECKING:
    from os import PathLike

    from dmlib.results import DeviceInfo
    from dmlib.table import StatusSegment
    from dmlib.units import Sectors


@dataclass(frozen=True, slots=True)
class Asking:
    """The asking half of a device: a name, and the questions that it answers."""

    name: str

    def __post_init__(self) -> None:
        ids.check_name(self.name)

    # -- finding

    @classmethod
    def from_uuid(cls, uuid: str) -> Self:
        """
        Return the device that has a uuid.

        Raises:
            ArgumentError: No device can have it.
            DeviceNotFoundError: None has.

        Cost: one ioctl.
        """
        return cls(Task(Operation.INFO, uuid=ids.check_uuid(uuid)).run().device.name)

    @classmethod
    def from_number(cls, number: ids.DeviceNumber) -> Self:
        """
        Return the device that has a number.

        Raises:
            DeviceNotFoundError: There is none, or it is no mapped device.

        Cost: one ioctl.
        """
        return cls(Task(Operation.INFO, number=number).run().device.name)

    @classmethod
    def from_path(cls, path: str | PathLike[str]) -> Self:
        """
        Return the device that a path leads to: a node, or any link to one.

        Args:
            path: Such as ``/dev/dm-3``, ``/dev/mapper/disk``, ``/dev/disk/by-uuid/...``.

        Raises:
            ArgumentError: There is no block device at the path.
            DeviceNotFoundError: It is no mapped device.

        Cost: one ioctl.
        """
        return cls.from_number(ids.device_number(path, "path"))

    @classmethod
    def for_filesystem(cls, path: str | PathLike[str]) -> Self:
        """
        Return the device that a file system is on.

        Args:
            path: A file or directory in it.

        Raises:
            ArgumentError: Nothing is there, or its file system is not on one block device that can be told (tmpfs, NFS,
                overlay).
            DeviceNotFoundError: It is on a block device that is no mapped one.

        Cost: one ioctl.
        """
        return cls.from_number(device_under(path))

    # -- asking

    def __fspath__(self) -> str:
        return self.path

    @property
    def path(self) -> str:
        """Path of the device's node below ``/dev/mapper``, which exists from the first resume on."""
        return node_path(self.name)

    def exists(self) -> bool:
        """Return whether there is a device of this name; the one question about it that absence does not fail."""
        try:
            self.info()
        except DeviceNotFoundError:
            return False
        return True

    def info(self) -> DeviceInfo:
        """
        Return the state of the device.

        Raises:
            DeviceNotFoundError: There is no such device.

        Cost: one ioctl.

        Source: DM_DEV_STATUS.
        """
        return Task(Operation.INFO, name=self.name).run().device

    def table(self, *, inactive: bool = False, strict: bool = False, secure: bool = False) -> Table | None:
        """
        Return the live table, or the inactive one; ``None`` if there is none.

        Args:
            inactive: Look at the table that waits for a resume.
            strict: Raise for a line that breaks its target's grammar instead of keeping it raw.
            secure: There are keys in it: buffers of the kernel and of libdevmapper are wiped. The strings in the answer
                stay in this process's memory until they are overwritten.

        Raises:
            DeviceNotFoundError: There is no such device.
            ParseError: In strict mode.

        Minimum driver: 4.16 (Linux 2.6.32) for *inactive*; 4.20 (Linux 2.6.39) for *secure*.

        Cost: one ioctl.

        Source: DM_TABLE_STATUS with DM_STATUS_TABLE_FLAG.
        """
        lines = Task(Operation.TABLE, name=self.name, inactive=inactive, secure=secure).run().lines
        return Table.from_entries(lines, strict=strict) if lines else None

    def status(self, *, flush: bool = False, strict: bool = False) -> tuple[StatusSegment, ...]:
        """
        Return the status of each segment; empty without a live table.

        Args:
            flush: Let a thin pool commit its metadata first, as ``dmsetup status`` does. That writes, and may have
                to wait; without it the call always answers at once.
            strict: Raise for a line that breaks its target's grammar instead of keeping it raw.

        Raises:
            DeviceNotFoundError: There is no such device.
            ParseError: In strict mode.

        Cost: one ioctl.

        Source: DM_TABLE_STATUS.
        """
        return status_from_entries(Task(Operation.STATUS, name=self.name, flush=flush).run().lines, strict=strict)

    def deps(self, *, inactive: bool = False) -> tuple[ids.DeviceNumber, ...]:
        """
        Return the devices that the table stands on.

        Args:
            inactive: Ask about the table that waits for a resume.

        Raises:
            DeviceNotFoundError: There is no such device.

        Cost: one ioctl.

        Source: DM_TABLE_DEPS.
        """
        return Task(Operation.DEPS, name=self.name, inactive=inactive).run().deps

    def wait(self, event_nr: int, *, timeout: float | None = None) -> int | None:
        """
        Wait until the device's event counter is another one than *event_nr*.

        Args:
            event_nr: The counter as it was seen, such as ``info().event_nr``. If it has moved since, there is no wait.
            timeout: Seconds to wait at the most; ``None`` waits for ever.

        Returns:
            The counter now; ``None`` if the time is over.

        Raises:
            DeviceNotFoundError: There is no such device, or not any more under this name.
            UnsupportedError: The driver is too old.

        Minimum driver: 4.37 (Linux 4.14).

        Cost: as :class:`dmlib.EventMonitor`, with a descriptor for each call. Whoever waits again and again, or for
        many devices, does better with one of those.

        Source: DM_DEV_ARM_POLL. (DM_DEV_WAIT knows no time-out and cannot be cancelled.)
        """
        return wait_for_event(self.name, event_nr, timeout)

    def read_ahead(self) -> Sectors:
        """
        Return how much the kernel reads ahead on the device.

        Raises:
            DeviceNotFoundError: There is no such device.

        Source: sysfs, ``queue/read_ahead_kb``.
        """
        with open(self._sysfs("queue/read_ahead_kb"), encoding="ascii") as file:
            return KiB(int(file.read()))

    def _sysfs(self, attribute: str) -> str:
        return f"/sys/dev/block/{self.info().number}/{attribute}"
