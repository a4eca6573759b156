# SPDX-License-Identifier: MIT
"""While a device is suspended: every way out of it, on a kernel that really refuses and really waits."""

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import textwrap
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
    StateError,
    SuspendTimeoutError,
    Table,
    TargetRefusedError,
    Task,
    Zero,
)
from dmlib.section import Hold, run_section

ZERO = Table.single(MiB(1), Zero())
DELAY_MS = 1500


def wait_until(true, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)


def section_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dmlib-section")]


def unbuffered_write(path):
    """Start one O_DIRECT write, which the kernel has in flight when this returns, and return its thread."""
    name = os.path.basename(os.path.realpath(path))
    block = mmap.mmap(-1, 4096)
    block.write(b"x" * 4096)

    def write():
        descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
        try:
            os.pwrite(descriptor, block, 0)
        finally:
            os.close(descriptor)

    thread = threading.Thread(target=write)
    thread.start()
    number = os.stat(path).st_rdev
    inflight = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/inflight"

    def in_flight():
        with open(inflight, encoding="ascii") as file:
            return int(file.read().split()[1]) > 0

    wait_until(in_flight)
    assert thread.is_alive(), name
    return thread


@pytest.fixture
def slow(loop_device, unique_name):
    """A linear device over one that delays each write by 1.5 s, so that a flushing suspend has to wait as long."""
    number = loop_device(MiB(4)).number
    target = RawTarget("delay", f"{number} 0 0 {number} 0 {DELAY_MS}")
    below = Device.create(unique_name("-delay"), Table.single(MiB(4), target))
    device = Device.create(unique_name("-slow"), slow_table(below, Sectors(0)))
    yield device, below
    device.remove()
    below.remove()


def slow_table(below, offset):
    return Table.single(MiB(2), Linear(below.info().number, offset))


def undisturbed(device, table):
    """The device serves I/O with *table* and has nothing waiting."""
    info = device.info()
    assert (info.suspended, info.inactive_table) == (False, False)
    assert device.table() == table


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
    data.grow(MiB(32))  # now smaller than the live table, so that the kernel would not take it again
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


# -- suspended(), where Python runs


def test_suspended(linear_device):
    """The device is suspended in the block and resumed after it, also when that fails."""
    with linear_device.suspended() as device:
        assert device.info().suspended
    assert not linear_device.info().suspended
    with pytest.raises(ZeroDivisionError), linear_device.suspended():
        raise ZeroDivisionError
    assert not linear_device.info().suspended


def test_suspended_and_ctrl_c(linear_device):
    """A Ctrl-C in the block, and more of them during the resume, reach the caller with the device resumed."""
    with pytest.raises(KeyboardInterrupt), linear_device.suspended():
        signal.raise_signal(signal.SIGINT)
    assert not linear_device.info().suspended

    for pause in (0, 0.0002, 0.0005, 0.001):

        def storm(pause=pause):
            for _ in range(5):
                time.sleep(pause)
                os.kill(os.getpid(), signal.SIGINT)

        pressing = threading.Thread(target=storm)
        with contextlib.suppress(KeyboardInterrupt):  # as many as were pressed may come
            try:
                with linear_device.suspended():
                    pressing.start()
                    time.sleep(5)
            finally:
                while pressing.is_alive():
                    with contextlib.suppress(KeyboardInterrupt):
                        pressing.join()
        assert not linear_device.info().suspended


def test_suspended_by_another(linear_device):
    """A device that is suspended already is refused and stays as it is."""
    linear_device.suspend()
    with pytest.raises(StateError, match="suspended already"), linear_device.suspended():
        pytest.fail("the block ran")
    assert linear_device.info().suspended
    linear_device.resume()


def test_suspended_when_block_and_resume_fail(pool, too_short):
    """Both errors are there: the resume's is raised, with that of the block as its context."""
    before = pool.device.table()

    def body():
        pool.device.load(too_short)
        raise ZeroDivisionError

    with pytest.raises(TargetRefusedError) as caught, pool.device.suspended(flush=False):
        body()
    assert caught.value.operation == "resume"
    chain, error = [], caught.value
    while error is not None:
        chain.append(type(error))
        error = error.__context__
    assert ZeroDivisionError in chain
    pool.device.load(before)
    pool.device.resume()
    undisturbed(pool.device, before)


# -- a kernel that takes its time


def test_a_suspend_beyond_its_deadline(slow):
    """The caller has its error in time; the new table is gone at once, and the device is resumed by itself."""
    device, below = slow
    before = device.table()
    writing = unbuffered_write(device.path)
    begin = time.monotonic()
    with pytest.raises(SuspendTimeoutError) as caught:
        device.reload(slow_table(below, MiB(1)), timeout=0.2)
    assert time.monotonic() - begin < 0.7
    assert (caught.value.device, caught.value.step) == (device.name, "suspend")
    assert not device.info().inactive_table
    assert section_threads() == [f"dmlib-section-{device.name}"]

    other = Device.create(f"{device.name}-other", ZERO)  # nobody else waits
    other.suspend()
    other.reload(ZERO) if not other.info().suspended else other.resume()
    assert other.status()[0].type_name == "zero"
    other.remove()
    assert writing.is_alive()

    writing.join()
    wait_until(lambda: not section_threads())
    undisturbed(device, before)


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
    wait_until(lambda: not section_threads())
    assert not device.info().suspended
    device.suspend(timeout=5)
    assert device.info().suspended
    device.resume()


def test_others_go_on_while_one_waits(slow, unique_name):
    """A thread that waits in a flushing suspend keeps no other from creating, asking, suspending and resuming."""
    device, _ = slow
    writing = unbuffered_write(device.path)
    waiting = threading.Thread(target=device.suspend)
    waiting.start()
    wait_until(section_threads)
    begin = time.monotonic()
    other = Device.create(unique_name(), ZERO)
    other.suspend()
    other.resume()
    other.reload(ZERO)
    other.status()
    renamed = other.rename(unique_name())
    renamed.remove()
    assert device.info().live_table
    assert waiting.is_alive(), "the suspend was to last longer than all of this"
    assert time.monotonic() - begin < DELAY_MS / 1000
    waiting.join()
    assert device.info().suspended
    device.resume()
    writing.join()


def test_a_full_pool_is_grown_while_a_suspend_waits_for_it(loop_device, unique_name):
    """A suspend that waits for a write that waits for space goes on once another thread has grown the pool."""
    from dmlib import ThinPool  # noqa: PLC0415

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
    wait_until(section_threads)
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


# -- Ctrl-C


def child(program, *words):
    """Start a Python program that uses dmlib; SIGINT does in it what it does in a terminal."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_in_a_suspend_that_waits(slow):
    """A process gets its KeyboardInterrupt at once, ends when the kernel is through, and leaves nothing suspended."""
    device, below = slow
    before = device.table()
    writing = unbuffered_write(device.path)
    program = """
        import sys, threading, time
        from dmlib import Device, DeviceNumber, Linear, MiB, Table
        device, number = Device(sys.argv[1]), DeviceNumber.parse(sys.argv[2])
        table = Table.single(MiB(2), Linear(number, MiB(1)))
        device.info()
        print("ready", flush=True)
        begin = time.monotonic()
        try:
            device.reload(table)
        except KeyboardInterrupt:
            left = device.info().inactive_table
            print("interrupted", left, time.monotonic() - begin < 1.4, flush=True)
            raise
    """
    with child(program, device.name, str(below.info().number)) as process:
        assert process.stdout.readline() == "ready\n"
        wait_until(lambda: device.info().inactive_table)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted False True\n"
        _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT, errors
    assert errors.strip().endswith("KeyboardInterrupt")
    writing.join()
    undisturbed(device, before)


@pytest.mark.parametrize(
    ("verb", "rounds"),
    [("reload", 200), ("snapshot", 40), pytest.param("snapshot", 400, marks=pytest.mark.slow)],
)
def test_a_storm_of_ctrl_c(verb, rounds, thin, linear_device):
    """Signals at any moment of many reloads and snapshots leave nothing suspended and no table waiting."""
    program = """
        import os, random, signal, sys, threading, time
        from dmlib import Device, ThinDevice
        verb, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
        device = Device(name)
        if verb == "reload":
            table = device.table()
        else:
            thin = ThinDevice.open(name)

        def step(number):
            if verb == "reload":
                device.reload(table)
            else:
                thin.snapshot(number, activate=False)

        def handler(number, frame):
            while frame:
                if frame.f_code is step.__code__:
                    raise KeyboardInterrupt
                frame = frame.f_back

        def press():
            for pause in sorted(random.uniform(0, 1.2 * usual) for _ in range(random.choice((1, 1, 3)))):
                time.sleep(pause)
                os.kill(os.getpid(), signal.SIGINT)

        signal.signal(signal.SIGINT, handler)
        begin = time.monotonic()
        for number in range(5):
            step(number + 1)
        usual = (time.monotonic() - begin) / 5
        done = interrupted = 0
        for number in range(5, 5 + rounds):
            pressing = threading.Thread(target=press)
            pressing.start()
            try:
                step(number + 1)
                done += 1
            except KeyboardInterrupt:
                interrupted += 1
            pressing.join()
            info = device.info()
            assert not info.suspended and not info.inactive_table, info
        print(done, interrupted)
    """
    device = linear_device if verb == "reload" else thin.device
    with child(program, verb, device.name, str(rounds)) as process:
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    done, interrupted = map(int, printed.split())
    assert done > rounds / 20, printed
    assert interrupted > rounds / 20, printed
    info = device.info()
    assert (info.suspended, info.inactive_table) == (False, False)
    if verb == "snapshot":  # each that was interrupted took its thin id back
        assert len(thin_ids(thin)) == 1 + 5 + done


def thin_ids(thin):
    """The ids that are in the pool, as its metadata has them."""
    pool = thin.pool.device
    pool.message("reserve_metadata_snap")
    metadata = f"/dev/block/{thin.pool.metadata_device}"
    path = metadata if os.path.exists(metadata) else f"/dev/loop{thin.pool.metadata_device.minor}"
    dump = subprocess.run(["thin_dump", "-m", path], capture_output=True, text=True, check=True).stdout
    pool.message("release_metadata_snap")
    return [line for line in dump.splitlines() if "<device " in line]


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
