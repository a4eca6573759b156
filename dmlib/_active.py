# SPDX-License-Identifier: MIT
"""
Who has a thin id active.

The kernel maps one thin id to two devices without a complaint, and the two then corrupt each other's data. dmlib's own
devices cannot clash: their uuid says pool and id, and a uuid is given but once. Devices of other programs are looked
for among those that stand on the pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmlib import blockdev, ids
from dmlib.device import Device
from dmlib.driver import list_devices
from dmlib.errors import DeviceNotFoundError
from dmlib.operations import Operation
from dmlib.targets.thin import ThinTarget
from dmlib.task import Task

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dmlib.driver import ListedDevice
    from dmlib.results import DeviceInfo


def thin_uuid(metadata_device: ids.DeviceNumber, thin_id: int | str) -> str:
    """Return the uuid that dmlib gives to the device over a thin id: the pool is told by its metadata device."""
    return f"{ids.UUID_PREFIX}{metadata_device}-thin-{thin_id}"


def active_by_uuid(uuid: str) -> DeviceInfo | None:
    """Return the device that carries *uuid*, which is dmlib's; one ioctl."""
    try:
        return Task(Operation.INFO, uuid=uuid).run().device
    except DeviceNotFoundError:
        return None


def holders_of(number: ids.DeviceNumber) -> list[ListedDevice]:
    """Return the mapped devices that stand on a device, by a live or an inactive table; one ioctl."""
    holders = blockdev.mapped_holders(number)
    return [device for device in list_devices() if device.number in holders] if holders else []


def active_elsewhere(pool: DeviceInfo, thin_id: int, *, ours: str) -> DeviceInfo | None:
    """
    Return a device over *thin_id* of *pool* that dmlib did not make.

    One ioctl if each device on the pool has a uuid that begins with *ours*, two more for each that has not.
    """
    if not pool.open_count:
        return None
    for holder in holders_of(pool.number):
        device = Device(holder.name)
        if not (holder.uuid or "").startswith(ours) and is_thin(device, pool.number, thin_id):
            try:
                return device.info()
            except DeviceNotFoundError:  # removed meanwhile
                continue
    return None


def is_thin(device: Device, pool: ids.DeviceNumber, thin_id: int) -> bool:
    """Return whether a table of *device*, live or inactive, maps *thin_id* of *pool*."""
    return any(target.thin_id == thin_id and target.pool == pool for target in _thin_targets(device))


def _thin_targets(device: Device) -> Iterator[ThinTarget]:
    for inactive in (False, True):
        try:
            table = device.table(inactive=inactive)
        except DeviceNotFoundError:  # removed meanwhile
            return
        for segment in table or ():
            if isinstance(segment.target, ThinTarget):
                yield segment.target
