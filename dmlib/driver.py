# SPDX-License-Identifier: MIT
"""The driver as a whole: its version, its targets, its devices."""

from __future__ import annotations

import errno

from dmlib import _control, _ffi
from dmlib._control import ListedDevice
from dmlib._ffi import library_version
from dmlib.errors import StateError, TaskError, UnsupportedError
from dmlib.operations import Operation
from dmlib.task import Task
from dmlib.udev import node_problem

__all__ = [
    "ListedDevice",
    "driver_version",
    "library_version",
    "list_devices",
    "remove_all",
    "target_version",
    "target_versions",
]


def driver_version() -> tuple[int, int, int]:
    """
    Return the version of the driver's interface, such as ``(4, 47, 0)``.

    Raises:
        DriverUnavailableError: There is no driver, or no permission to use it.

    Source: DM_VERSION.
    """
    return dict(Task(Operation.VERSION).run().versions)["driver"]


def target_versions() -> dict[str, tuple[int, int, int]]:
    """
    Return the targets that are loaded into the kernel, with their versions.

    A target whose module is not loaded yet is not listed; loading a table that names it loads the module.

    Raises:
        DriverUnavailableError: There is no driver, or no permission to use it.

    Source: DM_LIST_VERSIONS, driver 4.1.
    """
    return dict(Task(Operation.TARGET_VERSIONS).run().versions)


def target_version(target: str) -> tuple[int, int, int]:
    """
    Return the version of one target. The kernel loads its module for that, if it has one and it is not there yet.

    Args:
        target: Name of the target type, such as ``"thin-pool"``.

    Raises:
        ArgumentError: No target can have this name.
        DriverUnavailableError: There is no driver, or no permission to use it.
        UnsupportedError: The kernel has no such target; or the driver is too old to tell.

    Minimum driver: 4.41 (Linux 5.5).

    Source: DM_GET_TARGET_VERSION.
    """
    try:
        return dict(Task(Operation.TARGET_VERSION, target=target).run().versions)[target]
    except TaskError as error:
        if error.errno != errno.EINVAL:
            raise
        have = ".".join(map(str, driver_version()))
        raise UnsupportedError(f"target {target}", "a kernel that has it", f"none (driver {have})") from error


def remove_all(*, everybodys: bool, deferred: bool = False) -> list[ListedDevice]:
    """
    Remove every mapped device that nobody has open, whoever made it: on most machines the end of running services.

    Args:
        everybodys: Say ``True``: devices of other programs are removed as well, LVM's and dm-crypt's among them.
        deferred: Let the kernel remove those in use when their last users close them.

    Returns:
        The devices that are gone. Those that stood on others free these, so it is done in rounds, until no more go.

    Raises:
        StateError: *everybodys* is not True.
        PermissionDeniedError: The process lost CAP_SYS_ADMIN.

    Minimum driver: 4.27 (Linux 3.13) for *deferred*.

    Cost: two ioctls for each layer of devices, one to list, and one for each node that udev did not remove.

    Source: DM_REMOVE_ALL.
    """
    if everybodys is not True:
        raise StateError("remove_all", "removes devices of all programs; everybodys=True says that this is meant")
    left = list_devices()
    removed: list[ListedDevice] = []
    while True:
        Task(Operation.REMOVE_ALL, deferred=deferred).run()
        there = {device.number for device in list_devices()}
        gone = [device for device in left if device.number not in there]
        if not gone:
            break
        removed += gone
        left = [device for device in left if device.number in there]
    for device in removed:
        if node_problem(device.name, None) is not None:
            Task(Operation.MKNODES, name=device.name).run()
    return removed


def list_devices(*, name_prefix: str = "", uuid_prefix: str = "") -> list[ListedDevice]:
    """
    Return mapped devices with names, numbers, event numbers and uuids.

    Args:
        name_prefix: Only those whose name begins so.
        uuid_prefix: Only those whose uuid begins so, such as ``"LVM-"``.

    Returns:
        All devices, or those that fit both prefixes. With a *uuid_prefix*, none from drivers that do not list uuids.

    Raises:
        DriverUnavailableError: There is no driver, or no permission to use it.
        PermissionDeniedError: The process lost CAP_SYS_ADMIN.

    Minimum driver: any; event numbers 4.37 (Linux 4.14), uuids 4.45 (Linux 5.13), which also filters by itself.

    Cost: one ioctl once the buffer fits; it doubles until it does, and stays.

    Source: DM_LIST_DEVICES.
    """
    _ffi.connect()  # libdevmapper makes the control node where nobody else did
    return _control.list_devices(name_prefix, uuid_prefix)
