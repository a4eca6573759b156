# SPDX-License-Identifier: MIT
"""
One ioctl: :class:`Task` sends it through libdevmapper, waits for udev, and copies the results.

What an operation needs and takes is data, in ``dmlib.operations``; what comes back is read in ``_answers``. A
failure becomes an exception in :meth:`Prepared.result` and nowhere else. Most programs want :class:`dmlib.Device`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final, Self

from dmlib import _answers, _ffi, _kmsg, ids
from dmlib.errors import (
    DeviceNotFoundError,
    StateError,
    TargetRefusedError,
    TaskError,
    UdevTimeoutError,
    UnsupportedError,
    from_task,
)
from dmlib.operations import INPUTS, RULES, Geometry, Operation, check_number
from dmlib.results import DeviceInfo, Result
from dmlib.sysfs import node_number
from dmlib.udev import Cookie, UdevFlags, flags_in_database, node_path, node_problem, udev_timeout

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from dmlib._answers import Lines, Versions

__all__ = ["DeviceInfo", "Geometry", "Operation", "Prepared", "Result", "Task"]

_NOT_RUN: Final = 0
_DONE: Final = 1
_DEFAULTS: Final = {"flush": True, "lockfs": True, "sector": 0, "targets": ()}
_ID_LIMIT: Final = (1 << 32) - 2
_MODE_LIMIT: Final = 0o777
_MINOR_LIMIT: Final = (1 << 20) - 1

Secret = bytes | bytearray | memoryview
"""Text with key material in it: its owner can wipe it, unlike a str."""


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
        target: The target type that ``target_version`` is about.
        new: New name or uuid, for ``rename`` and ``set_uuid``.
        targets: Table for ``load``: ``(start, length, type, parameters)``, in sectors; parameters with keys in them as
            bytes.
        message: Text for a target; as bytes if there are keys in it.
        sector: Which target gets the message: the one at this sector.
        readonly: The table refuses writes.
        flush: ``suspend`` waits for I/O in flight; ``status`` lets a pool commit first.
        lockfs: ``suspend`` freezes a mounted file system.
        inactive: ``table``, ``deps`` and ``status`` look at the inactive table.
        deferred: ``remove`` takes effect when the last user closes the device.
        secure: Keys are in what is sent (if that is bytes, it is so by itself) or comes back: buffers of libdevmapper,
            the kernel and dmlib are wiped, and no text of it is logged or gets into an exception. What is a str in
            Python, such as the lines of a result, stays in memory until it is overwritten.
        measurement: ``status`` answers with what the kernel measures of the table for the integrity log (IMA).
        geometry: For ``set_geometry``.
        minor: The minor number that ``create`` is to take.
        uid: Owner of the node, if dmlib makes it and not udev: in ``create`` (without udev) and ``resume``.
        gid: Its group.
        mode: Its permissions.
        udev: What udev's rules are to leave out; by default what they left out before.

    Raises:
        ArgumentError: A name, uuid, target type or number that the kernel cannot take.
        StateError: No way of addressing, or more than one; something that the operation needs or does not take.
        UnsupportedError: *measurement*, and libdevmapper is older than 1.02.181.
    """

    __slots__ = (
        "_outcome",
        "deferred",
        "flush",
        "geometry",
        "gid",
        "inactive",
        "lockfs",
        "measurement",
        "message",
        "minor",
        "mode",
        "name",
        "new",
        "number",
        "operation",
        "readonly",
        "sector",
        "secure",
        "target",
        "targets",
        "udev",
        "uid",
        "uuid",
    )

    def __init__(  # noqa: PLR0913 - everything that can be said to the driver
        self,
        operation: Operation,
        *,
        name: str | None = None,
        uuid: str | None = None,
        number: ids.DeviceNumber | None = None,
        target: str | None = None,
        new: str | None = None,
        targets: Iterable[tuple[int, int, str, str | Secret]] = (),
        message: str | Secret | None = None,
        sector: int = 0,
        readonly: bool = False,
        flush: bool = True,
        lockfs: bool = True,
        inactive: bool = False,
        deferred: bool = False,
        secure: bool = False,
        measurement: bool = False,
        geometry: Geometry | None = None,
        minor: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        mode: int | None = None,
        udev: UdevFlags | None = None,
    ) -> None:
        self.operation = operation
        self.name = None if name is None else ids.check_name(name)
        self.uuid = None if uuid is None else ids.check_uuid(uuid)
        if number is not None and not isinstance(number, ids.DeviceNumber):
            raise TypeError(f"number must be a DeviceNumber, not {type(number).__name__}")
        self.number = number
        self.target = None if target is None else ids.check_target_type(target)
        self.new = new
        if new is not None:
            (ids.check_name if operation is Operation.RENAME else ids.check_uuid)(new, "new")
        self.targets = tuple(targets)
        self.message = message
        self.sector = sector
        self.readonly = readonly
        self.flush = flush
        self.lockfs = lockfs
        self.inactive = inactive
        self.deferred = deferred
        self.secure = secure or not all(
            isinstance(text, str) for text in (message or "", *(t[3] for t in self.targets))
        )
        self.measurement = measurement
        if geometry is not None and not isinstance(geometry, Geometry):
            raise TypeError(f"geometry must be a Geometry, not {type(geometry).__name__}")
        self.geometry = None if geometry is None else geometry.checked()
        self.minor = check_number(minor, "minor", _MINOR_LIMIT)
        self.uid = check_number(uid, "uid", _ID_LIMIT)
        self.gid = check_number(gid, "gid", _ID_LIMIT)
        self.mode = check_number(mode, "mode", _MODE_LIMIT)
        self.udev = udev
        self._check()
        self._outcome: _ffi.IntPtr | None = None

    def _check(self) -> None:
        operation, rules = self.operation, RULES[self.operation]
        ways = sum(way is not None for way in (self.name, self.uuid, self.number))
        takes_uuid = operation is Operation.CREATE and self.name is not None and self.number is None
        if ways != (rules.address == "device") and not (ways > 1 and takes_uuid):
            raise StateError(f"task {operation.value}", "address one device, in one way: name, uuid or number")
        if (self.target is not None) != (rules.address == "target"):
            raise StateError(f"task {operation.value}", "a target type is what target_version needs, and nothing else")
        for field, entry in INPUTS.items():
            value = getattr(self, field)
            given = value is not None and value != _DEFAULTS.get(field, False)
            if given and operation not in entry.on:
                raise StateError(f"task {operation.value}", f"does not take {field}")
            if not given and rules.needs == field:
                raise StateError(f"task {operation.value}", f"needs {field}")

    @property
    def label(self) -> str:
        """What to call the device in messages."""
        number = None if self.number is None else str(self.number)
        return self.name or self.uuid or number or self.target or "device mapper"

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

    __slots__ = ("_cookie", "_ffi", "_lib", "_mark", "_result", "pointer", "rules", "task")

    def __init__(self, task: Task) -> None:
        self._lib, self._ffi = _ffi.connect()
        self.task = task
        self.rules = RULES[task.operation]
        self.pointer: Any = self._ffi.NULL
        self._cookie = Cookie() if self.rules.uevent else None
        self._result: Result | None = None
        self._mark = _kmsg.mark() if self.rules.asks_target else None

    def __enter__(self) -> Self:
        if self.task._outcome is not None:  # noqa: SLF001 - one class in two halves
            raise StateError(f"task {self.task.operation.value} {self.task.label}", "was sent before; make a new one")
        self.task._outcome = self._ffi.new("int *")  # noqa: SLF001
        with _ffi.lock:
            try:
                self._build()
            except BaseException:
                self._free()
                self._discard_cookie()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        done = self.task.succeeded
        try:
            with _ffi.lock:
                self._free()
            if done and kind is None and self._cookie is not None:
                self._cookie.wait(f"{self.task.operation.value} {self.task.label}")
        finally:
            self._discard_cookie()
        self._take_log()
        if done and kind is None and self._result is not None and self._result.info is not None:
            self._check_node(self._result.info)

    def _discard_cookie(self) -> None:
        if self._cookie is not None:
            self._cookie.discard()

    def _take_log(self) -> tuple[str, ...]:
        return _ffi.take_log(keep_quiet=self.task.secure)[1]

    # -- before the call

    def _build(self) -> None:
        lib, task = self._lib, self.task
        _ffi.follow_log_level()
        self.pointer = lib.dm_task_create(getattr(lib, self.rules.c_type))
        if not self.pointer:
            raise self.error()
        name = task.target if task.name is None else task.name
        if name is not None:
            self._set(lib.dm_task_set_name(self.pointer, _ffi.encode(name)))
        if task.uuid is not None:
            self._set(lib.dm_task_set_uuid(self.pointer, _ffi.encode(task.uuid)))
        if task.number is not None:
            self._set(lib.dm_task_set_major_minor(self.pointer, *task.number, 0))
        if task.new is not None:
            renames = task.operation is Operation.RENAME
            set_new = lib.dm_task_set_newname if renames else lib.dm_task_set_newuuid
            self._set(set_new(self.pointer, _ffi.encode(task.new)))
        if task.geometry is not None:
            words = (str(value).encode("ascii") for value in (*task.geometry[:3], task.geometry.start.count))
            self._set(lib.dm_task_set_geometry(self.pointer, *words))
        self._build_content()
        self._build_node()
        self._prepare_udev()

    def _build_content(self) -> None:
        lib, task = self._lib, self.task
        for start, length, target_type, params in task.targets:
            kind = _ffi.encode(ids.check_target_type(target_type))
            with _ffi.text(params) as text:
                self._set(lib.dm_task_add_target(self.pointer, start, length, kind, text))
        if task.message is not None:
            with _ffi.text(task.message) as text:
                self._set(lib.dm_task_set_message(self.pointer, text))
            self._set(lib.dm_task_set_sector(self.pointer, task.sector))
        for wanted, switch in (
            (task.readonly, lib.dm_task_set_ro),
            (not task.flush, lib.dm_task_no_flush),
            (not task.lockfs, lib.dm_task_skip_lockfs),
            (task.inactive, lib.dm_task_query_inactive_table),
            (task.deferred, lib.dm_task_deferred_remove),
            (task.secure, lib.dm_task_secure_data),
        ):
            if wanted:
                self._set(switch(self.pointer))
        if task.measurement and not lib.dmlib_ima_measurement(self.pointer):
            raise UnsupportedError("measurements", "libdevmapper 1.02.181", _ffi.library_version())

    def _build_node(self) -> None:
        lib, task = self._lib, self.task
        for value, setter in (
            (task.uid, lib.dm_task_set_uid),
            (task.gid, lib.dm_task_set_gid),
            (task.mode, lib.dm_task_set_mode),
        ):
            if value is not None:
                self._set(setter(self.pointer, value))
        if task.minor is not None:
            self._set(lib.dm_task_set_minor(self.pointer, task.minor))

    def _prepare_udev(self) -> None:
        lib, operation = self._lib, self.task.operation
        # Without udev the library makes the node, and does so at creation: a resume then has no node work to
        # queue and can run without the lock, which it must, since it may have to wait for I/O.
        if operation is Operation.RESUME or (operation is Operation.CREATE and not lib.dm_udev_get_sync_support()):
            self._set(lib.dm_task_set_add_node(self.pointer, lib.DM_ADD_NODE_ON_CREATE))
        # A removal can do without a cookie: where no semaphore is left, it is what takes things back.
        if self._cookie is not None and not self._cookie.attach(self.pointer, self._udev_flags()):
            self._set(operation is Operation.REMOVE)

    def _udev_flags(self) -> UdevFlags:
        task = self.task
        if task.udev is not None:
            return task.udev
        number = task.number
        if number is None and task.name is not None:
            number = node_number(node_path(task.name))
        return UdevFlags.NONE if number is None else flags_in_database(number)

    def _set(self, ok: int) -> None:
        if not ok:
            raise self.error()

    # -- the call

    def call(self) -> None:
        """Send it from Python, under the lock where the library's shared state is touched."""
        if self.rules.locked:
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
        lib, ffi, pointer, operation = self._lib, self._ffi, self.pointer, self.task.operation
        info = self._info() if self.rules.address == "device" else None
        lines: Lines = ()
        deps: tuple[ids.DeviceNumber, ...] = ()
        response: str | None = None
        versions: Versions = ()
        match operation:
            case Operation.STATUS | Operation.TABLE:
                lines = _answers.lines(lib, ffi, pointer)
            case Operation.DEPS:
                deps = _answers.deps(lib, pointer)
            case Operation.MESSAGE:
                self._check_delivered(info)
                response = _answers.response(lib, ffi, pointer)
            case Operation.VERSION:
                versions = _answers.driver_version(lib, ffi, pointer)
            case Operation.TARGET_VERSION | Operation.TARGET_VERSIONS:
                versions = _answers.target_versions(lib, ffi, pointer)
            case _:
                pass
        self._result = Result(info=info, lines=lines, deps=deps, response=response, versions=versions)
        return self._result

    def _check_delivered(self, info: DeviceInfo | None) -> None:
        # The kernel calls it success when there is no live table to deliver to. (Messages with @ are for the
        # driver itself.)
        text = self.task.message
        for_driver = isinstance(text, str) and text.startswith("@")
        if info is not None and not info.live_table and not for_driver:
            raise StateError(self.task.label, "has no live table, so the message reached nobody")

    def error(self) -> TaskError:
        """Return the exception for what went wrong, with what libdevmapper and the kernel said of it."""
        lines = self._take_log()
        kernel = _kmsg.since(self._mark) if self._mark is not None else ()
        said: dict[str, Any] = {"log": lines, "kernel_log": kernel}
        if self.errno == errno.ENXIO and self.rules.asks_target and self._exists():
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
        there, info = _answers.info(self._lib, self._ffi, self.pointer)
        if not there and self.rules.absence_unseen:
            raise DeviceNotFoundError(self.task.operation.value, self.task.label, errno.ENXIO)
        return info

    def _free(self) -> None:
        if self.pointer:
            pointer, self.pointer = self.pointer, self._ffi.NULL
            self._lib.dm_task_destroy(pointer)

    def _check_node(self, info: DeviceInfo) -> None:
        """Compare the nodes with what they must be now, and mend those that udev, or the lack of it, left wrong."""
        operation = self.task.operation
        if not self.rules.uevent:
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
            if self._cookie is not None and self._cookie.timed_out:
                raise UdevTimeoutError(self._cookie.timed_out, name, udev_timeout(), problem)
            raise TaskError(self.task.operation.value, name, None, log=(problem,))
