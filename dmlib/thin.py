# SPDX-License-Identifier: MIT
"""
Thin pools and the thin devices in them.

A pool is a mapped device that hands out blocks of a data device and keeps the books on a metadata device. A thin
device is a number in that pool (the thin id) and, while active, a mapped device over it. The pool stores neither the
name nor the size of a thin device: whoever made it must remember both.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Self

from dmlib import blockdev, ids
from dmlib._active import active_by_uuid, is_thin
from dmlib._pool import PoolMessage
from dmlib._pool_life import PoolFeatures, PoolLife
from dmlib._quiesce import check_room, turn, write_back
from dmlib._undo import Undo
from dmlib.device import REMOVE_TIMEOUT, SUSPEND_TIMEOUT, Device
from dmlib.errors import ArgumentError, DeviceExistsError, StateError
from dmlib.operations import Operation
from dmlib.section import run_section
from dmlib.table import Table
from dmlib.targets.thin import ThinStatus, ThinTarget
from dmlib.task import Task
from dmlib.udev import UdevFlags
from dmlib.units import Sectors, Size, as_sectors

if TYPE_CHECKING:
    from dmlib._pool_life import DeviceLike
    from dmlib.results import DeviceInfo

__all__ = ["PoolFeatures", "ThinDevice", "ThinPool"]


class ThinPool(PoolLife):
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

    def thin(
        self,
        thin_id: int,
        size: Size,
        *,
        name: str | None = None,
        external_origin: DeviceLike | None = None,
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
        external_origin: DeviceLike | None = None,
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

        Cost: two ioctls, and four to activate.

        Source: DM_TARGET_MSG, ``create_thin``.
        """
        thin = self.thin(thin_id, size, name=name, external_origin=external_origin)
        message = PoolMessage(self, "create_thin", thin_id)
        with Undo(f"create_thin {thin_id}") as undo:
            undo.push(thin._take_back, after=message)  # noqa: SLF001 - one concern in two classes
            message.run()
            if activate:
                thin._map(self.number)  # noqa: SLF001
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
        external_origin: DeviceLike | None = None,
    ) -> None:
        self.pool: Final = pool
        self.thin_id: Final = ids.check_thin_id(thin_id)
        self.size = _check_size(size)
        name = f"{pool.name}-thin-{thin_id}" if name is None else name
        self.device: Final = Device(name, foreign=pool.device.foreign)
        origin = None if external_origin is None else ids.device_number(external_origin, "external_origin")
        self.external_origin: Final = origin

    @classmethod
    def open(cls, name: str, *, foreign: bool = False) -> Self:
        """
        Take hold of an active thin device, whoever made it; nothing is changed.

        Args:
            name: Name of its mapped device.
            foreign: See :meth:`ThinPool.open`.

        Raises:
            DeviceNotFoundError: There is no such device.
            StateError: It is not a thin device.

        Cost: three ioctls.
        """
        table = Device(name).table()
        target = None if table is None else table[0].target
        if table is None or not isinstance(target, ThinTarget):
            raise StateError(name, "is not an active thin device")
        pool_name = Task(Operation.INFO, number=ids.device_number(target.pool)).run().device.name
        pool = ThinPool.open(pool_name, foreign=foreign)
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

    def activate(self, *, udev: UdevFlags = UdevFlags.NONE) -> None:
        """
        Map the thin id to a device at :attr:`path`. An id is never mapped twice, though the kernel would do it.

        Args:
            udev: What udev's rules leave out for the device.

        Raises:
            DeviceExistsError: The id is active already, or the name is taken.
            TargetRefusedError: The pool has no such id, is suspended, or has failed.

        Cost: three ioctls, and at most two to see that nobody else has the id active, if all devices on the pool are
        dmlib's.
        """
        pool = self.pool.device.info()
        foreign = self.pool._active_elsewhere(pool, self.thin_id)  # noqa: SLF001 - ours are told by their uuid, see _map
        if foreign is not None:
            raise DeviceExistsError("activate", self._label(foreign), None)
        self._map(pool.number, udev)

    def _map(self, pool: ids.DeviceNumber, udev: UdevFlags = UdevFlags.NONE) -> None:
        table = Table.single(self.size, ThinTarget(pool, self.thin_id, self.external_origin))
        try:
            Device.create(self.name, table, uuid=self.uuid, udev=udev)
        except DeviceExistsError as error:
            active = self.active()
            if active is None:
                raise
            raise DeviceExistsError("activate", self._label(active), error.errno, log=error.log) from None

    def _label(self, active: DeviceInfo) -> str:
        return f"thin {self.thin_id} of {self.pool.name} (as {active.name})"

    def deactivate(self, *, deferred: bool = False, timeout: float = REMOVE_TIMEOUT) -> None:
        """
        Unmap the thin id; its data stays in the pool.

        Args:
            deferred: If the device is in use, let the kernel unmap it when the last user closes it.
            timeout: Seconds for which a busy device is tried again.

        Raises:
            DeviceNotFoundError: It is not active under this name.
            StateError: The device of this name is another one.
            DeviceBusyError: It is in use; ``users`` says by whom.
        """
        ours = self.device.info().uuid == self.uuid
        if not ours and not is_thin(self.device, self.pool.number, self.thin_id):
            raise StateError(self.name, f"is not thin {self.thin_id} of {self.pool.name}")
        self.device.remove(deferred=deferred, timeout=timeout)

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
            StateError: The device is suspended.
            OutOfDataSpaceError: To shrink it, it has to be suspended; see :meth:`snapshot`.
            SuspendTimeoutError: See ``Device.suspend``.

        Cost: six ioctls if active; three more to shrink.
        """
        wanted = _check_size(size)
        active = self.active()
        table = Device(active.name).table() if active else None
        now = table.length if table else self.size
        if wanted < now and not shrink:
            raise ArgumentError("size", wanted, f"is less than {now}; shrink=True cuts off what is beyond")
        if active and table and wanted != now:
            if wanted < now:  # what is cut off must not be in flight; growing holds back nothing that could get lost
                timeout = self._make_idle(active, "resize", timeout)
            longer = Table.single(wanted, table[0].target)
            replace(self.device, name=active.name).reload(
                longer, flush=wanted < now, lockfs=wanted < now, timeout=timeout
            )
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
            StateError: The pool is suspended; or a suspended origin was resumed meanwhile.
            PoolError: The pool takes no changes; the subclass says why.
            SuspendTimeoutError: The kernel took longer. The origin is resumed, if it ever gets suspended.

        Source: kernel admin-guide, thin-provisioning: a snapshot of an active origin needs it suspended.
        """
        begin = time.monotonic()
        with turn(self.uuid, self.name, timeout):
            rest = None if timeout is None else max(0.001, timeout - (time.monotonic() - begin))
            return self._snapshot(thin_id, name=name, activate=activate, timeout=rest)

    def _snapshot(self, thin_id: int, *, name: str | None, activate: bool, timeout: float | None) -> ThinDevice:
        message = PoolMessage(self.pool, "create_snap", thin_id, self.thin_id)
        origin = self.active()
        in_use = origin is not None and origin.live_table
        size = blockdev.size_of(origin.number) if origin and in_use else self.size
        snap = ThinDevice(self.pool, thin_id, size, name=name, external_origin=self.external_origin)
        with Undo(f"snapshot {thin_id} of thin {self.thin_id}") as undo:
            undo.push(snap._take_back, after=message)
            with message.explained():
                if origin and in_use and not origin.suspended:
                    rest = self._make_idle(origin, "create_snap", timeout)
                    run_section([replace(self.device, name=origin.name).hold()], [message.task], timeout=rest)
                else:
                    message.task.run()
            if origin and origin.suspended and not Device(origin.name).info().suspended:
                raise StateError(
                    origin.name, "was resumed by somebody while the snapshot was made; it is deleted again"
                )
            if activate:
                snap._map(self.pool.number, UdevFlags.SNAPSHOT)  # by-uuid links stay with the origin
        return snap

    def _make_idle(self, active: DeviceInfo, verb: str, timeout: float | None) -> float | None:
        """See to it that a suspend of the device in use will be short; return what is left of *timeout*."""
        if active.internal_suspend:
            raise StateError(self.pool.name, f"is suspended; {verb} would wait for its resume")
        deadline = None if timeout is None else time.monotonic() + timeout
        pool, block_size = self.pool.name, self.pool.data_block_size
        self.pool.check_writable(verb)  # in a pool that is not, a write-back fails with a bare EIO
        write_back(
            active.number,
            label=active.name,
            timeout=timeout,
            look=lambda: check_room(pool, self.pool.status(), block_size, Sectors(0)),
        )
        check_room(pool, self.pool.check_writable(verb), block_size, blockdev.size_of(active.number))
        return None if deadline is None else max(0.001, deadline - time.monotonic())

    def _take_back(self) -> None:
        """Undo the making of the thin id, and of its device if that got as far as mapping the new id."""
        active = active_by_uuid(self.uuid)
        if active and active.name == self.name and is_thin(self.device, self.pool.number, self.thin_id):
            self.device.remove()
        self.delete()


def _check_size(size: Size) -> Sectors:
    sectors = as_sectors(size, "size")
    if not sectors:
        raise ArgumentError("size", sectors, "must not be zero")
    return sectors
