# SPDX-License-Identifier: MIT
"""
A live thin pool: its status, its messages by thin id, and how it changes while in use.

``_pool_life`` adds how a pool is made and taken down, and ``thin`` the thin devices.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Self

from dmlib import ids
from dmlib._active import active_by_uuid, active_elsewhere, thin_uuid
from dmlib.device import Device
from dmlib.errors import (
    ArgumentError,
    DeviceBusyError,
    DeviceExistsError,
    DeviceNotFoundError,
    OutOfMetadataSpaceError,
    PoolError,
    PoolFailedError,
    PoolNeedsCheckError,
    PoolReadOnlyError,
    StateError,
    TaskError,
)
from dmlib.targets.thin_pool import PoolMode, ThinPoolStatus, ThinPoolTarget

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dmlib.results import DeviceInfo
    from dmlib.table import Table
    from dmlib.task import Task

_U64_LIMIT: Final = (1 << 64) - 1


class LivePool:
    """
    A thin pool that the kernel runs; see :class:`dmlib.ThinPool`, which is the public name.

    Args:
        name: Name of the pool's mapped device.
        foreign: See :class:`dmlib.Device`.

    Raises:
        DeviceNotFoundError: There is no such device.
        StateError: It is not a thin pool.
    """

    def __init__(self, name: str, *, foreign: bool = False) -> None:
        self.device: Final = Device(name, foreign=foreign)
        target = self.target()
        self.metadata_device: Final = ids.device_number(target.metadata_device)
        self.data_device: Final = ids.device_number(target.data_device)
        self.data_block_size: Final = target.data_block_size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @classmethod
    def open(cls, name: str, *, foreign: bool = False) -> Self:
        """
        Take hold of a live pool, whoever made it; nothing is changed.

        Args:
            name: Name of the pool's mapped device, as in ``/dev/mapper``.
            foreign: Allow changes to a pool, and to its thin devices, that its uuid says is another program's, such
                as LVM's. Its owner does not get to know of them.

        Raises:
            DeviceNotFoundError: There is no such device.
            StateError: It is not a thin pool.

        Cost: one ioctl.
        """
        return cls(name, foreign=foreign)

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
        message = PoolMessage(self, "create_snap", thin_id, origin_id)
        if not origin_may_be_active:
            origin = self.active(origin_id)
            if origin is not None and not origin.suspended:
                raise StateError(f"thin {origin_id} of {self.name}", f"is active as {origin.name} and not suspended")
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
        PoolMessage(self, "delete", thin_id).run()

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
            self.device.message(f"set_transaction_id {current} {new}")
        except TaskError as error:
            if error.errno == errno.EOPNOTSUPP:
                self.check_writable("set_transaction_id")
            found = self.status().transaction_id
            if error.errno == errno.EINVAL and found != current:
                raise StateError(self.name, f"has transaction id {found}, not {current}") from error
            raise
        self.check_committed("set_transaction_id")

    def check_writable(self, verb: str) -> ThinPoolStatus:
        """
        Return the status of a pool whose metadata can be changed, which it can when out of data space too.

        Raises:
            PoolFailedError: Fail mode.
            PoolNeedsCheckError: The metadata must be checked first.
            OutOfMetadataSpaceError: No metadata block is left.
            PoolReadOnlyError: Read-only for another reason.
        """
        status = self.check_committed(verb)
        if status.mode is not PoolMode.READ_ONLY:
            return status
        if self.target().read_only:
            raise PoolReadOnlyError(self.name, status, f"{verb}: the pool was made read-only")
        if status.metadata_low_water is None or status.metadata_is_low:
            raise OutOfMetadataSpaceError(self.name, status, f"{verb}: no metadata space; grow the metadata device")
        raise PoolReadOnlyError(self.name, status, f"{verb}: the pool is read-only")

    def check_committed(self, verb: str) -> ThinPoolStatus:
        """
        Return the status of a pool that can commit its metadata: what the last message changed is on disk.

        The kernel answers a message before it commits, and its answer does not say how that went. A commit that
        fails takes the change back and leaves this mark.

        Raises:
            PoolFailedError: Fail mode.
            PoolNeedsCheckError: The metadata must be checked first.
        """
        status = self.status()
        if status.needs_check:
            raise PoolNeedsCheckError(self.name, status, f"{verb}: the metadata needs thin_check first, off-line")
        return status

    # -- who has a thin id active

    def uuid_of(self, thin_id: int) -> str:
        """Return the uuid that dmlib gives to the device over *thin_id*; there can be but one device with it."""
        return thin_uuid(self.metadata_device, thin_id)

    def active(self, thin_id: int) -> DeviceInfo | None:
        """
        Return the device that has *thin_id* active, whoever made it; ``None`` if none has.

        Cost: one ioctl if a device of dmlib has. Else two more, and two for each device on the pool that other
        programs made.
        """
        device = active_by_uuid(self.uuid_of(ids.check_thin_id(thin_id)))
        return device or self._active_elsewhere(self.device.info(), thin_id)

    def _active_elsewhere(self, pool: DeviceInfo, thin_id: int) -> DeviceInfo | None:
        return active_elsewhere(pool, thin_id, ours=thin_uuid(self.metadata_device, ""))


class PoolMessage:
    """
    A message that makes or deletes a thin id.

    Args:
        pool: Who gets it.
        verb: Its first word.
        thin_id: The id.
        origin_id: The id of which it is to be a snapshot.

    Attributes:
        task: What is sent.

    Raises:
        ArgumentError: An id that does not fit 24 bits.
    """

    def __init__(self, pool: LivePool, verb: str, thin_id: int, origin_id: int | None = None) -> None:
        words = [verb, str(ids.check_thin_id(thin_id))]
        if origin_id is not None:
            words.append(str(ids.check_thin_id(origin_id, "origin_id")))
        self._pool, self._verb, self._thin_id, self._origin_id = pool, verb, thin_id, origin_id
        self.task: Final[Task] = pool.device.message_task(" ".join(words))
        self._lost = False

    @property
    def succeeded(self) -> bool:
        """Whether the pool has done it and, as far as that was looked into, could commit it."""
        return self.task.succeeded and not self._lost

    def run(self) -> None:
        """Send it; the errors are those of :meth:`explained`."""
        with self.explained():
            self.task.run()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """
        Say what a refusal of the message, sent in the block, means to a pool; then see that it was committed.

        Raises:
            DeviceExistsError: The id is in use.
            DeviceNotFoundError: There is no such id.
            DeviceBusyError: The id is active.
            PoolError: The pool takes no changes; the subclass says why.
        """
        try:
            yield
        except TaskError as error:
            if error.operation == "message":
                self._explain(error)
            raise
        try:
            self._pool.check_committed(self._verb)
        except PoolError:
            self._lost = True
            raise

    def _explain(self, error: TaskError) -> None:
        subject = f"thin {self._thin_id} of {self._pool.name}"
        kept: dict[str, Any] = {"log": error.log, "kernel_log": error.kernel_log}
        if error.errno == errno.EOPNOTSUPP:
            self._pool.check_writable(self._verb)
        if error.errno == errno.EEXIST:
            raise DeviceExistsError(self._verb, subject, error.errno, **kept) from None
        if error.errno == errno.ENODATA:
            missing = subject if self._origin_id is None else f"origin {self._origin_id} of {self._pool.name}"
            raise DeviceNotFoundError(self._verb, missing, error.errno, **kept) from None
        if error.errno == errno.EBUSY:
            active = self._pool.active(self._thin_id)
            users = [f"the active device {active.name}"] if active else []
            raise DeviceBusyError(self._verb, subject, error.errno, users=users, **kept) from None
