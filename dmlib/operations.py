# SPDX-License-Identifier: MIT
"""
What a task can do and what can be said to it, as data: the rules that a Task follows, and the tables of the reference.

A version is the least that has it: of the driver's interface (``dmsetup version``), and of libdevmapper.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Self

from dmlib.errors import ArgumentError
from dmlib.units import Sectors

Version = tuple[int, ...]

FLOOR: Final[Version] = (1, 2, 175)
"""The oldest libdevmapper that dmlib works with."""


class Operation(enum.Enum):
    """What a task does, in the words of ``dmsetup``."""

    CREATE = "create"
    LOAD = "load"
    REMOVE = "remove"
    REMOVE_ALL = "remove_all"
    SUSPEND = "suspend"
    RESUME = "resume"
    INFO = "info"
    DEPS = "deps"
    RENAME = "rename"
    SET_UUID = "set_uuid"
    SET_GEOMETRY = "set_geometry"
    STATUS = "status"
    TABLE = "table"
    CLEAR = "clear"
    MESSAGE = "message"
    MKNODES = "mknodes"
    VERSION = "version"
    TARGET_VERSION = "target_version"
    TARGET_VERSIONS = "target_versions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """
    What goes for an operation.

    Attributes:
        does: What it does, for the reference.
        c_type: libdevmapper's name for it.
        ioctl: The ioctl behind it.
        driver: Least version of the driver.
        address: What it is about: a device, a target type, or nothing in particular.
        needs: An input without which it makes no sense.
        uevent: The kernel sends a uevent, so udev completes a cookie; on any other the wait would never end.
        locked: It puts node work on the library's global list. All others touch no shared state and may block, so they
            run without the lock. (A resume is told that its node was made at creation.)
        asks_target: A target may refuse, and the kernel's log says why.
        absence_unseen: libdevmapper calls a missing device a success.
    """

    does: str
    c_type: str
    ioctl: str
    driver: Version = (4, 0)
    address: Literal["device", "target", ""] = "device"
    needs: str = ""
    uevent: bool = False
    locked: bool = False
    asks_target: bool = False
    absence_unseen: bool = False


RULES: Final = {
    Operation.CREATE: Rules(
        does="make a device without a table", c_type="DM_DEVICE_CREATE", ioctl="DM_DEV_CREATE", locked=True
    ),
    Operation.LOAD: Rules(
        does="fill the inactive table",
        c_type="DM_DEVICE_RELOAD",
        ioctl="DM_TABLE_LOAD",
        needs="targets",
        asks_target=True,
    ),
    Operation.REMOVE: Rules(
        does="remove a device", c_type="DM_DEVICE_REMOVE", ioctl="DM_DEV_REMOVE", uevent=True, locked=True
    ),
    Operation.REMOVE_ALL: Rules(
        does="remove every device that nobody has open",
        c_type="DM_DEVICE_REMOVE_ALL",
        ioctl="DM_REMOVE_ALL",
        address="",
        locked=True,
    ),
    Operation.SUSPEND: Rules(does="hold back I/O", c_type="DM_DEVICE_SUSPEND", ioctl="DM_DEV_SUSPEND"),
    Operation.RESUME: Rules(
        does="make the inactive table live, and let I/O go on",
        c_type="DM_DEVICE_RESUME",
        ioctl="DM_DEV_SUSPEND",
        uevent=True,
        asks_target=True,
    ),
    Operation.INFO: Rules(
        does="tell the state of a device", c_type="DM_DEVICE_INFO", ioctl="DM_DEV_STATUS", absence_unseen=True
    ),
    Operation.DEPS: Rules(does="list the devices below", c_type="DM_DEVICE_DEPS", ioctl="DM_TABLE_DEPS"),
    Operation.RENAME: Rules(
        does="give a device another name",
        c_type="DM_DEVICE_RENAME",
        ioctl="DM_DEV_RENAME",
        needs="new",
        uevent=True,
        locked=True,
    ),
    Operation.SET_UUID: Rules(
        does="give a device its uuid, once",
        c_type="DM_DEVICE_RENAME",
        ioctl="DM_DEV_RENAME",
        driver=(4, 19),
        needs="new",
        uevent=True,
        locked=True,
    ),
    Operation.SET_GEOMETRY: Rules(
        does="set what HDIO_GETGEO answers",
        c_type="DM_DEVICE_SET_GEOMETRY",
        ioctl="DM_DEV_SET_GEOMETRY",
        driver=(4, 6),
        needs="geometry",
    ),
    Operation.STATUS: Rules(
        does="ask the targets how they are", c_type="DM_DEVICE_STATUS", ioctl="DM_TABLE_STATUS", absence_unseen=True
    ),
    Operation.TABLE: Rules(does="read a table", c_type="DM_DEVICE_TABLE", ioctl="DM_TABLE_STATUS"),
    Operation.CLEAR: Rules(does="drop the inactive table", c_type="DM_DEVICE_CLEAR", ioctl="DM_TABLE_CLEAR"),
    Operation.MESSAGE: Rules(
        does="send a message to a target",
        c_type="DM_DEVICE_TARGET_MSG",
        ioctl="DM_TARGET_MSG",
        driver=(4, 2),
        needs="message",
        asks_target=True,
    ),
    Operation.MKNODES: Rules(
        does="make or remove the node as the driver has the device",
        c_type="DM_DEVICE_MKNODES",
        ioctl="DM_DEV_STATUS",
        locked=True,
    ),
    Operation.VERSION: Rules(
        does="tell the driver's version", c_type="DM_DEVICE_VERSION", ioctl="DM_VERSION", address=""
    ),
    Operation.TARGET_VERSION: Rules(
        does="tell the version of a target, whose module is loaded if need be",
        c_type="DM_DEVICE_GET_TARGET_VERSION",
        ioctl="DM_GET_TARGET_VERSION",
        driver=(4, 41),
        address="target",
    ),
    Operation.TARGET_VERSIONS: Rules(
        does="tell the versions of all targets that are loaded",
        c_type="DM_DEVICE_LIST_VERSIONS",
        ioctl="DM_LIST_VERSIONS",
        driver=(4, 1),
        address="",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """
    Something that can be said to a task beyond its address.

    Attributes:
        means: What it does, for the reference.
        setter: libdevmapper's function for it.
        on: The operations that take it.
        driver: Least version of the driver.
        library: Least version of libdevmapper.
    """

    means: str
    setter: str
    on: frozenset[Operation]
    driver: Version = (4, 0)
    library: Version = FLOOR


def _on(*operations: Operation) -> frozenset[Operation]:
    return frozenset(operations)


_SPOKEN: Final = _on(Operation.LOAD, Operation.MESSAGE, Operation.TABLE, Operation.STATUS)
_MAKES_NODE: Final = _on(Operation.CREATE, Operation.RESUME)

INPUTS: Final = {
    "new": Input(
        means="the new name, or the uuid",
        setter="dm_task_set_newname, dm_task_set_newuuid",
        on=_on(Operation.RENAME, Operation.SET_UUID),
    ),
    "targets": Input(means="the table", setter="dm_task_add_target", on=_on(Operation.LOAD)),
    "message": Input(means="the text", setter="dm_task_set_message", on=_on(Operation.MESSAGE), driver=(4, 2)),
    "sector": Input(means="which target it is for", setter="dm_task_set_sector", on=_on(Operation.MESSAGE)),
    "geometry": Input(
        means="cylinders, heads, sectors, start", setter="dm_task_set_geometry", on=_on(Operation.SET_GEOMETRY)
    ),
    "readonly": Input(means="the table refuses writes", setter="dm_task_set_ro", on=_on(Operation.LOAD)),
    "flush": Input(
        means="false: do not wait for I/O in flight; do not let a pool commit",
        setter="dm_task_no_flush",
        on=_on(Operation.SUSPEND, Operation.STATUS),
        driver=(4, 12),
    ),
    "lockfs": Input(
        means="false: do not freeze a file system", setter="dm_task_skip_lockfs", on=_on(Operation.SUSPEND)
    ),
    "inactive": Input(
        means="about the inactive table",
        setter="dm_task_query_inactive_table",
        on=_on(Operation.INFO, Operation.TABLE, Operation.STATUS, Operation.DEPS),
        driver=(4, 16),
    ),
    "deferred": Input(
        means="take effect when the last user closes the device",
        setter="dm_task_deferred_remove",
        on=_on(Operation.REMOVE, Operation.REMOVE_ALL),
        driver=(4, 27),
    ),
    "secure": Input(
        means="wipe what carried the text, and log nothing of it",
        setter="dm_task_secure_data",
        on=_SPOKEN,
        driver=(4, 20),
    ),
    "measurement": Input(
        means="answer with what was measured for the integrity log",
        setter="dm_task_ima_measurement",
        on=_on(Operation.STATUS),
        driver=(4, 45),
        library=(1, 2, 181),
    ),
    "minor": Input(means="the minor number to have", setter="dm_task_set_minor", on=_on(Operation.CREATE)),
    "uid": Input(means="owner of a node that dmlib makes", setter="dm_task_set_uid", on=_MAKES_NODE),
    "gid": Input(means="group of a node that dmlib makes", setter="dm_task_set_gid", on=_MAKES_NODE),
    "mode": Input(means="permissions of a node that dmlib makes", setter="dm_task_set_mode", on=_MAKES_NODE),
    "udev": Input(
        means="what udev's rules leave out",
        setter="dm_task_set_cookie",
        on=frozenset(operation for operation, rules in RULES.items() if rules.uevent),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Getter:
    """
    Something that a task brings back, for the reference.

    Attributes:
        holds: What it is.
        getter: libdevmapper's function for it.
        of: The operations that bring it.
    """

    holds: str
    getter: str
    of: frozenset[Operation]


ON_DEVICES: Final = frozenset(operation for operation, rules in RULES.items() if rules.address == "device")

GETTERS: Final = {
    "info": Getter(
        holds="state of the device after the ioctl",
        getter="dm_task_get_info, dm_task_get_name, dm_task_get_uuid",
        of=ON_DEVICES,
    ),
    "lines": Getter(
        holds="segments, each with its text", getter="dm_get_next_target", of=_on(Operation.TABLE, Operation.STATUS)
    ),
    "deps": Getter(holds="numbers of the devices below", getter="dm_task_get_deps", of=_on(Operation.DEPS)),
    "response": Getter(holds="a target's answer", getter="dm_task_get_message_response", of=_on(Operation.MESSAGE)),
    "versions": Getter(
        holds="names and versions",
        getter="dm_task_get_versions, dm_task_get_driver_version",
        of=_on(Operation.VERSION, Operation.TARGET_VERSION, Operation.TARGET_VERSIONS),
    ),
}


def check_number(value: int | None, field: str, limit: int) -> int | None:
    """Return a number of a task, 0..*limit*, if there is one."""
    if value is not None and not (type(value) is int and 0 <= value <= limit):
        raise ArgumentError(field, value, f"must be a whole number 0..{limit}")
    return value


class Geometry(NamedTuple):
    """
    What a disk of old would look like; ``HDIO_GETGEO`` answers with it.

    Attributes:
        cylinders: 0..65535.
        heads: 0..255.
        sectors: Sectors in a track, 0..255.
        start: Where the device begins on the disk.
    """

    cylinders: int
    heads: int
    sectors: int
    start: Sectors = Sectors(0)

    def checked(self) -> Self:
        """
        Return it if the driver takes it.

        Raises:
            ArgumentError: A number beyond its limit.
        """
        for field, limit in (("cylinders", 0xFFFF), ("heads", 0xFF), ("sectors", 0xFF)):
            check_number(getattr(self, field), field, limit)
        if self.start.count > self.cylinders * self.heads * self.sectors:
            raise ArgumentError("start", self.start, "must not be beyond cylinders times heads times sectors")
        return self
