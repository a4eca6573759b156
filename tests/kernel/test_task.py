# SPDX-License-Identifier: MIT
"""One ioctl: addressed in one way, sent once, retried when interrupted, its results copied."""

import gc
import mmap
import os
import signal
import subprocess
import threading
import time

import pytest

from dmlib import (
    ArgumentError,
    CleanupError,
    Device,
    DeviceNotFoundError,
    DeviceNumber,
    Geometry,
    Linear,
    MiB,
    Operation,
    RawTarget,
    Sectors,
    StateError,
    Table,
    TargetRefusedError,
    Task,
    TaskError,
    Zero,
    list_devices,
)
from dmlib.operations import RULES
from dmlib.task import Prepared

ZERO = Table.single(MiB(1), Zero())


def test_three_ways_of_addressing(unique_name):
    """A device is found by name, by uuid and by number, and each answer names it fully."""
    name = unique_name()
    device = Device.create(name, ZERO, uuid=f"{name}-uuid")
    by_name = device.info()
    assert (by_name.name, by_name.uuid) == (name, f"{name}-uuid")
    assert Task(Operation.INFO, uuid=f"{name}-uuid").run().device == by_name
    assert Task(Operation.INFO, number=by_name.number).run().device == by_name
    for way in ({"uuid": f"{name}-uuid"}, {"number": by_name.number}):
        assert Task(Operation.TABLE, **way).run().lines == ((0, 2048, "zero", ""),)
        Task(Operation.SUSPEND, **way).run()
        assert device.info().suspended
        Task(Operation.RESUME, **way).run()
        assert not device.info().suspended
    Task(Operation.REMOVE, number=by_name.number).run()
    assert not device.exists()
    assert not os.path.lexists(device.path)


@pytest.fixture(scope="module")
def driver_major():
    """The major number of mapped devices."""
    with open("/proc/devices", encoding="ascii") as file:
        return next(int(line.split()[0]) for line in file if line.split()[1:] == ["device-mapper"])


NOT_ON_A_DEVICE = {operation for operation, rules in RULES.items() if rules.address != "device"} | {Operation.CREATE}


# mknodes is how a node without a device goes away, so it does its work on a missing one.
@pytest.mark.parametrize("operation", set(Operation) - {*NOT_ON_A_DEVICE, Operation.MKNODES}, ids=lambda op: op.value)
def test_missing_in_every_way(operation, driver_major):
    """A uuid or number that no device has is reported by every operation on a device, by that uuid or number."""
    extra = {"message": "hello"} if operation is Operation.MESSAGE else {}
    extra |= {"new": "dmlib-test-new"} if operation in (Operation.RENAME, Operation.SET_UUID) else {}
    extra |= {"geometry": Geometry(1, 1, 1)} if operation is Operation.SET_GEOMETRY else {}
    if operation is Operation.LOAD:
        extra |= {"targets": [(0, 8, "zero", "")]}
    missing = DeviceNumber(driver_major, 999)
    for way, label in (
        ({"name": "dmlib-test-missing"}, "dmlib-test-missing"),
        ({"uuid": "dmlib-test-missing"}, "dmlib-test-missing"),
        ({"number": missing}, str(missing)),
    ):
        with pytest.raises(DeviceNotFoundError) as caught:
            Task(operation, **way, **extra).run()
        assert (caught.value.operation, caught.value.device, caught.value.errno) == (operation.value, label, 6)


@pytest.mark.parametrize(
    "ways",
    [
        {},
        {"name": "a", "uuid": "b"},
        {"name": "a", "number": DeviceNumber(253, 0)},
        {"uuid": "b", "number": DeviceNumber(253, 0)},
    ],
)
def test_one_way_of_addressing(ways):
    """No way or two ways of addressing are refused here; the kernel would say that the device is not there."""
    with pytest.raises(StateError, match="one way"):
        Task(Operation.INFO, **ways)


@pytest.mark.parametrize(
    ("operation", "parts", "problem"),
    [
        (Operation.LOAD, {}, "needs targets"),
        (Operation.RENAME, {}, "needs new"),
        (Operation.SET_UUID, {}, "needs new"),
        (Operation.MESSAGE, {"sector": 8}, "needs message"),
        (Operation.CREATE, {"targets": [(0, 8, "zero", "")]}, "does not take targets"),
        (Operation.REMOVE, {"message": "hello"}, "does not take message"),
    ],
)
def test_parts_that_belong_to_another_operation(operation, parts, problem):
    """A task without what it needs, or with what it would ignore or do something else with, is refused."""
    with pytest.raises(StateError, match=problem):
        Task(operation, name="dmlib-test-missing", **parts)


def test_version_is_no_device():
    """An operation without a device takes no address, and its result knows none."""
    with pytest.raises(StateError):
        Task(Operation.VERSION, name="a")
    result = Task(Operation.VERSION).run()
    assert result.versions[0][0] == "driver"
    with pytest.raises(StateError):
        _ = result.device


def test_a_task_is_sent_once(linear_device):
    """A task that was sent, or failed, is not sent again."""
    for name in (linear_device.name, "dmlib-test-missing"):
        task = Task(Operation.DEPS, name=name)
        try:
            task.run()
        except DeviceNotFoundError:
            assert name == "dmlib-test-missing"
        assert task.succeeded == (name == linear_device.name)
        with pytest.raises(StateError, match="sent before"):
            task.run()


def test_bad_parts_are_refused_before_the_ioctl(linear_device):
    """A target type that does not fit the ioctl, and a new name that is none, are argument errors."""
    for bad in ("", "a" * 16, "two words", "ä"):
        task = Task(Operation.LOAD, name=linear_device.name, targets=[(0, 8, bad, "")])
        with pytest.raises(ArgumentError):
            task.run()
    with pytest.raises(ArgumentError):
        Task(Operation.RENAME, name=linear_device.name, new="a/b")
    assert not linear_device.info().inactive_table


def test_results_outlive_the_task(unique_name, loop_device):
    """Results are copies: they are right after the task, and a hundred others, are gone."""
    number = loop_device(MiB(1)).number
    parts = [(Sectors(8), Linear(number, Sectors(8 * i))) for i in range(200)]
    device = Device.create(unique_name(), Table.concat(parts))
    task = Task(Operation.TABLE, name=device.name)
    result = task.run()
    del task
    for _ in range(100):
        device.info()
    gc.collect()
    assert result.lines == tuple((8 * i, 8, "linear", f"{number} {8 * i}") for i in range(200))
    assert result.device.target_count == 200


def test_a_table_larger_than_the_buffer(unique_name, loop_device, sh):
    """A table that does not fit libdevmapper's first buffer is loaded and read back whole."""
    number = loop_device(MiB(1)).number
    parts = [(Sectors(8), Linear(number, Sectors(8 * (i % 200)))) for i in range(1000)]
    device = Device.create(unique_name(), Table.concat(parts))
    assert len(device.table()) == len(device.status()) == 1000
    assert device.table() == Table.concat(parts)
    assert sh(f"dmsetup table {device.name}").splitlines() == [str(segment) for segment in device.table()]


def test_a_prepared_task_that_is_not_sent_changes_nothing(unique_name):
    """Preparing and giving up a task sends nothing, and frees what it took."""
    device = Device.create(unique_name(), ZERO)
    for operation in (Operation.REMOVE, Operation.RESUME, Operation.SUSPEND):
        task = Task(operation, name=device.name)
        with Prepared(task) as prepared:
            assert prepared.pointer
            assert not prepared.was_sent
        assert not prepared.pointer
        assert not task.succeeded
    assert not device.info().suspended


def test_statistics_answer(linear_device):
    """The answer of a message comes back as text; a message that has none gives None."""
    first = Task(Operation.MESSAGE, name=linear_device.name, message="@stats_create 0+8 /1 prog aux").run()
    assert first.response == "0"
    answer = Task(Operation.MESSAGE, name=linear_device.name, message="@stats_print 0").run().response
    assert answer.startswith("0+8 ")
    assert Task(Operation.MESSAGE, name=linear_device.name, message="@stats_delete 0").run().response is None
    with pytest.raises(TargetRefusedError):
        Task(Operation.MESSAGE, name=linear_device.name, message="@stats_delete 7").run()


# -- interrupted ioctls


@pytest.fixture
def waiting_suspend(loop_device, unique_name):
    """A device whose flushing suspend waits for a moment, and can be interrupted meanwhile."""
    number = loop_device(MiB(4)).number
    delay = RawTarget("delay", f"{number} 0 0 {number} 0 1500")
    below = Device.create(unique_name("-delay"), Table.single(MiB(4), delay))
    device = Device.create(unique_name(), Table.single(MiB(1), Linear(below.info().number, Sectors(0))))
    writing = threading.Thread(target=unbuffered_write, args=[device.path])
    writing.start()
    rdev = os.stat(device.path).st_rdev
    deadline = time.monotonic() + 2
    while True:
        with open(f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}/inflight", encoding="ascii") as file:
            if int(file.read().split()[1]):
                break
        assert time.monotonic() < deadline
        time.sleep(0.005)
    yield device
    device.resume()
    writing.join()
    device.remove()
    below.remove()


def unbuffered_write(path):
    """One write past the page cache: the suspend waits interruptibly for that, but not for dirty pages."""
    block = mmap.mmap(-1, 4096)
    descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
    try:
        os.pwrite(descriptor, block, 0)
    finally:
        os.close(descriptor)


@pytest.fixture
def alarm():
    """Have a handler called once, 0.2 s from now."""

    def arm(handler):
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)

    before = signal.getsignal(signal.SIGALRM)
    yield arm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_an_interrupted_ioctl_is_sent_again(waiting_suspend, alarm):
    """After a signal whose handler returns, the same ioctl is sent again and does its work."""
    called = []
    alarm(lambda *_: called.append(waiting_suspend.info().suspended))
    task = Task(Operation.SUSPEND, name=waiting_suspend.name)
    result = task.run()
    assert called == [False], "the handler ran while the ioctl waited, and could use dmlib itself"
    assert task.succeeded
    assert result.device.suspended


def test_an_interrupted_ioctl_and_a_handler_that_raises(waiting_suspend, alarm):
    """A handler's exception reaches the caller at once, and the ioctl has not been carried out."""

    def handler(*_):
        raise KeyboardInterrupt

    alarm(handler)
    begin = time.monotonic()
    task = Task(Operation.SUSPEND, name=waiting_suspend.name)
    with pytest.raises(KeyboardInterrupt):
        task.run()
    assert time.monotonic() - begin < 1
    assert not task.succeeded
    assert not waiting_suspend.info().suspended


def test_an_error_of_libdevmapper_has_no_errno():
    """What libdevmapper itself will not do has its own words, and no error number that would read as success."""
    raw = ["dmsetup", "--manglename", "none"]
    subprocess.run([*raw, "create", "raw name", "--table", "0 2048 zero"], check=True)
    try:
        (entry,) = list_devices()
        task = Task(Operation.INFO, number=entry.number)
        with pytest.raises(TaskError) as caught:
            task.run()
    finally:
        subprocess.run([*raw, "remove", "raw name"], check=True)
    assert type(caught.value) is TaskError
    assert caught.value.errno is None
    assert str(caught.value).startswith(f"info {entry.number}: failed in libdevmapper; ")
    assert "raw name" in caught.value.log[0]


def test_a_suspend_whose_answer_cannot_be_read():
    """A device with a uuid that libdevmapper cannot read is not left suspended by a suspend that seemed to fail."""
    raw = ["dmsetup", "--manglename", "none"]
    subprocess.run([*raw, "create", "dmlib-test-raw", "-u", "raw uuid", "--table", "0 2048 zero"], check=True)
    device = Device("dmlib-test-raw")
    try:
        with pytest.raises((TaskError, CleanupError), match="dmlib-test-raw"):
            device.suspend()
        shown = subprocess.run([*raw, "info", device.name], check=True, capture_output=True, text=True).stdout
    finally:
        subprocess.run([*raw, "remove", "dmlib-test-raw"], check=True)
    assert "ACTIVE" in shown
