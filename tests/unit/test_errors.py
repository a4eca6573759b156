# SPDX-License-Identifier: MIT
"""Errors: the tree, the class for each errno, pickling, and the one line that people read."""

import copy
import errno
import os
import pickle

import pytest

from dmlib import errors
from dmlib.errors import (
    ArgumentError,
    CleanupError,
    DeviceBusyError,
    DeviceExistsError,
    DeviceNotFoundError,
    DmError,
    DriverUnavailableError,
    ForeignDeviceError,
    OutOfDataSpaceError,
    OutOfMetadataSpaceError,
    ParseError,
    PermissionDeniedError,
    PoolError,
    PoolFailedError,
    PoolNeedsCheckError,
    PoolReadOnlyError,
    StateError,
    SuspendTimeoutError,
    TargetRefusedError,
    TaskError,
    UdevTimeoutError,
    UnsupportedError,
    from_task,
)

LOGS = {"log": ("device-mapper: reload ioctl failed",), "kernel_log": ("device-mapper: table: 253:0: too small",)}
TASK = {"operation": "load", "device": "pool", "errno": errno.EINVAL, **LOGS}
POOL = {"pool": "pool", "status": ("any", "object"), "problem": "is full"}

EXAMPLES = {
    ArgumentError: {"field": "name", "value": "a/b", "rule": "must not contain '/'"},
    ParseError: {"line": "8:0 x", "field": "offset", "position": 1, "problem": "must be a number"},
    StateError: {"subject": "disk", "problem": "has no live table"},
    ForeignDeviceError: {"operation": "remove", "device": "vg-root", "uuid": "LVM-x", "owner": "LVM"},
    UnsupportedError: {"feature": "inactive tables", "need": "driver 4.16", "have": "4.11"},
    DriverUnavailableError: {"errno": errno.ENOENT, "reason": "no control node", "log": ("open failed",)},
    TaskError: TASK,
    DeviceNotFoundError: TASK | {"errno": errno.ENXIO},
    DeviceExistsError: TASK | {"errno": errno.EBUSY},
    PermissionDeniedError: TASK | {"errno": errno.EACCES},
    TargetRefusedError: TASK,
    DeviceBusyError: TASK | {"errno": errno.EBUSY, "users": ("/mnt", "thin-1")},
    UdevTimeoutError: {"cookie": 0xD4D1234, "device": "disk", "timeout": 30.0, "problem": "the node is missing"},
    SuspendTimeoutError: {"device": "disk", "timeout": 2.5, "step": "sync"},
    PoolError: POOL,
    OutOfDataSpaceError: POOL,
    OutOfMetadataSpaceError: POOL,
    PoolReadOnlyError: POOL,
    PoolNeedsCheckError: POOL,
    PoolFailedError: POOL,
}
BASES = {
    ArgumentError: ValueError,
    ParseError: ValueError,
    StateError: RuntimeError,
    DriverUnavailableError: OSError,
    TaskError: OSError,
    DeviceNotFoundError: TaskError,
    DeviceExistsError: TaskError,
    PermissionDeniedError: TaskError,
    TargetRefusedError: TaskError,
    DeviceBusyError: TaskError,
    OutOfDataSpaceError: PoolError,
    OutOfMetadataSpaceError: PoolError,
    PoolReadOnlyError: PoolError,
    PoolNeedsCheckError: PoolError,
    PoolFailedError: PoolError,
    CleanupError: ExceptionGroup,
}


def all_classes():
    return {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, DmError) and value is not DmError
    }


def test_every_class_is_tested_here():
    """A new class of error gets an example, so that the tests below see it."""
    assert all_classes() == {*EXAMPLES, CleanupError}


@pytest.mark.parametrize(("cls", "base"), BASES.items())
def test_tree(cls, base):
    """Programs can catch by DmError, and by the standard class that fits."""
    assert issubclass(cls, base)
    assert issubclass(cls, DmError)


@pytest.mark.parametrize("cls", [DeviceNotFoundError, DeviceExistsError, PermissionDeniedError])
def test_no_false_claims(cls):
    """The errno is not that of a file, so no class of file errors is claimed."""
    assert not issubclass(cls, (FileNotFoundError, FileExistsError, PermissionError))


@pytest.mark.parametrize(("cls", "fields"), EXAMPLES.items())
def test_fields(cls, fields):
    """Each field is an attribute, and all of them are in the list that pickling uses."""
    error = cls(**fields)
    assert {name: getattr(error, name) for name in error._fields} == fields


def pickled(protocol):
    return lambda error: pickle.loads(pickle.dumps(error, protocol))  # noqa: S301


PROTOCOLS = [pickled(protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]


@pytest.mark.parametrize(("cls", "fields"), EXAMPLES.items())
@pytest.mark.parametrize("twin_of", [copy.copy, copy.deepcopy, *PROTOCOLS])
def test_pickle_and_copy(cls, fields, twin_of):
    """An error survives pickling, so that it can cross a process boundary."""
    error = cls(**fields)
    twin = twin_of(error)
    assert type(twin) is cls
    assert str(twin) == str(error)
    assert {name: getattr(twin, name) for name in cls._fields} == fields


@pytest.mark.parametrize(("cls", "fields"), EXAMPLES.items())
def test_one_line(cls, fields):
    """The text is one line and says what it is about."""
    text = str(cls(**fields))
    assert text == text.strip()
    assert text.isprintable()
    subjects = ("field", "feature", "device", "subject", "pool", "reason")
    assert any(str(fields[name]) in text for name in subjects if name in fields)


HOSTILE = "a\nb\x1b[2J\u2028\udcff"


@pytest.mark.parametrize(
    "error",
    [
        ArgumentError("name", HOSTILE, "must not"),
        ParseError(HOSTILE, "offset", 0, HOSTILE),
        StateError(HOSTILE, "is suspended"),
        DriverUnavailableError(None, HOSTILE),
        TaskError("load", HOSTILE, errno.EINVAL, kernel_log=[HOSTILE]),
        TaskError("load", HOSTILE, None, log=[HOSTILE]),
        DeviceBusyError("remove", HOSTILE, users=[HOSTILE]),
        UdevTimeoutError(1, HOSTILE, 1.0, "x"),
        SuspendTimeoutError(HOSTILE, 1.0),
        PoolError(HOSTILE, None, "is full"),
        CleanupError(HOSTILE, [ValueError("x")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_hostile_names_stay_in_one_line(error):
    """A device name with a new line, an escape sequence or a stray byte breaks neither line nor terminal."""
    text = str(error)
    assert text.isprintable()
    assert "\\n" in text
    text.encode("utf-8")


def test_messages():
    """The texts, word for word."""
    einval = os.strerror(errno.EINVAL)
    assert str(ArgumentError("size", 5, "must be even")) == "size=5: must be even"
    assert str(ParseError("8:0 x", "offset", 1, "is no number")) == "offset (word 1): is no number, in '8:0 x'"
    assert str(StateError("disk", "is suspended")) == "disk: is suspended"
    assert str(UnsupportedError("uuids", "driver 4.45", "4.37")) == "uuids needs driver 4.45, found 4.37"
    assert str(DriverUnavailableError(2, "no node")) == "device mapper is not available: no node"
    assert str(TaskError("load", "a", errno.EINVAL)) == f"load a: {einval}"
    assert (
        str(TaskError("load", "a", errno.EINVAL, log=["l"], kernel_log=["first", "k"]))
        == f"load a: {einval}; kernel, meanwhile: first"
    )
    assert str(TaskError("load", "a", None, log=["first", "l"])) == "load a: failed in libdevmapper; first"
    assert str(DeviceBusyError("remove", "a", users=["b", "/mnt"])) == "remove a: in use: b, /mnt"
    assert str(DeviceBusyError("remove", "a")) == f"remove a: {os.strerror(errno.EBUSY)}"
    assert str(SuspendTimeoutError("a", 30)) == "suspend of a did not finish within 30 s"
    assert (
        str(UdevTimeoutError(0xAB, "a", 1.5, "no node")) == "a: no answer from udev within 1.5 s (cookie 0xab); no node"
    )
    assert str(PoolReadOnlyError("p", None, "is read-only")) == "pool p: is read-only"


CASES = [
    ("create", errno.EBUSY, DeviceExistsError),
    ("rename", errno.EBUSY, DeviceExistsError),
    ("set_uuid", errno.EBUSY, DeviceExistsError),
    ("remove", errno.EBUSY, DeviceBusyError),
    ("load", errno.EBUSY, DeviceBusyError),
    ("message", errno.EBUSY, DeviceBusyError),
    *((operation, errno.ENXIO, DeviceNotFoundError) for operation in ("remove", "load", "info", "status", "rename")),
    *((operation, errno.EACCES, PermissionDeniedError) for operation in ("create", "load", "info")),
    *((operation, errno.EPERM, PermissionDeniedError) for operation in ("create", "info")),
    ("load", errno.EPERM, TargetRefusedError),
    *((operation, errno.EINVAL, TargetRefusedError) for operation in ("load", "resume", "message")),
    ("create", errno.EINVAL, TaskError),
    ("rename", errno.EINVAL, TaskError),
    ("set_uuid", errno.EINVAL, TaskError),
    ("suspend", errno.EINVAL, TaskError),
    ("message", errno.EEXIST, TargetRefusedError),
    ("message", errno.ENODATA, TargetRefusedError),
    ("load", errno.ENODATA, TargetRefusedError),
    ("message", errno.EOPNOTSUPP, TargetRefusedError),
    ("load", errno.ENODEV, TargetRefusedError),
    ("load", errno.ENOTBLK, TargetRefusedError),
    ("load", errno.ENOENT, TargetRefusedError),
    ("load", errno.EILSEQ, TargetRefusedError),
    ("load", errno.ENOSPC, TargetRefusedError),
    ("load", errno.ENOMEM, TaskError),
    ("load", errno.EIO, TaskError),
    ("remove", None, TaskError),
    ("load", None, TaskError),
    ("load", 0, TaskError),
    ("message", 0, TaskError),
]


@pytest.mark.parametrize(("operation", "number", "cls"), CASES)
def test_class_by_operation_and_errno(operation, number, cls):
    """Operation and errno decide on the class; no errno is never shown as success."""
    error = from_task(operation, "disk", number, **LOGS)
    assert type(error) is cls
    assert (error.operation, error.device, error.errno) == (operation, "disk", number or None)
    assert (error.log, error.kernel_log) == (LOGS["log"], LOGS["kernel_log"])
    assert "Success" not in str(error)


def test_oserror_attributes():
    """What expects an OSError finds errno and strerror."""
    error = from_task("load", "disk", errno.ENXIO)
    assert isinstance(error, OSError)
    assert error.errno == errno.ENXIO
    assert error.strerror == os.strerror(errno.ENXIO)
    assert error.filename is None


def test_cleanup_error_is_a_group():
    """A failed clean-up carries each failure, can be split by ``except*`` and survives pickling."""
    busy = DeviceBusyError("remove", "disk", users=["/mnt"])
    group = CleanupError("create disk", [busy, StateError("pool", "is suspended")])
    seen = []
    try:
        raise group
    except* DeviceBusyError as part:
        seen.append((type(part), part.exceptions))
    except* StateError as part:
        seen.append((type(part), part.exceptions))
    assert seen == [(CleanupError, (busy,)), (CleanupError, (group.exceptions[1],))]
    twin = pickle.loads(pickle.dumps(group))  # noqa: S301
    assert type(twin) is CleanupError
    assert twin.message == "create disk"
    assert [type(e) for e in twin.exceptions] == [DeviceBusyError, StateError]
    assert twin.exceptions[0].users == ("/mnt",)
    assert "create disk" in str(group)
