# SPDX-License-Identifier: MIT
"""
A mapped device, by name: create, load, resume, suspend, reload, remove, ask.

A device has two slots for tables. ``load`` fills the inactive one and disturbs nobody; ``resume`` makes it live.
A device outlives the process that made it, so :class:`Device` is a name, not a handle: dropping the object
does nothing, and nothing has to be closed.
"""

from __future__ import annotations

import secrets
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Self

from dmlib import ids
from dmlib._asking import Asking
from dmlib._guard import refuse_foreign
from dmlib._undo import Undo, undisturbed
from dmlib.errors import ArgumentError, DeviceBusyError, DeviceExistsError, DeviceNotFoundError, StateError
from dmlib.operations import Geometry, Operation
from dmlib.section import Hold, run_section, wait_for_late
from dmlib.task import Task
from dmlib.udev import UdevFlags
from dmlib.units import KiB, TiB, as_sectors
from dmlib.usage import users_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dmlib.table import Table
    from dmlib.task import Secret
    from dmlib.units import Size

SUSPEND_TIMEOUT: Final = 30.0
"""Seconds after which a suspend that the kernel does not finish is given up, unless told otherwise."""

REMOVE_TIMEOUT: Final = 5.0
"""Seconds for which a busy device is tried again: udev and blkid tend to have a new device open for a moment."""

_READ_AHEAD_LIMIT: Final = TiB(4)
_FIRST_PAUSE: Final = 0.005
_LONGEST_PAUSE: Final = 0.25


@dataclass(frozen=True, slots=True)
class Device(Asking):
    """
    A mapped device, named. Making the object asks the kernel nothing.

    Its verbs that change a device see to it that it is nobody else's: see *foreign*.

    Args:
        name: Its name, without directory.
        foreign: Let the verbs that change a device do so although its uuid names another program as its owner
            (LVM, cryptsetup, multipath ...). Without, they raise ForeignDeviceError before they change anything.

    Raises:
        ArgumentError: No device can have this name.
    """

    foreign: bool = field(default=False, compare=False, kw_only=True)

    def _mine(self, verb: str) -> None:
        """Refuse a device of others, unless the caller has said that it may be changed."""
        if not self.foreign:
            refuse_foreign(verb, self.name)

    # -- making and removing

    @classmethod
    def create(
        cls,
        name: str,
        table: Table | None = None,
        *,
        uuid: str | None = None,
        readonly: bool = False,
        minor: int | None = None,
        udev: UdevFlags = UdevFlags.NONE,
    ) -> Self:
        """
        Create a device; with a *table*, load it and make it live. All of it happens, or nothing stays.

        Args:
            name: Its name.
            table: Its table. Without one the device has no size and no node until it is loaded and resumed.
            uuid: Its uuid, which it keeps for life; by default a random one that tells dmlib's own. ``""`` leaves
                that to :meth:`set_uuid`.
            readonly: The table refuses writes.
            minor: The minor number to have; by default the kernel's choice.
            udev: What udev's rules leave out for it.

        Returns:
            The device.

        Raises:
            ArgumentError: A name or uuid that cannot be.
            DeviceExistsError: The name, the uuid or the minor number is taken.
            TargetRefusedError: A target would not take its part of the table; ``kernel_log`` tends to say why.
            CleanupError: It failed, and the half-made device could not be removed.

        Source: DM_DEV_CREATE, DM_TABLE_LOAD, DM_DEV_SUSPEND.
        """
        device = cls(name, foreign=True)
        uuid = f"{ids.UUID_PREFIX}{secrets.token_hex(16)}" if uuid is None else uuid or None
        create = Task(Operation.CREATE, name=name, uuid=uuid, minor=minor)
        load = None if table is None else device._load_task(table, readonly=readonly)
        with Undo(f"create {name}") as undo:
            undo.push(device.remove, after=create)
            try:
                create.run()
            except DeviceNotFoundError as error:  # what the driver says of a number that is taken
                raise DeviceExistsError("create", f"{name} (minor {minor})", error.errno, log=error.log) from None
            if load is not None:
                load.run()
                device.resume(udev=udev)
        return cls(name)

    @classmethod
    @contextmanager
    def temporary(cls, table: Table, *, name: str | None = None, uuid: str | None = None) -> Iterator[Self]:
        """
        Create a device that is removed when the ``with`` block ends.

        Args:
            table: Its table.
            name: Its name; a random one by default.
            uuid: As for :meth:`create`.

        Raises:
            DeviceBusyError: At the end: somebody still uses it, so it stays.
        """
        name = f"dmlib-{secrets.token_hex(6)}" if name is None else name
        device = cls.create(name, table, uuid=uuid)
        try:
            yield device
        finally:
            if device.exists():
                cls(name, foreign=True).remove()

    def remove(self, *, deferred: bool = False, timeout: float = REMOVE_TIMEOUT) -> None:
        """
        Remove the device with both its tables.

        Args:
            deferred: If it is in use, let the kernel remove it when the last user closes it.
            timeout: Seconds for which a busy device is tried again; 0 tries once.

        Raises:
            DeviceNotFoundError: There is no such device.
            DeviceBusyError: It is still in use; ``users`` says by whom, as far as can be seen.

        Minimum driver: 4.27 (Linux 3.13) for *deferred*.

        Source: DM_DEV_REMOVE.
        """
        self._mine("remove")
        deadline = time.monotonic() + timeout
        pause = _FIRST_PAUSE
        while True:
            try:
                Task(Operation.REMOVE, name=self.name, deferred=deferred).run()
            except DeviceBusyError as busy:
                if time.monotonic() + pause > deadline:
                    users = [str(user) for user in users_of(self.info().number)]
                    raise DeviceBusyError(
                        busy.operation, busy.device, log=busy.log, kernel_log=busy.kernel_log, users=users
                    ) from None
            else:
                return
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def cancel_deferred_removal(self) -> None:
        """
        Keep a device that was to go when its last user closes it; no error if nothing was scheduled.

        Raises:
            DeviceNotFoundError: It is gone already.

        Minimum driver: 4.27 (Linux 3.13).

        Source: DM_TARGET_MSG, ``@cancel_deferred_remove``.
        """
        self.message("@cancel_deferred_remove")

    def rename(self, name: str) -> Self:
        """
        Give the device another name; tables, users and uuid stay.

        Returns:
            The device under its new name; this object names nothing any more.

        Raises:
            DeviceNotFoundError: There is no such device.
            DeviceExistsError: The name is taken, also if it is the device's own.

        Source: DM_DEV_RENAME.
        """
        self._mine("rename")
        Task(Operation.RENAME, name=self.name, new=name).run()
        return replace(self, name=name)

    def set_uuid(self, uuid: str) -> None:
        """
        Give the device its uuid, which can be done once.

        Raises:
            DeviceExistsError: A device has it, be it this one.
            TaskError: The device has another one already (EINVAL).

        Minimum driver: 4.19 (Linux 2.6.37).

        Source: DM_DEV_RENAME with DM_UUID_FLAG.
        """
        self._mine("set_uuid")
        Task(Operation.SET_UUID, name=self.name, new=uuid).run()

    def set_geometry(self, geometry: Geometry) -> None:
        """
        Set what ``HDIO_GETGEO`` answers for the device, for programs that still ask; until its next table.

        Args:
            geometry: Cylinders, heads, sectors in a track, and where it begins.

        Raises:
            ArgumentError: A number beyond its limit.
            DeviceNotFoundError: There is no such device.
            TaskError: It has no live table (ENXIO).

        Minimum driver: 4.6 (Linux 2.6.17).

        Source: DM_DEV_SET_GEOMETRY.
        """
        self._mine("set_geometry")
        Task(Operation.SET_GEOMETRY, name=self.name, geometry=geometry).run()

    def set_read_ahead(self, size: Size) -> None:
        """
        Set how much the kernel reads ahead on the device.

        Args:
            size: How much, in whole KiB; ``Sectors(0)`` for nothing.

        Raises:
            ArgumentError: Not whole KiB, or 4 TiB and more.
            DeviceNotFoundError: There is no such device.

        Source: sysfs, ``queue/read_ahead_kb``.
        """
        sectors = as_sectors(size, "size")
        if sectors % KiB(1) or sectors >= _READ_AHEAD_LIMIT:
            raise ArgumentError("size", sectors, f"must be whole KiB, and less than {_READ_AHEAD_LIMIT}")
        self._mine("set_read_ahead")
        with open(self._sysfs("queue/read_ahead_kb"), "w", encoding="ascii") as file:
            file.write(str(sectors // KiB(1)))

    # -- tables

    def load(self, table: Table, *, readonly: bool = False) -> None:
        """
        Put *table* into the inactive slot; I/O keeps using the live one.

        Args:
            table: Segments from sector 0 without gaps (512-byte sectors).
            readonly: The new table refuses writes once live.

        Raises:
            DeviceNotFoundError: There is no such device.
            TargetRefusedError: A target's constructor failed; ``kernel_log`` tends to say why.

        Source: DM_TABLE_LOAD.
        """
        self._mine("load")
        self._load_task(table, readonly=readonly).run()

    def _load_task(self, table: Table, *, readonly: bool) -> Task:
        entries = table.resolved(ids.device_number).entries()
        return Task(Operation.LOAD, name=self.name, targets=entries, readonly=readonly)

    def clear(self) -> None:
        """
        Drop the inactive table, if there is one; the live one is not touched.

        Raises:
            DeviceNotFoundError: There is no such device.

        Source: DM_TABLE_CLEAR.
        """
        self._mine("clear")
        Task(Operation.CLEAR, name=self.name).run()

    def resume(self, *, udev: UdevFlags | None = None) -> None:
        """
        Make the inactive table live, if there is one, and let I/O go on.

        Replacing a live table in a device that is not suspended makes the kernel suspend it with a flush first,
        without a deadline: :meth:`reload` is the verb for that.

        Args:
            udev: What udev's rules leave out for the device; by default what they left out before.

        Raises:
            DeviceNotFoundError: There is no such device.
            TargetRefusedError: A target would not start. The device stays suspended, with the new table: load
                the old one and resume again. :meth:`reload` does that by itself.
            UdevTimeoutError: Resumed, but udev did not answer and the node is wrong.

        Source: DM_DEV_SUSPEND without DM_SUSPEND_FLAG.
        """
        self._mine("resume")
        Task(Operation.RESUME, name=self.name, udev=udev).run()

    def suspend(self, *, flush: bool = True, lockfs: bool = True, timeout: float | None = SUSPEND_TIMEOUT) -> None:
        """
        Hold back new I/O until :meth:`resume`. Whatever uses the device waits meanwhile, perhaps this process too.

        Args:
            flush: Wait for I/O in flight. Without, it is held back as well, as far as the target can do that.
            lockfs: Freeze a mounted file system first, so that what is below is consistent.
            timeout: Seconds the kernel may take; ``None`` waits for ever.

        Raises:
            DeviceNotFoundError: There is no such device.
            SuspendTimeoutError: It took longer; a thread resumes the device the moment the kernel has suspended it.
            TaskError: A file system would not freeze, or a target refused.

        Source: DM_DEV_SUSPEND with DM_SUSPEND_FLAG.
        """
        run_section([self.hold(flush=flush, lockfs=lockfs)], timeout=timeout, keep_suspended=True)

    def hold(self, *, flush: bool = True, lockfs: bool = True) -> Hold:
        """Return what :func:`dmlib.section.run_section` needs to suspend and resume this device."""
        self._mine("suspend")
        return Hold(
            suspend=Task(Operation.SUSPEND, name=self.name, flush=flush, lockfs=lockfs),
            resume=Task(Operation.RESUME, name=self.name),
        )

    @contextmanager
    def suspended(
        self, *, flush: bool = True, lockfs: bool = True, timeout: float | None = SUSPEND_TIMEOUT
    ) -> Iterator[Self]:
        """
        Suspend the device for the length of a ``with`` block; it is resumed however the block ends.

        Python runs while the device is suspended. If the process, its libraries or its swap lie on that device,
        it may wait for itself for ever: dmlib's own snapshots do not work this way.

        Args:
            flush: See :meth:`suspend`.
            lockfs: See :meth:`suspend`.
            timeout: See :meth:`suspend`.

        Raises:
            StateError: The device is suspended already, so this block is not the one to resume it.
            SuspendTimeoutError: See :meth:`suspend`.
        """
        if self.info().suspended:
            raise StateError(self.name, "is suspended already, by somebody who will want to resume it")
        entered = False
        try:
            self.suspend(flush=flush, lockfs=lockfs, timeout=timeout)
            entered = True
            yield self
        finally:
            # A signal handler may have raised just as the suspend came back; then the kernel is asked.
            undisturbed(lambda: (entered or self.info().suspended) and Task(Operation.RESUME, name=self.name).run())

    def reload(
        self,
        table: Table,
        *,
        flush: bool = True,
        lockfs: bool = True,
        readonly: bool | None = None,
        timeout: float | None = SUSPEND_TIMEOUT,
    ) -> None:
        """
        Replace the live table in one safe step: load, suspend, resume. On failure the old table is live as before.

        Args:
            table: The new table.
            flush: See :meth:`suspend`. Growing a device needs none.
            lockfs: See :meth:`suspend`.
            readonly: The new table refuses writes; as before by default.
            timeout: See :meth:`suspend`.

        Raises:
            DeviceNotFoundError: There is no such device.
            StateError: It has no live table yet (use :meth:`load` and :meth:`resume`), or is suspended.
            TargetRefusedError: A target would not take the new table, or not start with it.
            SuspendTimeoutError: See :meth:`suspend`; the new table was dropped.
            CleanupError: Neither the new nor the old table could be resumed; the device is still suspended.

        Cost: four ioctls (table, load, suspend, resume).
        """
        self._mine("reload")
        timeout = wait_for_late(self.name, timeout)
        before = Task(Operation.TABLE, name=self.name).run()
        if not before.device.live_table:
            raise StateError(self.name, "has no live table to replace: use load() and resume()")
        if before.device.suspended:
            raise StateError(self.name, "is suspended, by somebody who will want to resume it")
        readonly = before.device.readonly if readonly is None else readonly
        load = self._load_task(table, readonly=readonly)
        plain = self.hold(flush=flush, lockfs=lockfs)
        swap = Hold(
            suspend=plain.suspend,
            resume=plain.resume,
            clear=Task(Operation.CLEAR, name=self.name),
            restore=Task(Operation.LOAD, name=self.name, targets=before.lines, readonly=before.device.readonly),
            resume_restored=Task(Operation.RESUME, name=self.name),
        )
        with Undo(f"reload {self.name}") as undo:
            undo.push(self.clear, after=load)
            load.run()
            run_section([swap], timeout=timeout)

    # -- messages

    def message(self, text: str | Secret, *, sector: int = 0) -> str | None:
        """
        Send a message to a target of the live table.

        Args:
            text: The message, its words separated by spaces. As bytes if there is a key in it: then it is not logged,
                and what carried it is wiped (but for the bytes themselves).
            sector: The target is the one at this sector.

        Returns:
            The target's answer, if it gives one.

        Raises:
            ArgumentError: Empty, or with NUL in it.
            DeviceNotFoundError: There is no such device.
            StateError: It has no live table. (The kernel calls that success, and delivers nothing.)
            TargetRefusedError: The target does not know or take the message.

        Minimum driver: 4.2; answers 4.24.

        Cost: one ioctl.

        Source: DM_TARGET_MSG.
        """
        return self.message_task(text, sector=sector).run().response

    def message_task(self, text: str | Secret, *, sector: int = 0) -> Task:
        """Return a message that is ready to be sent."""
        if not isinstance(text, str):
            if not len(text):
                raise ArgumentError("text", "(secret)", "must have a word")
        elif not text.strip() or "\0" in text:
            raise ArgumentError("text", text, "must have a word and no NUL")
        if not (
            isinstance(text, str) and text.startswith("@stats_")
        ):  # those change nothing of the device, and never reach its targets
            self._mine("message")
        return Task(Operation.MESSAGE, name=self.name, message=text, sector=sector)
