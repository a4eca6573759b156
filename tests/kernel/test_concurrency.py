# SPDX-License-Identifier: MIT
"""
Threads, processes and signal handlers that use dmlib at once.

Rounds are fewer on a single emulated processor, the more so where it runs the rules of udev as well; the full count
is made there too, as a slow test.
"""

import logging
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dmlib import (
    Device,
    DeviceNumber,
    Linear,
    MiB,
    RawTarget,
    Sectors,
    Table,
    ThinPool,
    Zero,
    driver_version,
    list_devices,
)

pytestmark = pytest.mark.concurrency

UDEV = os.path.exists("/run/udev/control") and "DM_DISABLE_UDEV" not in os.environ
CPUS = os.cpu_count() or 1
FULL = CPUS > 1 or not UDEV
ZERO = Table.single(MiB(1), Zero())


class Complaints(logging.Handler):
    """Keeps what libdevmapper says about nodes that it had to see to although udev should have."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.seen = 0
        self.lines = []

    def emit(self, record):
        self.seen += 1
        if "falling back" in record.getMessage().lower():
            self.lines.append(record.getMessage())


@pytest.fixture
def complaints():
    """All lines of libdevmapper, at DEBUG, from all threads."""
    log = logging.getLogger("dmlib.libdm")
    handler, level, propagate = Complaints(), log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    yield handler
    log.removeHandler(handler)
    log.setLevel(level)
    log.propagate = propagate


def at_once(*jobs):
    """Run each job in a thread of its own, all from the same moment on; the first failure is raised."""
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as threads:
        return [future.result() for future in [threads.submit(run, job) for job in jobs]]


def node_is(device):
    return DeviceNumber.from_dev(os.stat(device.path).st_rdev) == device.info().number


@pytest.mark.parametrize("as_many_as", ["are quick here", pytest.param("fifty", marks=pytest.mark.slow)])
def test_many_threads_make_and_remove_devices(unique_name, complaints, as_many_as):
    """
    Sixteen threads (eight with udev) make and remove up to fifty devices each: every node is right at its moment.

    libdevmapper never sees to a node in udev's place, and nothing fails.
    """
    threads = 8 if UDEV else 16
    rounds = 50 if as_many_as == "fifty" or not UDEV else 8 if CPUS > 1 else 2
    stem = unique_name()

    def work(thread):
        for number in range(rounds):
            device = Device.create(f"{stem}-{thread}-{number}", ZERO)
            assert node_is(device)
            device.remove()
            assert not os.path.lexists(device.path)
        return rounds

    done = at_once(*(lambda thread=thread: work(thread) for thread in range(threads)))
    assert done == [rounds] * threads
    assert complaints.seen > threads * rounds
    assert complaints.lines == []
    assert not [device.name for device in list_devices() if device.name.startswith(stem)]


def test_different_verbs_at_once(pool, thin, loop_device, unique_name):  # noqa: C901 - eight small jobs
    """Eight threads ask, make, suspend, reload, send messages and take snapshots on one pool; each succeeds."""
    rounds = 10 if FULL else 3
    loop = loop_device(MiB(4))
    plain = Device.create(unique_name(), Table.single(MiB(2), Linear(loop.number, Sectors(0))))
    stem = unique_name()

    def ask():
        for _ in range(rounds * 5):
            assert pool.status().used_metadata.count > 0
            assert thin.status().mapped == Sectors(0)

    def enumerate_devices():
        for _ in range(rounds * 5):
            assert {pool.name, thin.name} <= {device.name for device in list_devices()}
            assert driver_version()[0] == 4

    def make():
        for number in range(rounds):
            Device.create(f"{stem}-{number}", ZERO).remove()

    def suspend():
        for _ in range(rounds):
            with thin.device.suspended():
                assert thin.device.info().suspended

    def reload():
        for number in range(rounds):
            size = MiB(1 + number % 3)
            plain.reload(Table.single(size, Linear(loop.number, Sectors(0))))
            assert plain.table().length == size

    def send():
        for _ in range(rounds * 3):
            assert plain.message("@stats_list") == ""

    def make_thin():
        for number in range(rounds):
            made = pool.create_thin(1000 + number, MiB(1))
            made.deactivate()
            made.delete()

    def snapshot():
        inactive = pool.create_thin(1, MiB(1), activate=False)
        for number in range(rounds):
            snap = inactive.snapshot(2000 + number)
            assert node_is(snap.device)
            snap.deactivate()
            snap.delete()
        inactive.delete()

    at_once(ask, enumerate_devices, make, suspend, reload, send, make_thin, snapshot)
    assert thin.device.info().suspended is False
    plain.remove()
    thin.deactivate()


def test_a_blocked_suspend_delays_nobody_else(loop_device, unique_name, sh):
    """While a flushing suspend of one device waits for slow I/O, others are made, asked and removed without delay."""
    loop = loop_device(MiB(4))
    # Reads at once, writes after four seconds; and on top a device whose suspend has to wait for them.
    slow = Device.create(
        unique_name(), Table.single(MiB(4), RawTarget("delay", f"{loop.number} 0 0 {loop.number} 0 4000"))
    )
    top = Device.create(unique_name(), Table.single(MiB(4), Linear(slow.info().number, Sectors(0))))
    descriptor = os.open(top.path, os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4096) as page, ThreadPoolExecutor(2) as threads:
            writing = threads.submit(os.pwrite, descriptor, page, 0)
            while not writes_in_flight(top):
                time.sleep(0.01)
            suspending = threads.submit(top.suspend)
            time.sleep(0.1)
            other = Device.create(unique_name(), ZERO)
            for _ in range(50):
                assert other.info().live_table
            with other.suspended():
                assert other.info().suspended
            other.remove()
            assert not suspending.done()
            assert not writing.done()
            suspending.result(10)
            assert writing.result(10) == 4096
    finally:
        os.close(descriptor)
    assert "SUSPENDED" in sh(f"dmsetup info {top.name}")
    top.resume()
    top.remove()
    slow.remove()


def writes_in_flight(device):
    with open(f"/sys/block/dm-{device.info().number.minor}/inflight", encoding="ascii") as file:
        return int(file.read().split()[1])


# -- processes

TWO_PROCESSES = """
import sys, time
from dmlib import Device, DeviceExistsError, MiB, Table, ThinPool, Zero
pool, who, rounds = ThinPool.open(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
for line in sys.stdin:
    verb, number = line.split()
    try:
        if verb == "create":
            for offset in range(rounds):
                pool.create_thin(int(number) + 2 * offset, MiB(1), name=f"{pool.name}-{who}-{offset}")
            for offset in range(rounds):
                thin = pool.thin(int(number) + 2 * offset, MiB(1), name=f"{pool.name}-{who}-{offset}")
                thin.deactivate()
                thin.delete()
        elif verb == "activate":
            pool.thin(int(number), MiB(1), name=f"{pool.name}-{who}").activate()
        elif verb == "fight":
            won = 0
            while won < rounds:
                try:
                    device = Device.create(f"{pool.name}-one-name", Table.single(MiB(1), Zero()))
                except DeviceExistsError:
                    time.sleep(0.003)
                    continue
                won += 1
                device.remove()
        print("done", flush=True)
    except DeviceExistsError as error:
        print("exists", error, flush=True)
"""


@pytest.fixture
def two_processes(pool):
    """Two processes that have the pool open; the function tells each what to do and returns what both answer."""
    rounds = 10 if FULL else 3
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, pool.name, who, str(rounds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for who in ("first", "second")
    ]

    def tell(*lines):
        for process, line in zip(both, lines, strict=True):
            process.stdin.write(line + "\n")
        for process in both:
            process.stdin.flush()
        return [process.stdout.readline().strip() for process in both]

    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    yield tell
    for process in both:
        process.communicate(timeout=30)
        assert process.returncode == 0


def test_two_processes_make_thin_devices_in_one_pool(pool, two_processes):
    """Two processes that make, unmap and delete thin devices of different ids at once do not disturb each other."""
    empty = pool.status().used_metadata
    assert two_processes("create 100", "create 101") == ["done", "done"]
    assert pool.status(flush=True).used_metadata == empty


def test_one_of_two_processes_activates_an_id(pool, two_processes):
    """When two processes activate the same id at once, under different names, exactly one of them does."""
    for thin_id in range(8 if FULL else 3):
        pool.create_thin(thin_id, MiB(1), activate=False)
        answers = two_processes(f"activate {thin_id}", f"activate {thin_id}")
        assert sorted(answer.split()[0] for answer in answers) == ["done", "exists"]
        (refused,) = (answer for answer in answers if answer != "done")
        assert f"thin {thin_id} of {pool.name}" in refused
        winner = pool.active(thin_id)
        Device(winner.name).remove()
        pool.delete(thin_id)


def test_two_processes_fight_for_one_name(two_processes):
    """Two processes that make and remove devices of the same name meet no other error than that it exists."""
    assert two_processes("fight 0", "fight 0") == ["done", "done"]


# -- signals


def test_a_signal_handler_may_use_the_library_inside_of_itself(unique_name):
    """A handler that runs in the middle of a verb makes, asks and removes devices; both finish what they do."""
    stem = unique_name()
    fixed = Device.create(stem, ZERO)
    count, stop, handled = 0, threading.Event(), threading.Event()

    def handler(_number, _frame):
        nonlocal count
        count += 1
        assert fixed.info().live_table
        assert stem in {device.name for device in list_devices()}
        if count % 20 == 0:
            Device.create(f"{stem}-handler-{count}", ZERO).remove()
        handled.set()

    def disturb():
        while not stop.is_set():
            handled.clear()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            handled.wait(10)
            stop.wait(0.01)

    before = signal.signal(signal.SIGUSR1, handler)
    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        for number in range(2 if UDEV else 60):
            device = Device.create(f"{stem}-main-{number}", ZERO)
            assert node_is(device)
            with device.suspended():
                assert device.info().suspended
            device.remove()
    finally:
        stop.set()
        disturber.join()
        signal.signal(signal.SIGUSR1, before)
    assert count >= 20
    fixed.remove()


def test_a_pool_is_opened_and_asked_by_many_threads(pool):
    """Objects of one pool in many threads tell the same; nothing is shared that would need care."""
    answers = at_once(*(lambda: ThinPool.open(pool.name).status() for _ in range(8)))
    assert len(set(answers)) == 1
