# SPDX-License-Identifier: MIT
"""The driver as a whole: its version, its targets, its devices."""

from __future__ import annotations

from dmlib import _control, _ffi
from dmlib._control import ListedDevice
from dmlib._ffi import library_version
from dmlib.task import Operation, Task

__all__ = ["ListedDevice", "driver_version", "library_version", "list_devices", "target_versions"]


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
