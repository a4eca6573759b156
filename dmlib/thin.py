# SPDX-License-Identifier: MIT
"""
Thin pools and the thin devices in them.

A pool is a mapped device that hands out blocks of a data device and keeps the books on a metadata device. A thin
device is a number in that pool (the thin id) and, while active, a mapped device over it. The pool stores neither the
name nor the size of a thin device: whoever made it must remember both.
"""

from __future__ import annotations

import secrets
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Self, TypedDict, Unpack

from dmlib import blockdev, ids
from dmlib._pool import LivePool
from dmlib._quiesce import check_room, write_back
from dmlib._undo import Undo
from dmlib.device import REMOVE_TIMEOUT, SUSPEND_TIMEOUT, Device
from dmlib.errors import ArgumentError, DeviceBusyError, DeviceExistsError, StateError
from dmlib.section import run_section
from dmlib.table import Table
from dmlib.targets.thin import ThinStatus, ThinTarget, check_data_block_size, check_metadata_size
from dmlib.targets.thin_pool import ThinPoolTarget
from dmlib.task import Operation, Task
from dmlib.udev import UdevFlags
from dmlib.units import DataBlocks, Sectors, Size, as_sectors
from dmlib.usage import users_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    from dmlib.task import DeviceInfo


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


class ThinPool(LivePool):
    """
    A thin pool that the kernel runs, by the name of its mapped device.

    Like :class:`dmlib.Device` it is a name, not a handle: the pool outlives the object and the process. Open one with
    :meth:`open`, make one with :meth:`create`, start one that exists on disk with :meth:`activate`.

    Attributes:
        device: The pool's mapped device.
        metadata_device: Number of the device that holds the mappings.
        data_device: Number of the device that holds the blocks.
        data_block_size: Size of a block.
    """

    @classmethod
    def create(
        cls,
        name: str,
        *,
        metadata: str | PathLike[str],
        data: str | PathLike[str] | ids.DeviceNumber,
        data_block_size: Size,
        format: bool = False,  # noqa: A002 - the field's word for it
        **features: Unpack[PoolFeatures],
    ) -> Self:
        """
        Make a new, empty pool of two block devices and start it. All of it happens, or nothing stays.

        Args:
            name: Name of the pool's mapped device.
            metadata: The device for the mappings, at least 2 MiB; its first 4 KiB must be zero.
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
        path = blockdev.node_of(ids.device_number(target.metadata_device))
        check_metadata_size(blockdev.size_of(ids.device_number(target.metadata_device)), "metadata")
        _check_not_claimed(target)
        block = blockdev.read_first_block(path)
        if any(block) and not format:
            what = "a thin pool (start it with ThinPool.activate)" if blockdev.parse_superblock(block) else "data"
            raise ArgumentError("metadata", str(metadata), f"holds {what}; format=True erases it")
        table = _pool_table(target)
        with Undo(f"create pool {name}") as undo:
            # The kernel formats the metadata when the table is loaded; blank again, the next attempt finds it so.
            undo.push(lambda: blockdev.zero_first_block(path))
            if any(block):
                blockdev.zero_first_block(path)
            return cls._start(name, table)

    @classmethod
    def activate(
        cls,
        name: str,
        *,
        metadata: str | PathLike[str],
        data: str | PathLike[str] | ids.DeviceNumber,
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
        _check_not_claimed(target)
        return cls._start(name, _pool_table(target))

    @classmethod
    def _start(cls, name: str, table: Table) -> Self:
        uuid = f"{ids.UUID_PREFIX}{table.devices[0]}-pool"
        device = Device.create(name, table, uuid=uuid, udev=UdevFlags.PRIVATE)
        with Undo(f"start pool {name}") as undo:
            undo.push(device.remove)
            return cls(name)

    @classmethod
    @contextmanager
    def temporary(
        cls,
        *,
        metadata: str | PathLike[str],
        data: str | PathLike[str] | ids.DeviceNumber,
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
        thins = self._thins_of_ours()
        for device in thins:
            info = device.info()
            if info.open_count and not _wait_until_closed(device, timeout):
                raise DeviceBusyError("deactivate", device.name, users=[str(user) for user in users_of(info.number)])
        for device in thins:
            device.remove(timeout=timeout)
            self._count_explained(-1)
        self.device.remove(timeout=timeout)

    def _thins_of_ours(self) -> list[Device]:
        holders = blockdev.mapped_holders(self.number)
        foreign = [name for name, uuid in holders if not uuid.startswith(ids.UUID_PREFIX)]
        if foreign:
            raise DeviceBusyError(
                "deactivate", self.name, users=[f"the device {name}, not dmlib's" for name in foreign]
            )
        return [Device(name) for name, _ in holders]

    # -- thin devices

    def thin(
        self,
        thin_id: int,
        size: Size,
        *,
        name: str | None = None,
        external_origin: str | PathLike[str] | ids.DeviceNumber | None = None,
    ) -> ThinDevice:
        """
        Name a thin device whose id is in the pool already; asks the kernel nothing and changes nothing.

        Args:
            thin_id: Its number in the pool.
            size: Its size, which the pool does not know.
            name: Name of its mapped device; ``<pool>-thin-<id>`` by default.
            external_origin: The device outside of the pool that it was made over, if it was.
        """
        return ThinDevice(self, thin_id, size, name=name, external_origin=external_origin)

    def create_thin(
        self,
        thin_id: int,
        size: Size,
        *,
        name: str | None = None,
        external_origin: str | PathLike[str] | ids.DeviceNumber | None = None,
        activate: bool = True,
    ) -> ThinDevice:
        """
        Make an empty thin device and activate it. All of it happens, or nothing stays.

        Args:
            thin_id: Its number in the pool, 0..16777215.
            size: Its size; it takes space only as it is written.
            name: Name of its mapped device; ``<pool>-thin-<id>`` by default.
            external_origin: A device outside of the pool that is read where nothing was written yet. Nobody may write
                to it any more, and each descendant needs it as well.
            activate: Make the mapped device. Without, only the id is made, by one message.

        Raises:
            ArgumentError: An id, name or size that breaks a rule.
            DeviceExistsError: The id or the name is in use.
            PoolError: The pool takes no changes; the subclass says why.

        Cost: one ioctl, and three to activate.

        Source: DM_TARGET_MSG, ``create_thin``.
        """
        thin = self.thin(thin_id, size, name=name, external_origin=external_origin)
        message = self._create_message(thin_id)
        with Undo(f"create_thin {thin_id}") as undo:
            undo.push(lambda: self.delete(thin_id), after=message)
            with self._explaining("create_thin", thin_id):
                message.run()
            if activate:
                thin._map(UdevFlags.NONE)  # noqa: SLF001 - one concern in two classes
        return thin


class ThinDevice:
    """
    A thin device: its number in a pool, its size, and the name of its mapped device while it is active.

    Args:
        pool: The pool.
        thin_id: Its number there, 0..16777215.
        size: Its size.
        name: Name of its mapped device; ``<pool>-thin-<id>`` by default.
        external_origin: The device outside of the pool that it was made over, if any.

    Attributes:
        device: Its mapped device, which exists while it is active.

    Raises:
        ArgumentError: An id, name or size that breaks a rule.
    """

    def __init__(
        self,
        pool: ThinPool,
        thin_id: int,
        size: Size,
        *,
        name: str | None = None,
        external_origin: str | PathLike[str] | ids.DeviceNumber | None = None,
    ) -> None:
        self.pool: Final = pool
        self.thin_id: Final = ids.check_thin_id(thin_id)
        self.size = _check_size(size)
        self.device: Final = Device(f"{pool.name}-thin-{thin_id}" if name is None else name)
        origin = None if external_origin is None else ids.device_number(external_origin, "external_origin")
        self.external_origin: Final = origin

    @classmethod
    def open(cls, name: str) -> Self:
        """
        Take hold of an active thin device, whoever made it; nothing is changed.

        Raises:
            DeviceNotFoundError: There is no such device.
            StateError: It is not a thin device.

        Cost: three ioctls.
        """
        table = Device(name).table()
        target = None if table is None else table[0].target
        if table is None or not isinstance(target, ThinTarget):
            raise StateError(name, "is not an active thin device")
        pool = ThinPool.open(Task(Operation.INFO, number=ids.device_number(target.pool)).run().device.name)
        return cls(pool, target.thin_id, table.length, name=name, external_origin=target.external_origin)

    def __repr__(self) -> str:
        return f"<ThinDevice {self.thin_id} of {self.pool.name}, {self.size}, {self.name!r}>"

    def __fspath__(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        """Name of its mapped device."""
        return self.device.name

    @property
    def path(self) -> str:
        """Path of its node below ``/dev/mapper``, which exists while it is active."""
        return self.device.path

    @property
    def uuid(self) -> str:
        """The uuid that its mapped device carries; it keeps an id from being activated twice."""
        return self.pool.uuid_of(self.thin_id)

    def active(self) -> DeviceInfo | None:
        """Return the device that has this thin id active, under whatever name; ``None`` if none has."""
        return self.pool.active(self.thin_id)

    def _table(self, pool: ids.DeviceNumber) -> Table:
        return Table.single(self.size, ThinTarget(pool, self.thin_id, self.external_origin))

    def activate(self, *, udev: UdevFlags = UdevFlags.NONE) -> None:
        """
        Map the thin id to a device at :attr:`path`. An id is never mapped twice, though the kernel would do it.

        Args:
            udev: What udev's rules leave out for the device.

        Raises:
            DeviceExistsError: The id is active already, or the name is taken.
            TargetRefusedError: The pool has no such id, is suspended, or has failed.

        Cost: three ioctls and at most two to see that nobody else has the id active, if all devices on the pool are
        dmlib's.
        """
        foreign = self.pool._foreign(self.thin_id)  # noqa: SLF001 - ours are told by their uuid, see _map
        if foreign is not None:
            raise DeviceExistsError("activate", f"thin {self.thin_id} of {self.pool.name} (as {foreign.name})", None)
        self._map(udev)

    def _map(self, udev: UdevFlags) -> None:
        table = self._table(self.pool.number)
        try:
            Device.create(self.name, table, uuid=self.uuid, udev=udev)
        except DeviceExistsError as error:
            active = self.active()
            if active is None:
                raise
            label = f"thin {self.thin_id} of {self.pool.name} (as {active.name})"
            raise DeviceExistsError("activate", label, error.errno, log=error.log) from None
        self.pool._count_explained(+1)  # noqa: SLF001

    def deactivate(self, *, deferred: bool = False, timeout: float = REMOVE_TIMEOUT) -> None:
        """
        Unmap the thin id; its data stays in the pool.

        Args:
            deferred: If the device is in use, let the kernel unmap it when the last user closes it.
            timeout: Seconds for which a busy device is tried again.

        Raises:
            DeviceNotFoundError: It is not active under this name.
            DeviceBusyError: It is in use; ``users`` says by whom.
        """
        self.device.remove(deferred=deferred, timeout=timeout)
        self.pool._count_explained(-1)  # noqa: SLF001

    def status(self, *, flush: bool = False) -> ThinStatus:
        """
        Return how much of the device has blocks.

        Args:
            flush: Commit the pool's metadata first, so that blocks allocated just now are counted.

        Raises:
            DeviceNotFoundError: It is not active under this name.
            StateError: It is not bound to its pool, or the pool has failed.

        Cost: one ioctl.
        """
        segments = self.device.status(flush=flush)
        status = segments[0].status if segments else None
        if not isinstance(status, ThinStatus):
            raise StateError(self.name, f"has no figures (status {getattr(status, 'raw', '')!r})")
        return status

    def delete(self) -> None:
        """
        Delete the thin id from the pool: its data is lost. It must not be active.

        Raises:
            DeviceBusyError: It is active.
            DeviceNotFoundError: There is no such id.
            PoolError: The pool takes no changes; the subclass says why.
        """
        self.pool.delete(self.thin_id)

    def resize(self, size: Size, *, shrink: bool = False, timeout: float | None = SUSPEND_TIMEOUT) -> None:
        """
        Give the device another size, while in use as well. A file system on it is not touched.

        Args:
            size: The new size.
            shrink: Allow a smaller one: what lies beyond cannot be reached any more (and keeps its blocks).
            timeout: See ``Device.suspend``.

        Raises:
            ArgumentError: Smaller, without *shrink*; or no size.
            SuspendTimeoutError: See ``Device.suspend``.

        Cost: eight ioctls if active.
        """
        wanted = _check_size(size)
        if wanted < self.size and not shrink:
            raise ArgumentError("size", wanted, f"is less than {self.size}; shrink=True cuts off what is beyond")
        info = self.active()
        if info is not None:
            table = Table.single(wanted, ThinTarget(self.pool.number, self.thin_id, self.external_origin))
            # Growing holds nothing back that could get lost; only what is cut off must not be in flight.
            Device(info.name).reload(table, flush=shrink, lockfs=shrink, timeout=timeout)
        self.size = wanted

    def snapshot(
        self,
        thin_id: int,
        *,
        name: str | None = None,
        activate: bool = True,
        timeout: float | None = SUSPEND_TIMEOUT,
    ) -> ThinDevice:
        """
        Make a snapshot and activate it; the origin may be in use. All of it happens, or nothing stays.

        An active origin is suspended for the moment in which the pool makes the snapshot: dirty data is written back
        first, then it is seen to that the pool has room, then suspend, message and resume follow in one call of C.
        An inactive origin needs none of that, and one that is suspended already stays so.

        Args:
            thin_id: Number of the snapshot in the pool.
            name: Name of its mapped device; ``<pool>-thin-<id>`` by default.
            activate: Make the mapped device. Without, only the id is made.
            timeout: Seconds that write-back and suspend may take; ``None`` waits for ever.

        Returns:
            The snapshot, as large as the origin.

        Raises:
            ArgumentError: An id or name that breaks a rule.
            DeviceExistsError: The id or the name is in use.
            DeviceNotFoundError: The pool does not have the origin.
            OutOfDataSpaceError: The pool may not have the room that a suspend needs. Grow it first.
            PoolError: The pool takes no changes; the subclass says why.
            SuspendTimeoutError: The kernel took longer. The origin is resumed, if it ever gets suspended.

        Source: kernel admin-guide, thin-provisioning: a snapshot of an active origin needs it suspended.
        """
        snap = ThinDevice(self.pool, thin_id, self.size, name=name, external_origin=self.external_origin)
        message = self.pool._snap_message(thin_id, self.thin_id)  # noqa: SLF001
        origin = self.active()
        with Undo(f"snapshot {thin_id} of thin {self.thin_id}") as undo:
            undo.push(snap.delete, after=message)
            with self.pool._explaining("create_snap", thin_id, self.thin_id):  # noqa: SLF001
                if origin is None or origin.suspended:
                    message.run()
                else:
                    self._snapshot_of_active(origin, message, timeout)
            if activate:
                snap._map(UdevFlags.LOW_PRIORITY)  # by-uuid links stay with the origin
        return snap

    def _snapshot_of_active(self, origin: DeviceInfo, message: Task, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        write_back(
            origin.number,
            label=origin.name,
            timeout=timeout,
            look=lambda: check_room(self.pool.name, self.pool.status(), self.pool.data_block_size, Sectors(0)),
        )
        status = self.pool.check_writable("create_snap")
        check_room(self.pool.name, status, self.pool.data_block_size, self.size)
        rest = None if deadline is None else max(0.001, deadline - time.monotonic())
        run_section([Device(origin.name).hold()], [message], timeout=rest)


def _check_size(size: Size) -> Sectors:
    sectors = as_sectors(size, "size")
    if not sectors:
        raise ArgumentError("size", sectors, "must not be zero")
    return sectors


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
