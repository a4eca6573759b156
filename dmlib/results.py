# SPDX-License-Identifier: MIT
"""What a task brought back, copied out of C."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmlib.errors import StateError

if TYPE_CHECKING:
    from dmlib import ids


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """
    What the driver says of a device.

    Attributes:
        name: Its name.
        uuid: Its uuid, ``""`` if it has none.
        number: Its block device number.
        suspended: It was suspended by a program.
        internal_suspend: It is held by another device, such as a thin device by its suspended pool.
        live_table: It has a table that serves I/O.
        inactive_table: A table waits to become live at the next resume.
        open_count: How often it is open: nodes, mounts, devices on top.
        event_nr: Its event counter.
        target_count: Segments of its live table.
        readonly: Its live table refuses writes.
        deferred_remove: It goes away when the last user closes it.
    """

    name: str
    uuid: str
    number: ids.DeviceNumber
    suspended: bool
    internal_suspend: bool
    live_table: bool
    inactive_table: bool
    open_count: int
    event_nr: int
    target_count: int
    readonly: bool
    deferred_remove: bool


@dataclass(frozen=True, slots=True)
class Result:
    """
    What a task brought back; a field that the operation does not have keeps its default.

    Attributes:
        info: State of the device after the ioctl.
        lines: Table or status, a tuple ``(start, length, type, text)`` a segment, in sectors.
        deps: Devices that the live (or inactive) table uses.
        response: A target's answer to a message.
        versions: Version of the driver (as ``driver``) or of each loaded target.
    """

    info: DeviceInfo | None = None
    lines: tuple[tuple[int, int, str, str], ...] = ()
    deps: tuple[ids.DeviceNumber, ...] = ()
    response: str | None = None
    versions: tuple[tuple[str, tuple[int, int, int]], ...] = ()

    @property
    def device(self) -> DeviceInfo:
        """The state of the device, where the operation is one on a device."""
        if self.info is None:
            raise StateError("task", "this operation says nothing about a device")
        return self.info
