# SPDX-License-Identifier: MIT
"""
Block devices as ``/sys`` shows them: no root, no control node, no libdevmapper, and no ioctl.

The view is that of the moment at which each file was read; a device that goes meanwhile is left out.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from typing import Final

from dmlib.errors import DeviceNotFoundError, UnsupportedError
from dmlib.ids import DeviceNumber, device_number, unmangle
from dmlib.units import Sectors

_BLOCK: Final = "/sys/class/block"
_NUMBERS: Final = "/sys/dev/block"


def read(path: str) -> str | None:
    """Return the text of a file without the newline at its end; ``None`` if it is gone, never was, or is not ours."""
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read()).removesuffix("\n")
    except OSError:
        return None


def entries(path: str) -> list[str]:
    """Return the names in a directory, sorted; none if it is not there."""
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def number_in(path: str) -> DeviceNumber | None:
    """Return the device number in a file."""
    text = read(path)
    return DeviceNumber.parse(text) if text else None


def node_number(path: str, root: str = "/") -> DeviceNumber | None:
    """Return the number of a block device's node below ``/dev``; looking elsewhere might wait for a server."""
    if not path.startswith("/dev/"):
        return None
    try:
        status = os.stat(root.rstrip("/") + path)
    except OSError:
        return None
    return DeviceNumber.from_dev(status.st_rdev) if stat.S_ISBLK(status.st_mode) else None


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """
    A block device: disk, partition, loop device, mapped device or other.

    Attributes:
        number: Its number.
        kernel_name: The kernel's name for it, such as ``sda1`` or ``dm-3``.
        name: A mapped device's own name; of others, the kernel's.
        uuid: A mapped device's uuid, ``""`` if it has none or is no mapped device.
        size: Its size.
        readonly: It refuses writes.
        removable: Its medium can be taken out.
        suspended: Whether a mapped device is suspended; ``None`` of others.
        partition: Number of a partition on its disk; ``None`` of others.
        backing_file: The file of a loop device in use.
        slaves: Devices below it: those of a mapped device or array, the disk of a partition, the block device that a
            loop device is over.
        holders: Devices above it, likewise.
    """

    number: DeviceNumber
    kernel_name: str
    name: str
    uuid: str
    size: Sectors
    readonly: bool
    removable: bool
    suspended: bool | None
    partition: int | None
    backing_file: str | None
    slaves: tuple[DeviceNumber, ...]
    holders: tuple[DeviceNumber, ...]

    @property
    def is_mapped(self) -> bool:
        """Whether it is a mapped device."""
        return self.suspended is not None

    @property
    def kind(self) -> str:
        """What ``lsblk`` calls its type: ``disk``, ``part``, ``loop``; of mapped devices, by how the uuid begins."""
        if self.partition is not None:
            return "part"
        if self.is_mapped:
            prefix = self.uuid.partition("-")[0].lower() if "-" in self.uuid else ""
            return "part" if prefix.startswith("part") else prefix or "dm"
        if self.kernel_name.startswith("loop"):
            return "loop"
        return read(f"{_BLOCK}/{self.kernel_name}/md/level") or "disk"


def block_devices() -> list[BlockDevice]:
    """
    Return all block devices with a size, in the order of their numbers.

    Mapped devices that never had a table are not among them: ``/sys`` shows them from their first resume on.

    Raises:
        UnsupportedError: ``/sys`` is not mounted.

    Cost: no ioctl; about ten small files for each device.

    Source: sysfs, ``class/block``.
    """
    if not os.path.isdir(_BLOCK):
        raise UnsupportedError("a view of block devices", "sysfs on /sys", "none")
    found = [_device(name) for name in entries(_BLOCK)]
    there = [device for device in found if device is not None and device.size]
    return sorted(_linked(there), key=lambda device: device.number)


def block_device(device: str | os.PathLike[str] | DeviceNumber) -> BlockDevice:
    """
    Return one block device.

    Args:
        device: Its number, a path that leads to its node, or something that has such a path.

    Raises:
        ArgumentError: There is no block device at the path.
        DeviceNotFoundError: There is no device of that number.
        UnsupportedError: ``/sys`` is not mounted.
    """
    number = device_number(device)
    found = next((one for one in block_devices() if one.number == number), None)
    if found is None:
        raise DeviceNotFoundError("find", str(number), None)
    return found


def _device(kernel_name: str) -> BlockDevice | None:
    directory = f"{_BLOCK}/{kernel_name}"
    number, size = number_in(f"{directory}/dev"), read(f"{directory}/size")
    if number is None or size is None:
        return None
    name, suspended, partition = (read(f"{directory}/{one}") for one in ("dm/name", "dm/suspended", "partition"))
    uuid = read(f"{directory}/dm/uuid")
    disk = os.path.dirname(os.path.realpath(directory)) if partition else ""
    below = [number_in(f"{disk}/dev")] if disk else _numbers(f"{directory}/slaves")
    return BlockDevice(
        number=number,
        kernel_name=kernel_name,
        name=kernel_name if name is None else unmangle(os.fsencode(name)),
        uuid=unmangle(os.fsencode(uuid or "")),
        size=Sectors(int(size)),
        readonly=read(f"{directory}/ro") == "1",
        removable=read(f"{disk or directory}/removable") == "1",
        suspended=None if suspended is None else suspended == "1",
        partition=int(partition) if partition else None,
        backing_file=read(f"{directory}/loop/backing_file"),
        slaves=tuple(one for one in below if one is not None),
        holders=(),
    )


def _numbers(directory: str) -> list[DeviceNumber | None]:
    return [number_in(f"{directory}/{name}/dev") for name in entries(directory)]


def _linked(devices: list[BlockDevice]) -> list[BlockDevice]:
    """Return the devices with what is over block devices by way of a loop, and with their holders."""
    over = {device.number: node_number(device.backing_file) for device in devices if device.backing_file}
    slaves = {one.number: (*one.slaves, *filter(None, [over.get(one.number)])) for one in devices}

    def holders(number: DeviceNumber) -> tuple[DeviceNumber, ...]:
        return tuple(sorted(above for above, below in slaves.items() if number in below))

    return [replace(one, slaves=slaves[one.number], holders=holders(one.number)) for one in devices]
