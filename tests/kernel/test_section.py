# SPDX-License-Identifier: MIT
"""While a device is suspended: every way out of it, on a kernel that really refuses and really waits."""

import os
import threading
import time

import pytest

from dmlib import (
    CleanupError,
    Device,
    DeviceExistsError,
    KiB,
    Linear,
    MiB,
    Operation,
    RawTarget,
    Sectors,
    SuspendTimeoutError,
    Table,
    TargetRefusedError,
    Task,
    ThinPool,
    Zero,
    section,
)
from dmlib.section import Hold, run_section
from kernel_kit import slow_table, unbuffered_write, undisturbed, wait_until

pytestmark = pytest.mark.once

ZERO = Table.single(MiB(1), Zero())


def sections():
    """The devices of the sections that run in this process, given up or not."""
    return [hold.suspend.name for worker in tuple(section._running) for hold in worker._holds]


# -- a refusal on the way


def test_a_table_that_no_target_takes(linear_device):
    """A table that is refused while it is loaded changes nothing: old table live, none inactive, not suspended."""
    before = linear_device.table()
    number = linear_device.deps()[0]
    for target, reason in (
        (RawTarget("striped", f"2 3 {number} 0 {number} 0"), "Target length not divisible by chunk size"),
        (RawTarget("linear", f"{number}"), "Invalid argument count"),
        (RawTarget("no-such-target"), "unknown target type"),
    ):
        with pytest.raises(TargetRefusedError) as caught:
            linear_device.reload(Table.single(MiB(2), target))
        assert caught.value.operation == "load"
        assert reason in str(caught.value)
        undisturbed(linear_device, before)


@pytest.fixture
def too_short(pool):
    """A table that the pool's target takes, and refuses when it is to become live."""
    return Table.single(MiB(16), pool.target())


def test_a_table_beyond_the_end_of_its_device(linear_device):
    """The kernel takes a segment that its device is too small for, and refuses it at the resume: old table, live."""
    before = linear_device.table()
    with pytest.raises(TargetRefusedError, match="too small") as caught:
        linear_device.reload(Table.single(MiB(8), Linear(linear_device.deps()[0], Sectors(0))))
    assert caught.value.operation == "resume"
    undisturbed(linear_device, before)


def test_a_table_that_is_refused_at_the_resume(pool, thin, too_short):
    """When the kernel will not resume with the new table, the old one is put back and serves I/O."""
    before = pool.device.table()
    with pytest.raises(TargetRefusedError) as caught:
        pool.device.reload(too_short, flush=False)
    assert caught.value.operation == "resume"
    assert any("too small" in line or "smaller" in line for line in caught.value.kernel_log), caught.value.kernel_log
    undisturbed(pool.device, before)
    unbuffered = os.open(thin.path, os.O_WRONLY | os.O_DSYNC)
    try:
        assert os.write(unbuffered, bytes(4096)) == 4096
    finally:
        os.close(unbuffered)


def test_when_the_old_table_cannot_be_put_back(pool, backing, too_short, sh):
    """When neither table can be resumed, the error holds both refusals, and the device can be repaired by hand."""
    before = pool.device.table()
    data = backing[1]
    os.truncate(data.file, MiB(32).bytes)
    data.device.refresh_size()  # now smaller than the live table, so that the kernel would not take it again
    with pytest.raises(CleanupError, match="still suspended") as caught:
        pool.device.reload(too_short, flush=False)
    assert [error.operation for error in caught.value.exceptions] == ["resume", "resume"]
    assert {error.device for error in caught.value.exceptions} == {pool.name}
    assert pool.device.info().suspended
    data.grow(MiB(64))
    pool.device.load(before)
    pool.device.resume()
    undisturbed(pool.device, before)
    assert "rw" in sh(f"dmsetup status {pool.name}")


def test_a_refused_message_does_not_keep_the_devices(pool, thin, linear_device):
    """With two devices suspended and a message refused, the rest is not sent and both devices are resumed."""
    messages = [pool.device.message_task(text) for text in ("create_snap 1 0", "create_snap 1 0", "create_snap 2 0")]
    with pytest.raises(TargetRefusedError) as caught:
        run_section([thin.device.hold(), linear_device.hold()], messages, timeout=5)
    assert caught.value.errno == 17
    assert [task.succeeded for task in messages] == [True, False, False]
    assert not thin.device.info().suspended
    assert not linear_device.info().suspended
    pool.delete(1)
    with pytest.raises(TargetRefusedError):
        pool.device.message("delete 2")


def test_a_second_device_that_cannot_be_suspended(linear_device, unique_name):
    """When the second suspend fails, the first device is resumed and no message is sent."""
    missing = Device(unique_name())
    message = linear_device.message_task("hello")
    with pytest.raises(OSError, match=missing.name):
        run_section([linear_device.hold(), missing.hold()], [message], timeout=5)
    assert not linear_device.info().suspended
    assert not message.succeeded


def test_a_snapshot_that_is_refused_resumes_its_origin(thin):
    """A snapshot under a taken id leaves the origin resumed and as writable as before."""
    thin.snapshot(1, activate=False)
    with pytest.raises(DeviceExistsError):
        thin.snapshot(1)
    assert not thin.device.info().suspended
    with open(thin.path, "r+b", buffering=0) as file:
        assert file.write(bytes(4096)) == 4096


def test_a_hold_without_a_way_back(pool, too_short):
    """Without a table to put back, a refused resume is a CleanupError too, and says which device is suspended."""
    before = pool.device.table()
    name = pool.name
    pool.device.load(too_short)
    hold = Hold(suspend=Task(Operation.SUSPEND, name=name, flush=False), resume=Task(Operation.RESUME, name=name))
    with pytest.raises(CleanupError, match=name) as caught:
        run_section([hold], timeout=5)
    assert [type(error) for error in caught.value.exceptions] == [TargetRefusedError]
    pool.device.load(before)
    pool.device.resume()
    undisturbed(pool.device, before)


# -- a kernel that takes its time


def test_a_suspend_beyond_its_deadline(slow):
    """The caller has its error in time; the new table is gone at once, and the device is resumed by itself."""
    device, below = slow
    threads = len(os.listdir("/proc/self/task"))
    before = device.table()
    writing = unbuffered_write(device.path)
    begin = time.monotonic()
    with pytest.raises(SuspendTimeoutError) as caught:
        device.reload(slow_table(below, MiB(1)), timeout=0.2)
    assert time.monotonic() - begin < 0.7
    assert (caught.value.device, caught.value.step) == (device.name, "suspend")
    assert not device.info().inactive_table
    assert sections() == [device.name]

    other = Device.create(f"{device.name}-other", ZERO)  # nobody else waits
    other.remove()
    assert writing.is_alive()

    writing.join()
    wait_until(lambda: not sections())
    undisturbed(device, before)
    wait_until(lambda: len(os.listdir("/proc/self/task")) == threads)


def test_a_reload_after_one_that_was_given_up(slow):
    """A second attempt waits until the first is through; or else its new table would be dropped by it."""
    device, below = slow
    writing = unbuffered_write(device.path)
    with pytest.raises(SuspendTimeoutError):
        device.reload(slow_table(below, MiB(1)), timeout=0.1)
    with pytest.raises(SuspendTimeoutError):
        device.reload(slow_table(below, MiB(1)), timeout=0.1)
    assert not device.info().inactive_table
    device.reload(slow_table(below, MiB(2)), timeout=10)
    undisturbed(device, slow_table(below, MiB(2)))
    writing.join()


def test_a_suspend_that_comes_late_does_not_stay(slow):
    """A plain suspend() that was given up is taken back when the kernel has carried it out."""
    device, _ = slow
    writing = unbuffered_write(device.path)
    with pytest.raises(SuspendTimeoutError):
        device.suspend(timeout=0.1)
    writing.join()
    wait_until(lambda: not sections())
    assert not device.info().suspended
    device.suspend(timeout=5)
    assert device.info().suspended
    device.resume()


@pytest.mark.parametrize("slow", [6000], indirect=True)  # longer than udev takes for all of this on a busy machine
def test_others_go_on_while_one_waits(slow, unique_name):
    """A thread that waits in a flushing suspend keeps no other from creating, asking, suspending and resuming."""
    device, _ = slow
    writing = unbuffered_write(device.path)
    waiting = threading.Thread(target=device.suspend)
    waiting.start()
    wait_until(sections)
    other = Device.create(unique_name(), ZERO)
    other.suspend()
    other.resume()
    other.reload(ZERO)
    other.status()
    renamed = other.rename(unique_name())
    renamed.remove()
    assert device.info().live_table
    assert waiting.is_alive(), "the suspend was to last longer than all of this"
    waiting.join()
    assert device.info().suspended
    device.resume()
    writing.join()


def test_a_full_pool_is_grown_while_a_suspend_waits_for_it(loop_device, unique_name):
    """A suspend that waits for a write that waits for space goes on once another thread has grown the pool."""
    data = loop_device(MiB(1))
    pool = ThinPool.create(unique_name(), metadata=loop_device(MiB(4)), data=data, data_block_size=KiB(64))
    thin = pool.create_thin(0, MiB(4))
    with open(thin.path, "r+b", buffering=0) as file:
        file.seek(MiB(1).bytes)
        file.write(bytes(MiB(1).bytes))
        os.fsync(file.fileno())
    above = Device.create(unique_name("-above"), Table.single(MiB(1), Linear(thin.device.info().number, Sectors(0))))
    writing = unbuffered_write(above.path)
    wait_until(lambda: pool.status().mode.value == "out_of_data_space")
    failed = []

    def reload():
        try:
            above.reload(Table.single(MiB(2), Linear(thin.device.info().number, Sectors(0))), timeout=None)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that asserts
            failed.append(error)

    waiting = threading.Thread(target=reload)
    waiting.start()
    wait_until(sections)
    time.sleep(0.1)
    assert waiting.is_alive()
    data.grow(MiB(2))
    pool.grow_data()
    waiting.join(5)
    writing.join(5)
    assert not waiting.is_alive()
    assert not failed
    assert above.table().length == MiB(2)
    above.remove()
    pool.deactivate()
