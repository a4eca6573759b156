# SPDX-License-Identifier: MIT
"""
Whose device is it? Asked before each verb that would change one.

Programs that keep mapped devices mark them by how the uuid begins. Their tables are written down elsewhere too, in
LVM's or cryptsetup's metadata, so a change behind their back is worth a question.
"""

from __future__ import annotations

import os

from dmlib import ids
from dmlib.errors import DeviceNotFoundError, ForeignDeviceError
from dmlib.operations import Operation
from dmlib.owners import owner_of
from dmlib.task import Task
from dmlib.udev import node_path


def refuse_foreign(verb: str, name: str) -> None:
    """
    Raise if the uuid of a device names another owner; one that is not there is for the verb itself to report.

    Args:
        verb: What is about to be done to it.
        name: Its name.

    Raises:
        ForeignDeviceError: It belongs to somebody else.

    Cost: two small files of sysfs; where they do not know the device by this name, one ioctl.
    """
    uuid = _uuid_in_sysfs(name)
    if uuid is None:
        try:
            uuid = Task(Operation.INFO, name=name).run().device.uuid
        except DeviceNotFoundError:
            return
    owner = owner_of(uuid)
    if owner is not None and owner.foreign:
        raise ForeignDeviceError(verb, name, uuid, str(owner))


def _uuid_in_sysfs(name: str) -> str | None:
    try:
        number = ids.DeviceNumber.from_dev(os.stat(node_path(name)).st_rdev)
        stored = [_read(f"/sys/dev/block/{number}/dm/{attribute}") for attribute in ("name", "uuid")]
    except OSError:  # no node yet, or no sysfs here
        return None
    return stored[1] if stored[0] == name else None  # the node may be an old one


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return ids.unmangle(file.read().rstrip(b"\n"))
