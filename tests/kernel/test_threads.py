# SPDX-License-Identifier: MIT
"""Many threads that do everything at once, for a while: no error, no deadlock, no crash, and everybody gets on."""

import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dmlib import Device, DeviceNotFoundError, Linear, MiB, Sectors, Table, Zero, list_devices

pytestmark = [pytest.mark.concurrency, pytest.mark.once]

ZERO = Table.single(MiB(1), Zero())
THREADS_EACH = 4


class Crowd:
    """Jobs that repeat until the time is over, in many threads; each counts its rounds."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds
        self.rounds = {}
        self.stop = threading.Event()

    def _repeat(self, job, name):
        while time.monotonic() < self.end and not self.stop.is_set():
            try:
                job()
            except BaseException:
                self.stop.set()
                raise
            self.rounds[name] += 1

    def run(self, jobs):
        """Run each job in a thread of its own; raise the first failure."""
        self.rounds = dict.fromkeys(jobs, 0)
        with ThreadPoolExecutor(len(jobs)) as threads:
            done = [threads.submit(self._repeat, job, name) for name, job in jobs.items()]
        for future in done:
            future.result()


@pytest.mark.parametrize(
    "as_long_as", ["a minute", pytest.param("five", marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_32_threads_do_everything_at_once(pool, loop_device, unique_name, as_long_as):
    """
    Eight jobs in four threads each, on devices of their own and on one pool: every one of the 32 threads gets on.

    The jobs ask, list, make and remove, suspend, reload, send messages, rename, and wait for events of what is renamed.
    A minute is one where there is more than one processor, and a few seconds elsewhere.
    """
    seconds = 300 if as_long_as == "five" else 60 if (os.cpu_count() or 1) > 1 else 5
    below = loop_device(MiB(8))
    crowd = Crowd(seconds)
    jobs = {}
    for number in range(THREADS_EACH):
        jobs |= a_thread_of_each(pool, below, unique_name(), number)
    crowd.run(jobs)
    assert len(jobs) == 32
    assert min(crowd.rounds.values()) > 0, crowd.rounds
    assert pool.status().mode.value == "rw"
    for device in list_devices():
        if device.name.startswith("dmlib-test-") and device.name != pool.name:
            assert not Device(device.name).info().suspended
            Device(device.name).remove()


def a_thread_of_each(pool, below, stem, number):
    """Return eight jobs, the devices they need made."""
    held = Device.create(f"{stem}-held", Table.single(MiB(2), Linear(below.number, Sectors(0))))
    swapped = Device.create(f"{stem}-swapped", Table.single(MiB(2), Linear(below.number, Sectors(0))))
    named = [Device.create(f"{stem}-named-0", ZERO)]

    def ask():
        assert pool.status().total_data.count == 1024
        assert swapped.info().live_table
        assert held.table().length == MiB(2)

    def list_all():
        assert {pool.name, held.name, swapped.name} <= {device.name for device in list_devices()}

    def make():
        device = Device.create(f"{stem}-made", ZERO)
        assert os.path.exists(device.path)
        device.remove()

    def suspend():
        with held.suspended():
            assert held.info().suspended

    def reload():
        size = MiB(1) if swapped.table().length == MiB(2) else MiB(2)
        swapped.reload(Table.single(size, Linear(below.number, Sectors(0))))

    def send():
        pool.create_thin(number, MiB(1), activate=False).delete()

    def rename():
        named.append(named[-1].rename(f"{stem}-named-{len(named)}"))

    def wait():
        device = named[-1]
        with contextlib.suppress(DeviceNotFoundError):  # it has its next name already
            device.wait(device.info().event_nr, timeout=1)

    return {(number, job.__name__): job for job in (ask, list_all, make, suspend, reload, send, rename, wait)}
