# SPDX-License-Identifier: MIT
"""
A live thin pool: its status, its messages by thin id, and how it changes while in use.

:class:`dmlib.ThinPool` adds the making and taking down, and the thin devices.
"""

from __future__ import annotations

import errno
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Self

from dmlib import blockdev, ids
from dmlib.device import Device
from dmlib.driver import list_devices
from dmlib.errors import (
    ArgumentError,
    DeviceBusyError,
    DeviceExistsError,
    DeviceNotFoundError,
    OutOfDataSpaceError,
    OutOfMetadataSpaceError,
    PoolFailedError,
    PoolNeedsCheckError,
    PoolReadOnlyError,
    StateError,
    TaskError,
)
from dmlib.table import Table
from dmlib.targets.thin import METADATA_MAX, ThinTarget
from dmlib.targets.thin_pool import PoolMode, ThinPoolStatus, ThinPoolTarget
from dmlib.task import DeviceInfo, Operation, Task
from dmlib.units import DataBlocks, MetaBlocks, Size, as_sectors

if TYPE_CHECKING:
    from collections.abc import Iterator

_U64_LIMIT: Final = (1 << 64) - 1


class LivePool:
    """
    A thin pool that the kernel runs; see :class:`dmlib.ThinPool`, which is the public name.

    Args:
        name: Name of the pool's mapped device.

    Raises:
        DeviceNotFoundError: There is no such device.
        StateError: It is not a thin pool.
    """

    def __init__(self, name: str) -> None:
        self.device: Final = Device(name)
        target = self.target()
        self.metadata_device: Final = ids.device_number(target.metadata_device)
        self.data_device: Final = ids.device_number(target.data_device)
        self.data_block_size: Final = target.data_block_size
        # How often the pool is open by devices of ours, as far as it was checked; see _refuse_foreign.
        self._explained = 0
        self._explained_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @classmethod
    def open(cls, name: str) -> Self:
        """
        Take hold of a live pool, whoever made it; nothing is changed.

        Args:
            name: Name of the pool's mapped device, as in ``/dev/mapper``.

        Raises:
            DeviceNotFoundError: There is no such device.
            StateError: It is not a thin pool.

        Cost: one ioctl.
        """
        return cls(name)

    @property
    def name(self) -> str:
        """Name of the pool's mapped device."""
        return self.device.name

    @property
    def number(self) -> ids.DeviceNumber:
        """Number of the pool's mapped device; asks the kernel."""
        return self.device.info().number

    def target(self) -> ThinPoolTarget:
        """
        Return the parameters of the live table: mark and features as they were asked for.

        Raises:
            DeviceNotFoundError: There is no such device.
            StateError: It is not a thin pool.

        Cost: one ioctl.
        """
        return self._table_and_target()[1]

    def _table_and_target(self) -> tuple[Table, ThinPoolTarget]:
        table = self.device.table()
        if table is not None and isinstance(table[0].target, ThinPoolTarget):
            return table, table[0].target
        raise StateError(self.name, "is not a live thin pool")

    def status(self, *, flush: bool = False) -> ThinPoolStatus:
        """
        Return the pool's figures and mode.

        Args:
            flush: Commit the metadata first, so that blocks allocated just now are counted. Writes, and may wait;
                without it the call answers at once, also from a pool in trouble.

        Raises:
            DeviceNotFoundError: There is no such device.
            PoolFailedError: The pool is in fail mode, or cannot read its own figures.

        Cost: one ioctl.

        Source: DM_TABLE_STATUS; kernel admin-guide, thin-provisioning.
        """
        segments = self.device.status(flush=flush)
        if not segments:
            raise StateError(self.name, "is not a live thin pool")
        status = segments[0].status
        if isinstance(status, ThinPoolStatus):
            return status
        raise PoolFailedError(self.name, status, f"has failed (status {status.raw!r}); repair it off-line")

    # -- messages

    def create_snap(self, thin_id: int, origin_id: int, *, origin_may_be_active: bool = False) -> None:
        """
        Make *thin_id* a snapshot of *origin_id*, by message alone. For an origin in use, ``ThinDevice.snapshot``.

        Args:
            thin_id: The new id.
            origin_id: The id to share all blocks with.
            origin_may_be_active: Do not ask whether the origin is active. The snapshot of an origin that takes
                writes meanwhile is corrupt, and the kernel does not prevent it.

        Raises:
            ArgumentError: An id that does not fit 24 bits.
            StateError: The origin is active and not suspended.
            DeviceExistsError: *thin_id* is in use.
            DeviceNotFoundError: There is no *origin_id*.
            PoolError: The pool takes no changes; the subclass says why.

        Source: DM_TARGET_MSG, ``create_snap``.
        """
        message = self._snap_message(thin_id, origin_id)
        if not origin_may_be_active:
            origin = self.active(origin_id)
            if origin is not None and not origin.suspended:
                raise StateError(f"thin {origin_id} of {self.name}", f"is active as {origin.name} and not suspended")
        with self._explaining("create_snap", thin_id, origin_id):
            message.run()

    def delete(self, thin_id: int) -> None:
        """
        Delete *thin_id*: its data is lost, and blocks that no other id shares are free again.

        Raises:
            ArgumentError: An id that does not fit 24 bits.
            DeviceBusyError: It is active.
            DeviceNotFoundError: There is no such id.
            PoolError: The pool takes no changes; the subclass says why.

        Source: DM_TARGET_MSG, ``delete``.
        """
        self._send("delete", ids.check_thin_id(thin_id))

    def set_transaction_id(self, current: int, new: int) -> None:
        """
        Move the pool's transaction id from *current* to *new*: a compare-and-swap that is committed to disk.

        Raises:
            ArgumentError: A number that does not fit 64 bits.
            StateError: The id is not *current*.
            PoolError: The pool takes no changes; the subclass says why.

        Source: DM_TARGET_MSG, ``set_transaction_id``.
        """
        for field, value in (("current", current), ("new", new)):
            if type(value) is not int or not 0 <= value <= _U64_LIMIT:
                raise ArgumentError(field, value, "must be a whole number that fits 64 bits")
        try:
            with self._explaining("set_transaction_id", None):
                self.device.message(f"set_transaction_id {current} {new}")
        except TaskError as error:
            found = self.status().transaction_id
            if error.errno == errno.EINVAL and found != current:
                raise StateError(self.name, f"has transaction id {found}, not {current}") from error
            raise

    def _create_message(self, thin_id: int) -> Task:
        return self.device.message_task(f"create_thin {ids.check_thin_id(thin_id)}")

    def _snap_message(self, thin_id: int, origin_id: int) -> Task:
        ids.check_thin_id(thin_id)
        ids.check_thin_id(origin_id, "origin_id")
        return self.device.message_task(f"create_snap {thin_id} {origin_id}")

    def _send(self, verb: str, thin_id: int) -> None:
        with self._explaining(verb, thin_id):
            self.device.message(f"{verb} {thin_id}")

    @contextmanager
    def _explaining(self, verb: str, thin_id: int | None, origin_id: int | None = None) -> Iterator[None]:
        """Turn the errno of a refused message into what it means to a pool."""
        try:
            yield
        except TaskError as error:
            if error.operation != "message":
                raise
            subject = self.name if thin_id is None else f"thin {thin_id} of {self.name}"
            kept: dict[str, Any] = {"log": error.log, "kernel_log": error.kernel_log}
            if error.errno == errno.EOPNOTSUPP:
                self.check_writable(verb)
            if error.errno == errno.EEXIST:
                raise DeviceExistsError(verb, subject, error.errno, **kept) from None
            if error.errno == errno.ENODATA:
                missing = subject if origin_id is None else f"origin {origin_id} of {self.name}"
                raise DeviceNotFoundError(verb, missing, error.errno, **kept) from None
            if error.errno == errno.EBUSY:
                active = None if thin_id is None else self.active(thin_id)
                users = [f"the active device {active.name}"] if active else []
                raise DeviceBusyError(verb, subject, error.errno, users=users, **kept) from None
            raise

    def check_writable(self, verb: str) -> ThinPoolStatus:
        """
        Return the status of a pool whose metadata can be changed, which it can when out of data space too.

        Raises:
            PoolFailedError: Fail mode.
            PoolNeedsCheckError: The metadata must be checked first.
            OutOfMetadataSpaceError: No metadata block is left.
            PoolReadOnlyError: Read-only for another reason.
        """
        status = self.status()
        if status.needs_check:
            raise PoolNeedsCheckError(self.name, status, f"{verb}: the metadata needs thin_check, off-line")
        if status.mode is PoolMode.READ_ONLY:
            if status.metadata_is_low:
                raise OutOfMetadataSpaceError(self.name, status, f"{verb}: no metadata space; grow the metadata device")
            raise PoolReadOnlyError(self.name, status, f"{verb}: the pool is read-only")
        return status

    # -- who has a thin id active

    def uuid_of(self, thin_id: int) -> str:
        """Return the uuid that dmlib gives to the device over *thin_id*; there can be but one device with it."""
        return f"{self._uuid_stem}{thin_id}"

    @property
    def _uuid_stem(self) -> str:
        return f"{ids.UUID_PREFIX}{self.metadata_device}-thin-"

    def active(self, thin_id: int) -> DeviceInfo | None:
        """
        Return the device that has *thin_id* active, whoever made it; ``None`` if none has.

        Cost: two ioctls; where other programs have devices over the pool, one to list and one for each of theirs.
        """
        try:
            return Task(Operation.INFO, uuid=self.uuid_of(thin_id)).run().device
        except DeviceNotFoundError:
            return self._foreign(thin_id)

    def _foreign(self, thin_id: int) -> DeviceInfo | None:
        """
        Look for *thin_id* among devices that dmlib did not make, if there can be any.

        The pool is open once for each device on it. While that is what our own devices explain, nobody else has
        one; else ours are counted again, and if that does not explain it either, the others' tables are read.
        """
        pool = self.device.info()
        with self._explained_lock:
            if pool.open_count in (0, self._explained):
                return None
        ours = sum(1 for device in list_devices() if (device.uuid or "").startswith(self._uuid_stem))
        with self._explained_lock:
            self._explained = min(ours, pool.open_count)
        if pool.open_count <= ours:
            return None
        for name, uuid in blockdev.mapped_holders(pool.number):
            if uuid.startswith(self._uuid_stem):
                continue
            for inactive in (False, True):
                if _is_thin(Device(name), thin_id, inactive=inactive):
                    return Device(name).info()
        return None

    def _count_explained(self, change: int) -> None:
        with self._explained_lock:
            self._explained = max(0, self._explained + change)

    # -- changing it while in use

    def grow_data(self, size: Size | None = None) -> None:
        """
        Let the pool use more of its data device, which was made larger before; writes that wait for space go on.

        Args:
            size: New size; by default all of the device. It is rounded down to whole blocks.

        Raises:
            ArgumentError: Smaller than the pool is now (a pool never shrinks), or larger than the device.
            PoolNeedsCheckError: The kernel would ignore the new size until the metadata was checked.
            PoolError: The pool did not grow; the subclass says why.
            SuspendTimeoutError: See ``Device.suspend``.

        Cost: seven ioctls; no flush.
        """
        device = blockdev.size_of(self.data_device)
        wanted = device if size is None else as_sectors(size, "size")
        if wanted > device:
            raise ArgumentError("size", wanted, f"is more than the data device has ({device})")
        blocks = DataBlocks(wanted // self.data_block_size)
        before = self.check_grows("grow_data")
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
            PoolError: The pool did not grow; the subclass says why.
            SuspendTimeoutError: See ``Device.suspend``.

        Cost: seven ioctls; no flush.
        """
        device = blockdev.size_of(self.metadata_device)
        blocks = MetaBlocks(min(device, METADATA_MAX) // MetaBlocks(1).to_sectors())
        before = self.check_grows("grow_metadata")
        if blocks <= before.total_metadata:
            raise ArgumentError("metadata_device", device, f"has no more than the {before.total_metadata} in use")
        self._reload(self._table_and_target()[0])
        after = self.status()
        if after.total_metadata != blocks:
            self.check_writable("grow_metadata")
            raise OutOfMetadataSpaceError(self.name, after, f"has {after.total_metadata}, not {blocks.count}")

    def check_grows(self, verb: str) -> ThinPoolStatus:
        """
        Return the status of a pool that would accept a larger device.

        Raises:
            PoolFailedError: Fail mode.
            PoolNeedsCheckError: The metadata must be checked first: the kernel skips growing, and calls it success.
        """
        status = self.status()
        if status.needs_check:
            raise PoolNeedsCheckError(self.name, status, f"{verb}: the metadata needs thin_check first, off-line")
        return status

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


def _is_thin(device: Device, thin_id: int, *, inactive: bool) -> bool:
    try:
        table = device.table(inactive=inactive)
    except DeviceNotFoundError:  # removed meanwhile
        return False
    targets = [] if table is None else [segment.target for segment in table]
    return any(isinstance(target, ThinTarget) and target.thin_id == thin_id for target in targets)
