# SPDX-License-Identifier: MIT
"""Every error of a task or device, provoked from the real kernel; and what a failure in mid-work leaves: nothing."""

import ctypes
import errno
import os
import pickle
import struct
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from dmlib import (
    ArgumentError,
    CleanupError,
    Device,
    DeviceBusyError,
    DeviceExistsError,
    DeviceNotFoundError,
    DeviceNumber,
    DriverUnavailableError,
    Linear,
    MiB,
    ParseError,
    PermissionDeniedError,
    RawTarget,
    Sectors,
    StateError,
    SuspendTimeoutError,
    Table,
    TargetRefusedError,
    TaskError,
    ThinPoolTarget,
    Zero,
    list_devices,
)
from dmlib._undo import Undo

ZERO = Table.single(MiB(1), Zero())
NO_TARGET = Table.single(MiB(1), RawTarget("no-such-target"))


def child(program, *words):
    """Run a Python program that uses dmlib; it must end well and print no error."""
    command = [sys.executable, "-c", textwrap.dedent(program), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def without_sys_admin(verb):
    """Run *verb* in a thread that has lost CAP_SYS_ADMIN (capabilities belong to threads), and return its error."""
    caught = []

    def run():
        header = struct.pack("=Ii", 0x20080522, 0)
        data = ctypes.create_string_buffer(24)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capget(header, data) == 0
        words = list(struct.unpack("=6I", data.raw))
        words[0] &= ~(1 << 21)
        words[1] &= ~(1 << 21)
        assert libc.capset(header, struct.pack("=6I", *words)) == 0
        try:
            verb()
        except Exception as error:  # noqa: BLE001 - handed to the thread that asserts
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (error,) = caught
    return error


def provoke(verb):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each class is asserted by name below
        verb()
    return caught.value


@pytest.fixture
def provoked(linear_device, unique_name):
    """One error of each class that a task or device can raise, all real."""
    device = linear_device
    missing = Device(unique_name())
    bare = Device.create(unique_name(), uuid="")
    errors = {
        ArgumentError: provoke(lambda: Device("a/b")),
        ParseError: provoke(lambda: Table.parse("0 8 linear nowhere", strict=True)),
        StateError: provoke(lambda: bare.message("hello")),
        DeviceNotFoundError: provoke(missing.info),
        DeviceExistsError: provoke(lambda: Device.create(device.name, ZERO)),
        TargetRefusedError: provoke(lambda: device.load(NO_TARGET)),
        PermissionDeniedError: without_sys_admin(device.suspend),
        DriverUnavailableError: without_sys_admin_from_the_start(),
    }
    bare.set_uuid(bare.name)
    errors[TaskError] = provoke(lambda: bare.set_uuid(f"{bare.name}-other"))
    with open(device.path, "rb"):
        errors[DeviceBusyError] = provoke(lambda: device.remove(timeout=0))
    return errors


def without_sys_admin_from_the_start():
    program = """
        import os, pickle, sys
        from dmlib import DriverUnavailableError, driver_version, library_version
        library_version()  # loads what an ordinary user might not be able to read
        os.seteuid(65534)
        try:
            driver_version()
        except DriverUnavailableError as error:
            sys.stdout.buffer.write(pickle.dumps(error))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, check=True)
    return pickle.loads(done.stdout)  # noqa: S301 - our own child


def test_each_class(provoked, linear_device, capfd):
    """Each error is of exactly its class, names device and operation, and survives pickling with all its fields."""
    for cls, error in provoked.items():
        assert type(error) is cls
        assert "\n" not in str(error)
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - just made
        assert type(again) is cls
        assert str(again) == str(error)
        assert cls._fields
        assert {field: getattr(again, field) for field in cls._fields} == {
            field: getattr(error, field) for field in cls._fields
        }
    tasks = {cls: error for cls, error in provoked.items() if isinstance(error, TaskError)}
    assert {cls: (error.operation, error.errno) for cls, error in tasks.items()} == {
        DeviceNotFoundError: ("info", errno.ENXIO),
        DeviceExistsError: ("create", errno.EBUSY),
        TargetRefusedError: ("load", errno.EINVAL),
        PermissionDeniedError: ("suspend", errno.EACCES),
        TaskError: ("set_uuid", errno.EINVAL),
        DeviceBusyError: ("remove", errno.EBUSY),
    }
    for cls in (DeviceExistsError, TargetRefusedError, PermissionDeniedError, TaskError, DeviceBusyError):
        assert "ioctl on" in tasks[cls].log[0], cls
    assert "unknown target type" in str(tasks[TargetRefusedError])
    assert provoked[DriverUnavailableError].errno == errno.EACCES
    assert any(str(os.getpid()) in user for user in tasks[DeviceBusyError].users)
    assert not linear_device.info().suspended
    assert capfd.readouterr() == ("", ""), "the library never prints"


def test_without_the_capability(linear_device):
    """A thread that lost CAP_SYS_ADMIN while the driver is open is refused by every verb, and changes nothing."""
    before = linear_device.info()
    for verb in (
        lambda: Device.create("dmlib-test-refused", ZERO),
        lambda: linear_device.reload(ZERO),
        lambda: linear_device.rename("dmlib-test-refused"),
        linear_device.info,
        linear_device.exists,
        linear_device.status,
        linear_device.remove,
        list_devices,
    ):
        error = without_sys_admin(verb)
        assert type(error) is PermissionDeniedError
        assert error.errno == errno.EACCES
    assert linear_device.info() == before


def test_a_process_that_gave_up_root():
    """A process that opened the driver as root and became an ordinary user is told that it may not, by its class."""
    program = """
        import os
        from dmlib import Device, DriverUnavailableError, PermissionDeniedError, driver_version, list_devices
        driver_version()
        classes = Device, PermissionDeniedError
        Device("x").exists()
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        for verb in (Device("x").info, Device("x").remove, list_devices):
            try:
                verb()
            except (PermissionDeniedError, DriverUnavailableError) as error:
                print(type(error).__name__, error.errno)
    """
    assert child(program) == "PermissionDeniedError 13\nPermissionDeniedError 13\nDriverUnavailableError 13\n"


def test_suspend_timeout_pickles():
    """The errors without an ioctl keep their fields as well."""
    error = pickle.loads(pickle.dumps(SuspendTimeoutError("a", 0.5)))  # noqa: S301
    assert (error.device, error.timeout, error.step) == ("a", 0.5, "suspend")


# -- failure at each step leaves nothing


def test_create_that_fails_at_the_table(unique_name, loop_device):
    """A target that is missing, or refuses its parameters, leaves neither device nor node nor uuid."""
    name = unique_name()
    nowhere = Table.single(MiB(1), Linear(DeviceNumber(0, 0), Sectors(0)))
    too_small = Table.single(MiB(64), Linear(loop_device(MiB(1)).number, Sectors(0)))
    for table in (NO_TARGET, Table.single(MiB(1), RawTarget("linear", "x")), nowhere, too_small):
        with pytest.raises(TargetRefusedError) as caught:
            Device.create(name, table, uuid=f"{name}-uuid")
        assert caught.value.operation == "load"
        assert not Device(name).exists()
    Device.create(name, ZERO, uuid=f"{name}-uuid")


def test_create_that_fails_at_the_resume(pool, unique_name):
    """A table that is refused only when it is to become live leaves nothing either."""
    name = unique_name()
    shorter = Table.single(MiB(16), pool.target())  # than what its metadata says
    pool.deactivate()
    with pytest.raises(TargetRefusedError, match="too small") as caught:
        Device.create(name, shorter)
    assert caught.value.operation == "resume"
    assert not Device(name).exists()


def test_a_device_below_that_is_gone(linear_device, unique_name):
    """A table over a number that no device has is the target's refusal; only the device itself is "not found"."""
    before = linear_device.table()
    gone = Device.create(unique_name(), ZERO)
    number = gone.info().number
    gone.remove()
    over_it = Table.single(MiB(1), Linear(number, Sectors(0)))
    with pytest.raises(TargetRefusedError, match="lookup failed") as caught:
        linear_device.load(over_it)
    assert caught.value.errno == errno.ENXIO
    with pytest.raises(TargetRefusedError):
        linear_device.reload(over_it)
    assert linear_device.table() == before
    with pytest.raises(DeviceNotFoundError):
        gone.load(over_it)


def test_a_pool_that_may_not_be_formatted(loop_device, unique_name):
    """EPERM from a target is its refusal, not a lack of permission to use the driver."""
    metadata, data = loop_device(MiB(4)), loop_device(MiB(4))
    target = ThinPoolTarget(metadata.number, data.number, "64KiB", read_only=True)
    with pytest.raises(TargetRefusedError) as caught:
        Device.create(unique_name(), Table.single(MiB(4), target))
    assert caught.value.errno == errno.EPERM


def test_create_over_a_device_that_somebody_holds(loop_device, unique_name):
    """A device below that is held exclusively leaves nothing, and its holder undisturbed."""
    loop = loop_device(MiB(1))
    held = os.open(loop.path, os.O_RDWR | os.O_EXCL)
    try:
        name = unique_name()
        with pytest.raises(DeviceBusyError) as caught:
            Device.create(name, Table.single(MiB(1), Linear(loop.number, Sectors(0))))
        assert caught.value.operation == "load"
        assert not Device(name).exists()
    finally:
        os.close(held)


def test_create_under_a_name_that_is_taken(linear_device):
    """Nothing is undone that another made: the device of that name keeps table and state."""
    before, table = linear_device.info(), linear_device.table()
    with pytest.raises(DeviceExistsError):
        Device.create(linear_device.name, ZERO)
    assert (linear_device.info(), linear_device.table()) == (before, table)


def test_when_taking_back_fails_too(linear_device):
    """With the first failure and that of the undo, both are in the error; the other undo steps still ran."""
    ran = []

    def attempt():
        with Undo("make it") as undo:
            undo.push(lambda: ran.append("first step"))
            undo.push(lambda: linear_device.remove(timeout=0))
            undo.push(lambda: ran.append("last step"))
            linear_device.load(NO_TARGET)

    with open(linear_device.path, "rb"), pytest.raises(CleanupError, match="make it failed") as caught:
        attempt()
    assert ran == ["last step", "first step"]
    assert isinstance(caught.value.__cause__, TargetRefusedError)
    assert [type(error) for error in caught.value.exceptions] == [DeviceBusyError]
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert [(type(error), error.device) for error in again.exceptions] == [(DeviceBusyError, linear_device.name)]
    with pytest.raises(ExceptionGroup) as part:
        raise caught.value.subgroup(DeviceBusyError)
    assert type(part.value) is CleanupError


def test_create_whose_undo_fails(unique_name):
    """A half-made device that somebody opened meanwhile cannot be taken back; the error says so, with both causes."""
    program = """
        import os, signal, sys, threading, time
        from dmlib import CleanupError, Device, MiB, RawTarget, Sectors, Linear, Table, DeviceNumber, Zero
        name = sys.argv[1]
        # Somebody else takes the half-made device over as soon as it is there.
        def take_over():
            while True:
                try:
                    Device(name).rename(name + "-taken")
                    return
                except OSError:
                    time.sleep(0.0002)
        parts = [(Sectors(8), Zero())] * 20000 + [(Sectors(8), RawTarget("no-such-target"))]
        table = Table.concat(parts)
        Device("x").exists()
        thread = threading.Thread(target=take_over)
        thread.start()
        try:
            Device.create(name, table)
        except CleanupError as error:
            print(type(error.__cause__).__name__, [type(part).__name__ for part in error.exceptions])
        thread.join()
        print(Device(name + "-taken").exists())
        Device(name + "-taken").remove()
    """
    begin = time.monotonic()
    printed = child(program, unique_name()).splitlines()
    assert printed[0].endswith(" ['DeviceNotFoundError']"), printed
    assert printed[0].split()[0] in ("TargetRefusedError", "DeviceNotFoundError")
    assert printed[1] == "True"
    assert time.monotonic() - begin < 20
