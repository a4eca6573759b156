# SPDX-License-Identifier: MIT
"""
What stands on what: all block devices as a graph, as the lines of ``lsblk``, and taken down in the right order.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from dmlib import sysfs
from dmlib.device import REMOVE_TIMEOUT, Device
from dmlib.errors import DeviceBusyError, DeviceNotFoundError, ForeignDeviceError
from dmlib.ids import device_number
from dmlib.loop import LoopDevice
from dmlib.owners import owner_of
from dmlib.usage import users_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from os import PathLike

    from dmlib.ids import DeviceNumber
    from dmlib.sysfs import BlockDevice

_COLUMNS: Final = ("NAME", "MAJ:MIN", "RM", "SIZE", "RO", "TYPE", "MOUNTPOINTS")
_LEFT: Final = {"NAME", "TYPE", "MOUNTPOINTS"}
_UNITS: Final = "BKMGTPE"
_STEP: Final = 1024
_PAUSE: Final = 0.02


class DeviceTree:
    """
    All block devices at one moment, with what each stands on and what stands on it.

    Args:
        devices: The devices.

    Attributes:
        devices: Them, by number.
    """

    def __init__(self, devices: Iterable[BlockDevice]) -> None:
        self.devices = {device.number: device for device in devices}

    @classmethod
    def read(cls) -> DeviceTree:
        """
        Return the tree of this machine, read from ``/sys``: root is not needed.

        Raises:
            UnsupportedError: ``/sys`` is not mounted.
        """
        return cls(sysfs.block_devices())

    def roots(self) -> list[BlockDevice]:
        """Return the devices that stand on no other."""
        return [device for device in self.devices.values() if not self.below(device)]

    def below(self, device: BlockDevice) -> list[BlockDevice]:
        """Return what a device stands on, directly."""
        return [self.devices[number] for number in device.slaves if number in self.devices]

    def above(self, device: BlockDevice) -> list[BlockDevice]:
        """Return what stands on a device, directly."""
        return [self.devices[number] for number in device.holders if number in self.devices]

    def users_first(self, devices: Iterable[BlockDevice]) -> list[BlockDevice]:
        """Return devices and all that stands on them, each once, in an order in which they can be taken down."""
        ordered: dict[DeviceNumber, BlockDevice] = {}

        def visit(device: BlockDevice) -> None:
            if device.number not in ordered:
                for user in self.above(device):
                    visit(user)
                ordered[device.number] = device

        for device in devices:
            visit(device)
        return list(ordered.values())

    def lines(self) -> list[str]:
        """
        Return the tree as ``lsblk`` shows it, a line for each device and for each further mount.

        A device that stands on several is shown under each of them.
        """
        rows = [list(_COLUMNS)]
        for root in self.roots():
            rows += self._rows(root, "", "")
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        aligned = [
            (
                cell.ljust(width) if name in _LEFT else cell.rjust(width)
                for name, cell, width in zip(_COLUMNS, row, widths, strict=True)
            )
            for row in rows
        ]
        return [" ".join(cells).rstrip() for cells in aligned]

    def _rows(self, device: BlockDevice, branch: str, indent: str) -> Iterator[list[str]]:
        above = self.above(device)
        places = _places(device.number) or [""]
        flags = str(int(device.removable)), str(int(device.readonly))
        size = lsblk_size(device.size.bytes)
        yield [branch + device.name, str(device.number), flags[0], size, flags[1], device.kind, places[0]]
        for place in places[1:]:
            yield [indent + ("│ " if above else "  "), *[""] * (len(_COLUMNS) - 2), place]
        for user in above:
            last = user is above[-1]
            yield from self._rows(user, indent + ("└─" if last else "├─"), indent + ("  " if last else "│ "))


def _places(number: DeviceNumber) -> list[str]:
    """Return where a device is mounted in this process's mount namespace, the latest first, and ``[SWAP]``."""
    users = users_of(number)
    mounts = [user.name for user in users if user.kind == "mount" and user.pid is None and user.number == number]
    swap = ["[SWAP]" for user in users if user.kind == "swap" and user.number == number]
    return [*reversed(mounts), *swap]


def lsblk_size(count: int) -> str:
    """
    Return a number of bytes as ``lsblk`` writes it: one digit after the point at the most.

    >>> lsblk_size(64 << 20), lsblk_size(1536 << 20), lsblk_size(512)
    ('64M', '1.5G', '512B')
    """
    exponent = max((count.bit_length() - 1) // 10, 0)
    unit = _STEP**exponent
    whole, rest = divmod(count, unit)
    tenths = (rest * 10 + unit // 2) // unit
    whole, tenths = (whole + 1, 0) if tenths == len("0123456789") else (whole, tenths)
    return f"{whole}{f'.{tenths}' if tenths else ''}{_UNITS[exponent]}"


def tear_down(
    *devices: Device | LoopDevice | DeviceNumber | str | PathLike[str],
    foreign: bool = False,
    detach_loops: bool = False,
    timeout: float = REMOVE_TIMEOUT,
    on_step: Callable[[BlockDevice], None] | None = None,
) -> list[BlockDevice]:
    """
    Remove mapped devices and all mapped devices that stand on them, users first. Data below them is not touched.

    It is seen beforehand that all of it may go: then either all goes or, if something gets into use meanwhile, it stops
    there, and what was removed until then has been reported.

    Args:
        *devices: The lowest devices that are to go: objects, numbers, or paths.
        foreign: Remove devices of other programs as well; see :class:`dmlib.Device`.
        detach_loops: Detach loop devices as well: those among *devices*, those that stand on them, and those below them
            that nothing else uses.
        timeout: Seconds for which a busy device is tried again.
        on_step: Called with each device after it has gone.

    Returns:
        What has gone, in order.

    Raises:
        ArgumentError: There is no block device at a path.
        DeviceNotFoundError: There is no device of a number; or one is neither a mapped device nor a loop device that
            may be detached.
        DeviceBusyError: Something is mounted, swapped to, open, or used by a device of another kind.
        ForeignDeviceError: A device belongs to another program.
        UnsupportedError: ``/sys`` is not mounted.
    """
    tree = DeviceTree.read()
    asked = [_known(tree, _number(device)) for device in devices]
    order = tree.users_first(asked)
    loops = _loops_below(tree, order) if detach_loops else []
    _check(order, foreign=foreign, loops=detach_loops, deadline=time.monotonic() + timeout)
    gone = []
    for device in (*order, *loops):
        if device.is_mapped:
            Device(device.name, foreign=True).remove(timeout=timeout)
        else:
            LoopDevice(f"/dev/{device.kernel_name}").detach(timeout=timeout)
        gone.append(device)
        if on_step is not None:
            on_step(device)
    return gone


def _number(device: Device | LoopDevice | DeviceNumber | str | PathLike[str]) -> DeviceNumber:
    return device.info().number if isinstance(device, Device) else device_number(device)


def _known(tree: DeviceTree, number: DeviceNumber) -> BlockDevice:
    if number not in tree.devices:
        raise DeviceNotFoundError("tear_down", str(number), None)
    return tree.devices[number]


def _loops_below(tree: DeviceTree, order: Sequence[BlockDevice]) -> list[BlockDevice]:
    """Return loop devices below *order* that stand for nothing else."""
    going = {device.number for device in order}
    below = {loop.number: loop for device in order for loop in tree.below(device) if loop.number not in going}
    return [loop for loop in below.values() if loop.backing_file and going.issuperset(loop.holders)]


def _check(order: Sequence[BlockDevice], *, foreign: bool, loops: bool, deadline: float) -> None:
    going = {device.number for device in order}
    for device in order:
        if not device.is_mapped and not (loops and device.backing_file):
            reason = "is neither a mapped device nor a loop device that may be detached"
            raise DeviceNotFoundError("tear_down", device.name, None, log=(reason,))
        owner = owner_of(device.uuid)
        if owner is not None and owner.foreign and not foreign:
            raise ForeignDeviceError("tear_down", device.name, device.uuid, str(owner))
    for device in order:
        while users := [one for one in users_of(device.number) if one.kind != "holder" or one.number not in going]:
            # udev and blkid open new devices for a moment; everything else has come to stay.
            if time.monotonic() > deadline or any(user.kind != "opener" for user in users):
                raise DeviceBusyError("tear_down", device.name, None, users=[str(user) for user in users])
            time.sleep(_PAUSE)
