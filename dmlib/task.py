# SPDX-License-Identifier: MIT
"""
One ioctl: :class:`Task` sends it through libdevmapper, waits for udev, and copies the results.

All names of C functions that make up a task stand here. A failure becomes an exception in
:meth:`Prepared.result` and nowhere else. Most programs want :class:`dmlib.Device`.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from dmlib import _ffi, _kmsg, ids
from dmlib.errors import (
    DeviceNotFoundError,
    StateError,
    TargetRefusedError,
    TaskError,
    UdevTimeoutError,
    from_task,
)
from dmlib.udev import Cookie, UdevFlags, node_problem, udev_timeout

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType


class Operation(enum.Enum):
    """What a task does, in the words of ``dmsetup``."""

    CREATE = "create"
    LOAD = "load"
    REMOVE = "remove"
    SUSPEND = "suspend"
    RESUME = "resume"
    INFO = "info"
    DEPS = "deps"
    RENAME = "rename"
    SET_UUID = "set_uuid"
    STATUS = "status"
    TABLE = "table"
    CLEAR = "clear"
    MESSAGE = "message"
    MKNODES = "mknodes"
    VERSION = "version"
    TARGET_VERSIONS = "target_versions"


_C_TYPE: Final = {
    Operation.LOAD: "DM_DEVICE_RELOAD",
    Operation.SET_UUID: "DM_DEVICE_RENAME",
    Operation.MESSAGE: "DM_DEVICE_TARGET_MSG",
    Operation.TARGET_VERSIONS: "DM_DEVICE_LIST_VERSIONS",
}
# The kernel sends a uevent for these, so udev completes their cookie; on any other the wait would never end.
_UEVENT: Final = frozenset({Operation.REMOVE, Operation.RESUME, Operation.RENAME, Operation.SET_UUID})
# These put node work on the library's global list; all others touch no shared state and may block, so they run
# without the lock. (A resume is told that its node was made at creation, see _build.)
_LOCKED: Final = frozenset(
    {Operation.CREATE, Operation.REMOVE, Operation.RENAME, Operation.SET_UUID, Operation.MKNODES}
)
# What an operation needs beyond an address; no other takes it.
_NEEDS: Final = {
    Operation.LOAD: "targets",
    Operation.RENAME: "new",
    Operation.SET_UUID: "new",
    Operation.MESSAGE: "message",
}
# libdevmapper calls a missing device a success here.
_ABSENCE_UNSEEN: Final = frozenset({Operation.INFO, Operation.STATUS})
_ASKS_TARGET: Final = frozenset({Operation.LOAD, Operation.RESUME, Operation.MESSAGE})
_HAS_INFO: Final = frozenset(Operation) - {Operation.VERSION, Operation.TARGET_VERSIONS}

_NOT_RUN: Final = 0
_DONE: Final = 1


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """
    What the driver says of a device.

    Attributes:
        name: Its name.
        uuid: Its uuid, ``""`` if it has none.
        number: Its block device number.
        suspended: It was suspended by a program.
        internal_suspend: It is held by another device, such as a thin device by its suspended pool.
        live_table: It has a table that serves I/O.
        inactive_table: A table waits to become live at the next resume.
        open_count: How often it is open: nodes, mounts, devices on top.
        event_nr: Its event counter.
        target_count: Segments of its live table.
        readonly: Its live table refuses writes.
        deferred_remove: It goes away when the last user closes it.
    """

    name: str
    uuid: str
    number: ids.DeviceNumber
    suspended: bool
    internal_suspend: bool
    live_table: bool
    inactive_table: bool
    open_count: int
    event_nr: int
    target_count: int
    readonly: bool
    deferred_remove: bool


@dataclass(frozen=True, slots=True)
class Result:
    """
    What a task brought back; a field that the operation does not have keeps its default.

    Attributes:
        info: State of the device after the ioctl.
        lines: Table or status, a tuple ``(start, length, type, text)`` a segment, in sectors.
        deps: Devices that the live (or inactive) table uses.
        response: A target's answer to a message.
        versions: Version of the driver (as ``driver``) or of each loaded target.
    """

    info: DeviceInfo | None = None
    lines: tuple[tuple[int, int, str, str], ...] = ()
    deps: tuple[ids.DeviceNumber, ...] = ()
    response: str | None = None
    versions: tuple[tuple[str, tuple[int, int, int]], ...] = ()

    @property
    def device(self) -> DeviceInfo:
        """The state of the device, where the operation is one on a device."""
        if self.info is None:
            raise StateError("task", "this operation says nothing about a device")
        return self.info


class Task:
    """
    One ioctl, described; :meth:`run` sends it once.

    A device is addressed in exactly one way: with two of them the kernel would refuse, and "info" would say that
    the device is not there. (``create`` takes a name and may take a uuid, which becomes the device's.)

    Args:
        operation: What to do.
        name: Name of the device.
        uuid: Its uuid.
        number: Its number.
        new: New name or uuid, for ``rename`` and ``set_uuid``.
        targets: Table for ``load``: ``(start, length, type, parameters)``, in sectors.
        message: Text for a target.
        sector: Which target gets the message: the one at this sector.
        readonly: The table refuses writes.
        flush: ``suspend`` waits for I/O in flight; ``status`` lets a pool commit first.
        lockfs: ``suspend`` freezes a mounted file system.
        inactive: ``table``, ``deps`` and ``status`` look at the inactive table.
        deferred: ``remove`` takes effect when the last user closes the device.
        udev: What udev's rules are to leave out.

    Raises:
        ArgumentError: A name, uuid or target type that the kernel cannot take.
        StateError: No way of addressing, or more than one; something that the operation needs or does not take.
    """

    __slots__ = (
        "_outcome",
        "deferred",
        "flush",
        "inactive",
        "lockfs",
        "message",
        "name",
        "new",
        "number",
        "operation",
        "readonly",
        "sector",
        "targets",
        "udev",
        "uuid",
    )

    def __init__(
        self,
        operation: Operation,
        *,
        name: str | None = None,
        uuid: str | None = None,
        number: ids.DeviceNumber | None = None,
        new: str | None = None,
        targets: Iterable[tuple[int, int, str, str]] = (),
        message: str | None = None,
        sector: int = 0,
        readonly: bool = False,
        flush: bool = True,
        lockfs: bool = True,
        inactive: bool = False,
        deferred: bool = False,
        udev: UdevFlags = UdevFlags.NONE,
    ) -> None:
        ways = (name is not None) + (uuid is not None) + (number is not None)
        targets = tuple(targets)
        takes_uuid = operation is Operation.CREATE and name is not None and number is None
        if ways != (operation in _HAS_INFO) and not (ways > 1 and takes_uuid):
            raise StateError(f"task {operation.value}", "address one device, in one way: name, uuid or number")
        for field, given in (("targets", bool(targets)), ("new", new is not None), ("message", message is not None)):
            if given != (_NEEDS.get(operation) == field):
                rule = f"does not take {field}" if given else f"needs {field}"
                raise StateError(f"task {operation.value}", rule)
        self.operation = operation
        self.name = None if name is None else ids.check_name(name)
        self.uuid = None if uuid is None else ids.check_uuid(uuid)
        self.number = number
        self.new = new
        if new is not None:
            (ids.check_name if operation is Operation.RENAME else ids.check_uuid)(new, "new")
        self.targets = targets
        self.message = message
        self.sector = sector
        self.readonly = readonly
        self.flush = flush
        self.lockfs = lockfs
        self.inactive = inactive
        self.deferred = deferred
        self.udev = udev
        self._outcome: _ffi.IntPtr | None = None

    @property
    def label(self) -> str:
        """What to call the device in messages."""
        return self.name or self.uuid or (str(self.number) if self.number else "device mapper")

    @property
    def succeeded(self) -> bool:
        """Whether the kernel has carried it out; exact even if a signal handler raised as the call returned."""
        return self._outcome is not None and bool(self._outcome[0] == _DONE)  # type: ignore[index]

    def run(self) -> Result:
        """
        Send the ioctl, wait for udev where it makes a uevent, and return what came back.

        An interrupted ioctl is sent again after Python's signal handlers have run, as PEP 475 has it.

        Raises:
            DriverUnavailableError: No driver, or no permission to use it.
            DeviceNotFoundError: There is no such device.
            TaskError: The kernel or libdevmapper refused; see the subclasses.
            UdevTimeoutError: Done, but udev did not answer and the node is wrong.
            StateError: This task was sent before.
        """
        while True:
            with Prepared(self) as prepared:
                prepared.call()
                if prepared.errno != errno.EINTR:
                    return prepared.result()
            self._outcome = None


class Prepared:
    """
    A task with its C memory: built on entry, sent by :meth:`call` or from within C, settled on exit.

    Settling frees the memory, takes down the cookie (waiting for udev if the kernel did its part and no exception is
    under way) and sees to the device node.
    """

    __slots__ = ("_cookie", "_ffi", "_lib", "_mark", "_result", "pointer", "task")

    def __init__(self, task: Task) -> None:
        self._lib, self._ffi = _ffi.connect()
        self.task = task
        self.pointer: Any = self._ffi.NULL
        self._cookie = Cookie()
        self._result: Result | None = None
        self._mark = _kmsg.mark() if task.operation in _ASKS_TARGET else None

    def __enter__(self) -> Self:
        if self.task._outcome is not None:  # noqa: SLF001 - one class in two halves
            raise StateError(f"task {self.task.operation.value} {self.task.label}", "was sent before; make a new one")
        self.task._outcome = self._ffi.new("int *")  # noqa: SLF001
        with _ffi.lock:
            try:
                self._build()
            except BaseException:
                self._free()
                self._cookie.discard()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        done = self.task.succeeded
        try:
            with _ffi.lock:
                self._free()
            if done and kind is None:
                self._cookie.wait(f"{self.task.operation.value} {self.task.label}")
        finally:
            self._cookie.discard()
        _ffi.take_log()
        if done and kind is None and self._result is not None and self._result.info is not None:
            self._check_node(self._result.info)

    # -- before the call

    def _build(self) -> None:
        lib, task = self._lib, self.task
        operation = task.operation
        _ffi.follow_log_level()
        self.pointer = lib.dm_task_create(getattr(lib, _C_TYPE.get(operation, f"DM_DEVICE_{operation.name}")))
        if not self.pointer:
            raise self.error()
        if task.name is not None:
            self._set(lib.dm_task_set_name(self.pointer, _ffi.encode(task.name)))
        if task.uuid is not None:
            self._set(lib.dm_task_set_uuid(self.pointer, _ffi.encode(task.uuid)))
        if task.number is not None:
            self._set(lib.dm_task_set_major_minor(self.pointer, *task.number, 0))
        if operation is Operation.RENAME and task.new is not None:
            self._set(lib.dm_task_set_newname(self.pointer, _ffi.encode(task.new)))
        if operation is Operation.SET_UUID and task.new is not None:
            self._set(lib.dm_task_set_newuuid(self.pointer, _ffi.encode(task.new)))
        if task.message is not None:
            self._set(lib.dm_task_set_message(self.pointer, _ffi.encode(task.message)))
            self._set(lib.dm_task_set_sector(self.pointer, task.sector))
        self._build_content()

    def _build_content(self) -> None:
        lib, task = self._lib, self.task
        for start, length, target_type, params in task.targets:
            line = (start, length, _ffi.encode(ids.check_target_type(target_type)), _ffi.encode(params))
            self._set(lib.dm_task_add_target(self.pointer, *line))
        for wanted, switch in (
            (task.readonly, lib.dm_task_set_ro),
            (not task.flush, lib.dm_task_no_flush),
            (not task.lockfs, lib.dm_task_skip_lockfs),
            (task.inactive, lib.dm_task_query_inactive_table),
            (task.deferred, lib.dm_task_deferred_remove),
        ):
            if wanted:
                self._set(switch(self.pointer))
        self._prepare_udev()

    def _prepare_udev(self) -> None:
        lib, operation = self._lib, self.task.operation
        # Without udev the library makes the node, and does so at creation: a resume then has no node work to
        # queue and can run without the lock, which it must, since it may have to wait for I/O.
        if operation is Operation.RESUME or (operation is Operation.CREATE and not lib.dm_udev_get_sync_support()):
            self._set(lib.dm_task_set_add_node(self.pointer, lib.DM_ADD_NODE_ON_CREATE))
        # A removal can do without a cookie: where no semaphore is left, it is what takes things back.
        if operation in _UEVENT and not self._cookie.attach(self.pointer, self.task.udev):
            self._set(operation is Operation.REMOVE)

    def _set(self, ok: int) -> None:
        if not ok:
            raise self.error()

    # -- the call

    def call(self) -> None:
        """Send it from Python, under the lock where the library's shared state is touched."""
        if self.task.operation in _LOCKED:
            with _ffi.lock:
                try:
                    self._lib.dmlib_run(self.pointer, self.outcome)
                finally:  # node work that is pending when the lock is free would be done by a forked child as well
                    self._lib.dm_task_update_nodes()
        else:
            self._lib.dmlib_run(self.pointer, self.outcome)

    @property
    def outcome(self) -> Any:
        """Where C stores how it went."""
        return self.task._outcome  # noqa: SLF001

    @property
    def errno(self) -> int | None:
        """The kernel's error number; ``None`` if it did it, or if the failure was libdevmapper's own."""
        value = self.outcome[0]
        return -value - 1 if value < -1 else None

    @property
    def was_sent(self) -> bool:
        """Whether the task got as far as being sent."""
        return bool(self.outcome[0] != _NOT_RUN)

    # -- after the call

    def result(self) -> Result:
        """Return what came back, or raise for what went wrong."""
        if not self.task.succeeded:
            raise self.error()
        operation = self.task.operation
        info = self._info() if operation in _HAS_INFO else None
        if operation is Operation.MESSAGE and info is not None:
            self._check_delivered(info)
        self._result = Result(
            info=info,
            lines=self._lines() if operation in (Operation.STATUS, Operation.TABLE) else (),
            deps=self._deps() if operation is Operation.DEPS else (),
            response=self._response() if operation is Operation.MESSAGE else None,
            versions=self._versions() if operation in (Operation.VERSION, Operation.TARGET_VERSIONS) else (),
        )
        return self._result

    def _check_delivered(self, info: DeviceInfo) -> None:
        # The kernel calls it success when there is no live table to deliver to. (Messages with @ are for the
        # driver itself.)
        if not info.live_table and not (self.task.message or "").startswith("@"):
            raise StateError(self.task.label, "has no live table, so the message reached nobody")

    def error(self) -> TaskError:
        """Return the exception for what went wrong, with what libdevmapper and the kernel said of it."""
        lines = _ffi.take_log()[1]
        kernel = _kmsg.since(self._mark) if self._mark is not None else ()
        said: dict[str, Any] = {"log": lines, "kernel_log": kernel}
        if self.errno == errno.ENXIO and self.task.operation in _ASKS_TARGET and self._exists():
            # It is a device below it that the target did not find.
            return TargetRefusedError(self.task.operation.value, self.task.label, self.errno, **said)
        return from_task(self.task.operation.value, self.task.label, self.errno, **said)

    def _exists(self) -> bool:
        task = self.task
        try:
            Task(Operation.INFO, name=task.name, uuid=task.uuid, number=task.number).run()
        except DeviceNotFoundError:
            return False
        return True

    def _info(self) -> DeviceInfo:
        raw = self._ffi.new("struct dm_info *")
        if not self._lib.dm_task_get_info(self.pointer, raw):
            raise self.error()
        if self.task.operation in _ABSENCE_UNSEEN and not raw.exists:
            raise DeviceNotFoundError(self.task.operation.value, self.task.label, errno.ENXIO)
        return DeviceInfo(
            name=_ffi.decode(self._ffi, self._lib.dm_task_get_name(self.pointer)),
            uuid=_ffi.decode(self._ffi, self._lib.dm_task_get_uuid(self.pointer)),
            number=ids.DeviceNumber(raw.major, raw.minor),
            suspended=bool(raw.suspended),
            internal_suspend=bool(raw.internal_suspend),
            live_table=bool(raw.live_table),
            inactive_table=bool(raw.inactive_table),
            open_count=raw.open_count,
            event_nr=raw.event_nr,
            target_count=raw.target_count,
            readonly=bool(raw.read_only),
            deferred_remove=bool(raw.deferred_remove),
        )

    def _lines(self) -> tuple[tuple[int, int, str, str], ...]:
        ffi = self._ffi
        start, length = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        target_type, params = ffi.new("char **"), ffi.new("char **")
        lines = []
        following = ffi.NULL
        while True:
            following = self._lib.dm_get_next_target(self.pointer, following, start, length, target_type, params)
            if target_type[0]:
                lines.append((start[0], length[0], _ffi.decode(ffi, target_type[0]), _ffi.decode(ffi, params[0])))
            if not following:
                return tuple(lines)

    def _deps(self) -> tuple[ids.DeviceNumber, ...]:
        deps = self._lib.dm_task_get_deps(self.pointer)
        return tuple(ids.DeviceNumber.from_dev(deps.device[i]) for i in range(deps.count))

    def _response(self) -> str | None:
        pointer = self._lib.dm_task_get_message_response(self.pointer)
        return _ffi.decode(self._ffi, pointer) if pointer else None

    def _versions(self) -> tuple[tuple[str, tuple[int, int, int]], ...]:
        ffi = self._ffi
        if self.task.operation is Operation.VERSION:
            buffer = ffi.new("char[64]")
            self._set(self._lib.dm_task_get_driver_version(self.pointer, buffer, 64))
            major, minor, patch = (int(part) for part in _ffi.decode(ffi, buffer).split("."))
            return (("driver", (major, minor, patch)),)
        entry = self._lib.dm_task_get_versions(self.pointer)
        versions = []
        while True:
            name = _ffi.decode(ffi, ffi.cast("char *", entry.name))
            versions.append((name, (entry.version[0], entry.version[1], entry.version[2])))
            if not entry.next:
                return tuple(versions)
            entry = ffi.cast("struct dm_versions *", ffi.cast("char *", entry) + entry.next)

    def _free(self) -> None:
        if self.pointer:
            pointer, self.pointer = self.pointer, self._ffi.NULL
            self._lib.dm_task_destroy(pointer)

    def _check_node(self, info: DeviceInfo) -> None:
        """Compare the nodes with what they must be now, and mend those that udev, or the lack of it, left wrong."""
        operation = self.task.operation
        if operation not in _UEVENT:
            return
        renamed = self.task.new if operation is Operation.RENAME else None
        if renamed and self.task.name:
            self._mend_node(self.task.name, None)
        gone = operation is Operation.REMOVE and not info.deferred_remove
        self._mend_node(renamed or self.task.name or info.name, None if gone else info.number)

    def _mend_node(self, name: str, number: ids.DeviceNumber | None) -> None:
        if not name or node_problem(name, number) is None:
            return
        there = Task(Operation.MKNODES, name=name).run().device.number  # by now somebody else may have taken the name
        problem = node_problem(name, there if there.major else None)
        if problem is not None:
            if self._cookie.timed_out:
                raise UdevTimeoutError(self._cookie.timed_out, name, udev_timeout(), problem)
            raise TaskError(self.task.operation.value, name, None, log=(problem,))
