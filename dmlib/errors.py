# SPDX-License-Identifier: MIT
"""
Every exception that dmlib raises, and the rule that picks one for a failed ioctl.

Programs branch on the class and read the fields; people read ``str(error)``, one line.
Each class names its fields in ``_fields``; that is what makes the errors picklable although
their constructors take keywords.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from collections.abc import Sequence


def _rebuild(cls: type[DmError], fields: dict[str, Any]) -> DmError:
    return cls(**fields)


def _one_line(text: str) -> str:
    """Return *text* with what would break the line, or the terminal, escaped: names may hold any character."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class DmError(Exception):
    """Base of all dmlib errors; never raised itself."""

    _fields: ClassVar[Sequence[str]] = ()

    def __str__(self) -> str:
        return _one_line(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), {name: getattr(self, name) for name in self._fields})


class ArgumentError(DmError, ValueError):
    """
    An argument was refused by dmlib, before any ioctl; nothing has changed.

    Attributes:
        field: Name of the argument.
        value: The value that was refused.
        rule: What the value must be.
    """

    _fields = ("field", "value", "rule")

    def __init__(self, field: str, value: object, rule: str) -> None:
        self.field = field
        self.value = value
        self.rule = rule
        super().__init__(f"{field}={value!r}: {rule}")


class ParseError(DmError, ValueError):
    """
    A table or status line breaks the grammar of its target (raised in strict mode only).

    Attributes:
        line: The whole text that was read.
        field: Name of the word that did not fit.
        position: Index of that word, counted from 0.
        problem: What is wrong with it.
    """

    _fields = ("line", "field", "position", "problem")

    def __init__(self, line: str, field: str, position: int, problem: str) -> None:
        self.line = line
        self.field = field
        self.position = position
        self.problem = problem
        super().__init__(f"{field} (word {position}): {problem}, in {line!r}")


class StateError(DmError, RuntimeError):
    """
    The object or the device is not in a state in which this verb makes sense.

    Attributes:
        subject: The device or object.
        problem: The state that is in the way, and what to do about it.
    """

    _fields = ("subject", "problem")

    def __init__(self, subject: str, problem: str) -> None:
        self.subject = subject
        self.problem = problem
        super().__init__(f"{subject}: {problem}")


class ForeignDeviceError(DmError):
    """
    A verb would change a device whose uuid names another program as its owner; nothing was changed.

    Attributes:
        operation: The verb.
        device: Name of the device.
        uuid: Its uuid.
        owner: Whose device it is, such as ``LVM``.
    """

    _fields = ("operation", "device", "uuid", "owner")

    def __init__(self, operation: str, device: str, uuid: str, owner: str) -> None:
        self.operation = operation
        self.device = device
        self.uuid = uuid
        self.owner = owner
        super().__init__(f"{operation} {device}: it belongs to {owner} (uuid {uuid}); foreign=True overrides this")


class UnsupportedError(DmError):
    """
    The library, the driver or a target is too old, or was built without something.

    Attributes:
        feature: What was asked for.
        need: What it takes.
        have: What was found.
    """

    _fields = ("feature", "need", "have")

    def __init__(self, feature: str, need: str, have: str) -> None:
        self.feature = feature
        self.need = need
        self.have = have
        super().__init__(f"{feature} needs {need}, found {have}")


class DriverUnavailableError(DmError, OSError):
    """
    The device-mapper driver cannot be used: not in the kernel, or not by this process.

    Attributes:
        errno: Why the control node could not be used.
        reason: The same for people, with what to do.
        log: libdevmapper's own lines, if it was asked.
    """

    _fields = ("errno", "reason", "log")

    def __init__(self, errno: int | None, reason: str, log: Sequence[str] = ()) -> None:
        OSError.__init__(self, errno, reason)
        self.reason = reason
        self.log = tuple(log)

    def __str__(self) -> str:
        return _one_line(f"device mapper is not available: {self.reason}")


class TaskError(DmError, OSError):
    """
    An ioctl, or libdevmapper on the way to it, failed; raised itself where no subclass fits.

    Attributes:
        operation: The verb, as ``dmsetup`` names it (``create``, ``load``, ``message`` ...).
        device: Name, uuid or number by which the device was addressed.
        errno: The kernel's error number; ``None`` if the failure was libdevmapper's own: before the ioctl or, with a
            foreign device whose stored name or uuid it cannot read, after it.
        log: libdevmapper's own warnings and errors of this call.
        kernel_log: What the kernel logged about device mapper meanwhile. Other processes may have
            caused some of it; it is for people and is never parsed.
    """

    _fields: ClassVar[Sequence[str]] = ("operation", "device", "errno", "log", "kernel_log")

    def __init__(
        self,
        operation: str,
        device: str,
        errno: int | None,
        *,
        log: Sequence[str] = (),
        kernel_log: Sequence[str] = (),
    ) -> None:
        OSError.__init__(self, errno or None, os.strerror(errno) if errno else "failed in libdevmapper")
        self.operation = operation
        self.device = device
        self.log = tuple(log)
        self.kernel_log = tuple(kernel_log)

    def __str__(self) -> str:
        return self._summary()

    def _summary(self) -> str:
        parts = [f"{self.operation} {self.device}: {self.strerror}"]
        if self.kernel_log:
            parts.append(f"kernel, meanwhile: {self.kernel_log[0]}")  # later lines only say what followed
        elif not self.errno and self.log:
            parts.append(self.log[0])
        return _one_line("; ".join(parts))


class DeviceNotFoundError(TaskError):
    """No device has this name, uuid or number (also where libdevmapper calls that success)."""


class DeviceExistsError(TaskError):
    """The name or the uuid is taken already."""


class PermissionDeniedError(TaskError):
    """The kernel wants CAP_SYS_ADMIN for this."""


class TargetRefusedError(TaskError):
    """A target would not take its table line or message; ``kernel_log`` tends to say why."""


class DeviceBusyError(TaskError):
    """
    The device is in use.

    Attributes:
        users: Who uses it, as far as it can be seen from here: devices on top of it, mounts in
            any mount namespace, processes that have it open.
    """

    _fields = ("operation", "device", "errno", "log", "kernel_log", "users")

    def __init__(
        self,
        operation: str,
        device: str,
        errno: int | None = _errno.EBUSY,
        *,
        log: Sequence[str] = (),
        kernel_log: Sequence[str] = (),
        users: Sequence[str] = (),
    ) -> None:
        super().__init__(operation, device, errno, log=log, kernel_log=kernel_log)
        self.users = tuple(users)

    def __str__(self) -> str:
        if not self.users:
            return self._summary()
        return _one_line(f"{self.operation} {self.device}: in use: {', '.join(self.users)}")


class UdevTimeoutError(DmError):
    """
    udev did not answer in time and the device node is not what it should be.

    The operation itself was carried out by the kernel; its cookie has been taken down.

    Attributes:
        cookie: The udev cookie (a SysV semaphore key).
        device: The device.
        timeout: Seconds that were waited.
        problem: What is wrong with the node.
    """

    _fields = ("cookie", "device", "timeout", "problem")

    def __init__(self, cookie: int, device: str, timeout: float, problem: str) -> None:
        self.cookie = cookie
        self.device = device
        self.timeout = timeout
        self.problem = problem
        super().__init__(f"{device}: no answer from udev within {timeout:g} s (cookie 0x{cookie:x}); {problem}")


class SuspendTimeoutError(DmError):
    """
    The kernel, or a write-back before the suspend, did not finish before the deadline.

    Nothing was changed: an inactive table loaded for the purpose is dropped, and a device that the
    kernel does suspend later is resumed at once, by a thread that outlives this error.

    Attributes:
        device: The device.
        timeout: Seconds that were waited.
        step: What did not finish: ``suspend`` or ``sync``.
    """

    _fields = ("device", "timeout", "step")

    def __init__(self, device: str, timeout: float, step: str = "suspend") -> None:
        self.device = device
        self.timeout = timeout
        self.step = step
        super().__init__(f"{step} of {device} did not finish within {timeout:g} s")


class PoolError(DmError):
    """
    A thin pool is in a state in which the verb cannot work; the subclass says which.

    Attributes:
        pool: Name of the pool device.
        status: The pool's status at that moment.
        problem: What that means for the verb.
    """

    _fields = ("pool", "status", "problem")

    def __init__(self, pool: str, status: object, problem: str) -> None:
        self.pool = pool
        self.status = status
        self.problem = problem
        super().__init__(f"pool {pool}: {problem}")


class OutOfDataSpaceError(PoolError):
    """The pool has no data blocks left, or fewer than the verb may need."""


class OutOfMetadataSpaceError(PoolError):
    """The pool has no metadata blocks left; growing the metadata device heals it."""


class PoolReadOnlyError(PoolError):
    """The pool is read-only and no other cause is visible in its status."""


class PoolNeedsCheckError(PoolError):
    """The metadata must be checked off-line (``thin_check``) before the pool can be written again."""


class PoolFailedError(PoolError):
    """The pool is in fail mode: all I/O fails until it is repaired off-line."""


class CleanupError(DmError, ExceptionGroup):
    """
    Something failed, and undoing it failed as well; what is left behind is named in each part.

    The first cause is chained as ``__cause__``; ``exceptions`` are the failures of the clean-up.
    """

    def __new__(cls, message: str, exceptions: Sequence[Exception]) -> Self:
        """Take the message and the failures; a group must set itself up here."""
        return super().__new__(cls, message, exceptions)

    def derive(self, excs: Sequence[Exception]) -> CleanupError:  # type: ignore[override] # only ever of Exceptions
        """Return a part of this group, for ``except*``."""
        return CleanupError(self.message, excs)

    def __reduce__(self) -> tuple[Any, ...]:
        return CleanupError, (self.message, list(self.exceptions))


# EBUSY from these verbs means that the *new* name or uuid is taken, not that the device is in use.
_NAMING_VERBS = frozenset({"create", "rename", "set_uuid"})
# A target answers these itself, so EINVAL and its kin are the target's refusal.
_TARGET_VERBS = frozenset({"load", "resume", "message"})
# ENODATA and EEXIST are a thin pool's words for an unknown and a used thin id.
_REFUSALS = frozenset(
    {
        _errno.EINVAL,
        _errno.EPERM,  # a read-only pool that would have to be formatted; for want of a capability it is EACCES
        _errno.ENODATA,
        _errno.EEXIST,
        _errno.EOPNOTSUPP,
        _errno.ENOTBLK,
        _errno.ENODEV,
        _errno.ENOENT,
        _errno.EILSEQ,
        _errno.ENOTSUP,
        _errno.ENOSPC,
    }
)


def from_task(
    operation: str,
    device: str,
    errno: int | None,
    *,
    log: Sequence[str] = (),
    kernel_log: Sequence[str] = (),
) -> TaskError:
    """Return the error for a failed *operation* on *device*; the one place where errno becomes a class."""
    cls: type[TaskError] = TaskError
    if errno == _errno.ENXIO:
        cls = DeviceNotFoundError
    elif errno == _errno.EBUSY:
        cls = DeviceExistsError if operation in _NAMING_VERBS else DeviceBusyError
    elif errno in _REFUSALS and operation in _TARGET_VERBS:
        cls = TargetRefusedError
    elif errno in (_errno.EACCES, _errno.EPERM):
        cls = PermissionDeniedError
    return cls(operation, device, errno, log=log, kernel_log=kernel_log)
