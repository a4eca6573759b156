# SPDX-License-Identifier: MIT
"""How a thin pool comes into being, starts again after a reboot, grows and changes, and is taken down."""

from __future__ import annotations

import errno
import secrets
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, TypedDict, Unpack

from dmlib import blockdev, ids
from dmlib._active import holders_of
from dmlib._pool import LivePool
from dmlib._undo import Undo
from dmlib.device import REMOVE_TIMEOUT, Device
from dmlib.errors import (
    ArgumentError,
    DeviceBusyError,
    OutOfDataSpaceError,
    OutOfMetadataSpaceError,
    TargetRefusedError,
)
from dmlib.operations import Operation
from dmlib.table import Table
from dmlib.targets.thin import METADATA_MAX, check_data_block_size, check_metadata_size
from dmlib.targets.thin_pool import ThinPoolTarget
from dmlib.task import Task
from dmlib.udev import UdevFlags
from dmlib.units import DataBlocks, MetaBlocks, Size, as_sectors
from dmlib.usage import users_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    from dmlib.targets.thin_pool import ThinPoolStatus

DeviceLike: TypeAlias = "str | PathLike[str] | ids.DeviceNumber"
"""What public calls take as a block device: its path, an object that has one, or its number."""

_METADATA_FIRST_WRITE: Final = MetaBlocks(7)
"""What must be free in a new pool for the first write to a thin device to be committed; measured."""


class PoolFeatures(TypedDict, total=False):
    """
    How a pool behaves while it is live; each may be left out.

    Attributes:
        low_water_mark: Free blocks at which the kernel sends an event; 0 blocks by default.
        zero_new_blocks: Zero a block before a thin device sees it (the default). Without, it may see what others
            deleted.
        discard: Take discards, which give blocks back to the pool (the default).
        discard_passdown: Hand discards on to the data device, if that can take them (the default).
        read_only: Let nobody change the metadata.
        error_if_no_space: With no block left, fail writes at once. By default they are queued, for the 60 s of the
            kernel module's ``no_space_timeout``.
    """

    low_water_mark: DataBlocks
    zero_new_blocks: bool
    discard: bool
    discard_passdown: bool
    read_only: bool
    error_if_no_space: bool


class PoolLife(LivePool):
    """A pool from its making to its taking down; see :class:`dmlib.ThinPool`, which is the public name."""

    @classmethod
    def create(
        cls,
        name: str,
        *,
        metadata: DeviceLike,
        data: DeviceLike,
        data_block_size: Size,
        format: bool = False,  # noqa: A002 - the field's word for it
        **features: Unpack[PoolFeatures],
    ) -> Self:
        """
        Make a new, empty pool of two block devices and start it. All of it happens, or nothing stays.

        Args:
            name: Name of the pool's mapped device.
            metadata: The device for the mappings, at least 68 KiB; its first 4 KiB must be zero. See
                ``recommended_metadata_size`` for how large to make it.
            data: The device for the blocks.
            data_block_size: 64 KiB..1 GiB, a multiple of 64 KiB; fixed for the life of the pool.
            format: Erase what is on the metadata device, and with it every mapping of a pool that is there.
            **features: See :class:`PoolFeatures`.

        Returns:
            The pool, live.

        Raises:
            ArgumentError: A size or name that breaks a rule, or a metadata device that is not blank.
            DeviceBusyError: One of the devices is claimed by somebody.
            DeviceExistsError: The name is taken.
            OutOfMetadataSpaceError: The metadata device is too small for a data device of so many blocks.
            TargetRefusedError: The kernel would not; ``kernel_log`` tends to say why.

        Source: kernel admin-guide, thin-provisioning.
        """
        target = ThinPoolTarget(
            ids.device_number(metadata, "metadata"),
            ids.device_number(data, "data"),
            data_block_size,
            **features,
        )
        if target.read_only:
            raise ArgumentError("read_only", True, "a new pool has to be written")
        number = ids.device_number(target.metadata_device)
        check_metadata_size(blockdev.size_of(number), "metadata")
        table = _pool_table(target)
        _check_not_claimed(target)
        path = blockdev.node_of(number)
        block = blockdev.read_first_block(path)
        if any(block) and not format:
            what = "a thin pool (start it with ThinPool.activate)" if blockdev.parse_superblock(block) else "data"
            raise ArgumentError("metadata", str(metadata), f"holds {what}; format=True erases it")
        with Undo(f"create pool {name}") as undo:
            # The name is claimed before anything is erased. The kernel formats the metadata when the table is loaded;
            # blank again, the next attempt finds it so.
            device, claim = _claim(name, number)
            undo.push(lambda: blockdev.zero_first_block(path), after=claim)
            undo.push(device.remove, after=claim)
            claim.run()
            if any(block):
                blockdev.zero_first_block(path)
            blocks = DataBlocks(table.length // target.data_block_size)
            try:
                device.load(table)
                device.resume(udev=UdevFlags.PRIVATE)
            except TargetRefusedError as refusal:
                if refusal.errno == errno.ENOSPC:
                    raise _too_small(name, None, blocks) from refusal
                raise
            pool = cls(name)
            pool._check_formatted(blocks)
        return pool

    def _check_formatted(self, blocks: DataBlocks) -> None:
        # With too little metadata the kernel may start the pool all the same: read-only, its first transaction taken
        # back, or with so little left that this happens at the first write.
        status = self.status()
        if status.total_data != blocks or status.needs_check or status.free_metadata < _METADATA_FIRST_WRITE:
            raise _too_small(self.name, status, blocks)

    @classmethod
    def activate(
        cls,
        name: str,
        *,
        metadata: DeviceLike,
        data: DeviceLike,
        **features: Unpack[PoolFeatures],
    ) -> Self:
        """
        Start a pool that is on its devices already, as after a reboot. Its block size is read from its metadata.

        Args:
            name: Name of the pool's mapped device.
            metadata: The device with the mappings.
            data: The device with the blocks.
            **features: See :class:`PoolFeatures`.

        Returns:
            The pool, live.

        Raises:
            ArgumentError: There is no thin pool on the metadata device. (The kernel would format a blank one.)
            DeviceBusyError: One of the devices is claimed by somebody.
            DeviceExistsError: The name is taken.
            TargetRefusedError: The kernel would not: damaged metadata, a data device that is too small ...
        """
        number = ids.device_number(metadata, "metadata")
        superblock = blockdev.parse_superblock(blockdev.read_first_block(blockdev.node_of(number)))
        if superblock is None:
            raise ArgumentError("metadata", str(metadata), "holds no thin pool; ThinPool.create makes one")
        target = ThinPoolTarget(
            number,
            ids.device_number(data, "data"),
            superblock.data_block_size,
            **features,
        )
        table = _pool_table(target)
        _check_not_claimed(target)
        with Undo(f"start pool {name}") as undo:
            device, claim = _claim(name, number)
            undo.push(device.remove, after=claim)
            claim.run()
            device.load(table)
            device.resume(udev=UdevFlags.PRIVATE)
            return cls(name)

    @classmethod
    @contextmanager
    def temporary(
        cls,
        *,
        metadata: DeviceLike,
        data: DeviceLike,
        data_block_size: Size,
        name: str | None = None,
        format: bool = False,  # noqa: A002
        **features: Unpack[PoolFeatures],
    ) -> Iterator[Self]:
        """
        Make a pool, as :meth:`create`, that is taken down with its thin devices when the ``with`` block ends.

        What is on the two devices stays there.

        Args:
            metadata: See :meth:`create`.
            data: See :meth:`create`.
            data_block_size: See :meth:`create`.
            name: Name of the pool's mapped device; a random one by default.
            format: See :meth:`create`.
            **features: See :class:`PoolFeatures`.

        Raises:
            DeviceBusyError: At the end: a thin device is still in use, so all stay.
        """
        name = f"dmlib-{secrets.token_hex(6)}" if name is None else name
        pool = cls.create(
            name, metadata=metadata, data=data, data_block_size=data_block_size, format=format, **features
        )
        try:
            yield pool
        finally:
            if pool.device.exists():
                pool.deactivate()

    def deactivate(self, *, timeout: float = REMOVE_TIMEOUT) -> None:
        """
        Take the pool down: first its thin devices that dmlib activated, then itself. What is on disk stays.

        Nothing is removed if a thin device is in use, or if a device of another program stands on the pool.

        Args:
            timeout: Seconds for which a busy device is tried again.

        Raises:
            DeviceNotFoundError: The pool is not there.
            DeviceBusyError: A device is in use; ``users`` says by whom.
        """
        thins = []
        for holder in holders_of(self.number):
            if not (holder.uuid or "").startswith(ids.UUID_PREFIX):
                users = [f"the device {holder.name}, not dmlib's"]
                raise DeviceBusyError("deactivate", self.name, users=users)
            thins.append(Device(holder.name))
        for device in thins:
            info = device.info()
            if info.open_count and not _wait_until_closed(device, timeout):
                raise DeviceBusyError("deactivate", device.name, users=[str(user) for user in users_of(info.number)])
        for device in thins:
            device.remove(timeout=timeout)
        self.device.remove(timeout=timeout)

    # -- changing it while in use

    def grow_data(self, size: Size | None = None) -> None:
        """
        Let the pool use more of its data device, which was made larger before; writes that wait for space go on.

        Args:
            size: New size; by default all of the device. It is rounded down to whole blocks.

        Raises:
            ArgumentError: Smaller than the pool is now (a pool never shrinks), or larger than the device.
            PoolNeedsCheckError: The kernel would ignore the new size until the metadata was checked.
            OutOfMetadataSpaceError: Or until there is metadata space. Grow the metadata first.
            PoolReadOnlyError: Or while the pool is read-only.
            SuspendTimeoutError: See ``Device.suspend``.

        Cost: seven ioctls; no flush.
        """
        device = blockdev.size_of(self.data_device)
        wanted = device if size is None else as_sectors(size, "size")
        if wanted > device:
            raise ArgumentError("size", wanted, f"is more than the data device has ({device})")
        blocks = DataBlocks(wanted // self.data_block_size)
        before = self.check_writable("grow_data")
        if blocks < before.total_data:
            raise ArgumentError("size", wanted, f"is less than the pool has ({before.total_data}); it cannot shrink")
        self._reload(Table.single(blocks.to_sectors(self.data_block_size), self.target()))
        after = self.status()
        if after.total_data != blocks:
            self.check_writable("grow_data")
            raise OutOfDataSpaceError(self.name, after, f"has {after.total_data} after growing, not {blocks.count}")

    def grow_metadata(self) -> None:
        """
        Let the pool use all of its metadata device, which was made larger before.

        Raises:
            ArgumentError: The device is not larger than what the pool uses, or the pool uses all it can (15.88 GiB).
            PoolNeedsCheckError: The kernel would ignore the new size until the metadata was checked.
            PoolReadOnlyError: Or while the pool is read-only.
            SuspendTimeoutError: See ``Device.suspend``.

        Cost: seven ioctls; no flush.
        """
        device = blockdev.size_of(self.metadata_device)
        blocks = MetaBlocks(min(device, METADATA_MAX) // MetaBlocks(1).to_sectors())
        before = self._check_metadata_grows()
        if blocks <= before.total_metadata:
            raise ArgumentError("metadata_device", device, f"has no more than the {before.total_metadata} in use")
        self._reload(self._table_and_target()[0])
        after = self.status()
        if after.total_metadata != blocks:
            self.check_writable("grow_metadata")
            raise OutOfMetadataSpaceError(self.name, after, f"has {after.total_metadata}, not {blocks.count}")

    def _check_metadata_grows(self) -> ThinPoolStatus:
        try:
            return self.check_writable("grow_metadata")
        except OutOfMetadataSpaceError:  # which growing heals
            return self.status()

    def reconfigure(
        self,
        *,
        low_water_mark: DataBlocks | None = None,
        zero_new_blocks: bool | None = None,
        discard_passdown: bool | None = None,
        error_if_no_space: bool | None = None,
        read_only: bool | None = None,
    ) -> None:
        """
        Change the mark or features of a pool in use; what is not named stays.

        (Whether discards are taken at all is fixed when the pool is activated.)

        Args:
            low_water_mark: Free data blocks at which the kernel sends an event.
            zero_new_blocks: Zero blocks before a thin device sees them.
            discard_passdown: Pass discards on to the data device.
            error_if_no_space: Fail writes that find no block, instead of queueing them.
            read_only: Let nobody change the metadata.

        Raises:
            TypeError: A mark that is not DataBlocks.
            TargetRefusedError: The kernel would not; the pool is as before.
            SuspendTimeoutError: See ``Device.suspend``.
        """
        changes: dict[str, Any] = {
            "low_water_mark": low_water_mark,
            "zero_new_blocks": zero_new_blocks,
            "discard_passdown": discard_passdown,
            "error_if_no_space": error_if_no_space,
            "read_only": read_only,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        table, target = self._table_and_target()
        self._reload(Table.single(table.length, replace(target, **changes)))

    def _reload(self, table: Table) -> None:
        self.device.reload(table, flush=False, lockfs=False)


def _claim(name: str, metadata_device: ids.DeviceNumber) -> tuple[Device, Task]:
    device = Device(name)
    return device, Task(Operation.CREATE, name=name, uuid=f"{ids.UUID_PREFIX}{metadata_device}-pool")


def _too_small(name: str, status: ThinPoolStatus | None, blocks: DataBlocks) -> OutOfMetadataSpaceError:
    return OutOfMetadataSpaceError(name, status, f"the metadata device is too small for {blocks}")


def _check_not_claimed(target: ThinPoolTarget) -> None:
    for device in (target.metadata_device, target.data_device):
        with blockdev.exclusive(blockdev.node_of(ids.device_number(device))):
            continue


def _pool_table(target: ThinPoolTarget) -> Table:
    size = blockdev.size_of(ids.device_number(target.data_device))
    blocks = DataBlocks(size // check_data_block_size(target.data_block_size))
    if not blocks:
        raise ArgumentError("data", size, f"is smaller than one block of {target.data_block_size}")
    return Table.single(blocks.to_sectors(target.data_block_size), target)


def _wait_until_closed(device: Device, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while device.info().open_count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
