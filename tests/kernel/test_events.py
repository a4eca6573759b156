# SPDX-License-Identifier: MIT
"""Waiting for events: nothing is missed, sums are exact, and whoever waits can be stopped."""

import asyncio
import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from dmlib import (
    ArgumentError,
    AsyncEventMonitor,
    Device,
    DeviceNotFoundError,
    EventMonitor,
    MiB,
    StateError,
    Table,
    Zero,
    list_devices,
)
from kernel_kit import child, output, tool, wait_until

pytestmark = pytest.mark.once

ZERO = Table.single(MiB(1), Zero())


@pytest.fixture
def monitor():
    with EventMonitor() as made:
        yield made


def kinds(changes):
    return [(change.kind, change.device.name) for change in changes]


def test_the_life_of_a_device(monitor, unique_name):
    """Creation, renaming, a uuid and removal are told with the device as it was and as it is."""
    name, other = unique_name(), unique_name()
    tool("dmsetup", "create", name, "--table", "0 2048 zero")
    (made,) = monitor.poll(5)
    assert (made.kind, made.device.name, made.before) == ("created", name, None)
    assert made.device in list_devices()
    tool("dmsetup", "rename", name, other)
    (renamed,) = monitor.poll(5)
    assert (renamed.kind, renamed.before, renamed.device.name, renamed.events) == ("renamed", made.device, other, 1)
    tool("dmsetup", "rename", other, "--setuuid", "a uuid")
    (changed,) = monitor.poll(5)
    assert (changed.kind, changed.before.uuid, changed.device.uuid, changed.events) == ("changed", "", "a uuid", 1)
    tool("dmsetup", "remove", other)
    (removed,) = monitor.poll(5)
    assert (removed.kind, removed.device, removed.events) == ("removed", changed.device, 0)
    assert monitor.poll(0) == ()
    assert monitor.devices == tuple(list_devices())


def test_what_happened_before_the_wait_is_told(monitor, unique_name):
    """The monitor is armed from its making on: what happens while nobody waits is there at the next look."""
    name = unique_name()
    device = Device.create(name, ZERO)
    assert kinds(monitor.poll(0)) == [("created", name)]
    device.remove()
    assert select.select([monitor], [], [], 0)[0] == [monitor]
    assert kinds(monitor.read()) == [("removed", name)]
    assert select.select([monitor], [], [], 0)[0] == []


def test_what_is_undone_between_two_looks_leaves_no_trace(monitor, unique_name):
    """A device that comes and goes unseen is not told of; one that goes and comes again is another one."""
    name = unique_name()
    Device.create(name, ZERO).remove()
    assert monitor.read() == ()
    device = Device.create(name, ZERO)
    assert kinds(monitor.read()) == [("created", name)]
    device.remove()
    Device.create(name, ZERO)
    assert kinds(monitor.read()) == [("removed", name), ("created", name)]


MANY = """
import sys
from dmlib import *
table = Table.single(MiB(1), Zero())
names, rounds = sys.argv[2:], int(sys.argv[1])
devices = [Device(name) for name in names]
for turn in range(rounds):
    devices = [device.rename(f"{name}-{turn}") for device, name in zip(devices, names)]
print(sum(device.info().event_nr for device in devices))
"""


def test_a_thousand_changes_by_another_process(monitor, unique_name):
    """However they coalesce, the counters' movements of a thousand renames add up, and the last look is the truth."""
    devices = [Device.create(unique_name(), ZERO) for _ in range(4)]
    assert len(monitor.poll(5)) == 4
    process = child(MANY, "250", *(device.name for device in devices))
    total, looks = 0, 0
    while total < 1000:
        changes = monitor.poll(20)
        assert changes, f"{total} of 1000 events after {looks} looks"
        assert {change.kind for change in changes} == {"renamed"}
        total += sum(change.events for change in changes)
        looks += 1
    assert output(process) == "1000\n"
    assert (total, monitor.poll(0.1)) == (1000, ())
    assert [device.name for device in monitor.devices if device.name.endswith("-249")] == [
        f"{device.name}-249" for device in devices
    ]
    for device in devices:
        Device(f"{device.name}-249").remove()


def test_prefixes(unique_name):
    """A monitor with a prefix sees what has it, is woken in vain by the rest, and tells of nothing else."""
    stem = unique_name()
    with (
        EventMonitor(name_prefix=f"{stem} a") as by_name,
        EventMonitor(uuid_prefix=f"{stem} b") as by_uuid,
    ):
        first = Device.create(f"{stem} a 1", ZERO, uuid=f"{stem} b 1")
        second = Device.create(f"{stem} c 2", ZERO, uuid=f"{stem} d 2")
        assert kinds(by_name.poll(1)) == kinds(by_uuid.poll(1)) == [("created", first.name)]
        assert by_name.poll(0.05) == ()
        assert [one.name for one in list_devices(name_prefix=stem)] == [first.name, second.name]
        assert [one.name for one in list_devices(name_prefix=f"{stem} c")] == [second.name]
        assert [one.name for one in list_devices(uuid_prefix=f"{stem} b")] == [first.name]
        assert list_devices(name_prefix=f"{stem} a", uuid_prefix=f"{stem} d") == []
        first.remove()
        second.remove()


def test_a_pool_that_runs_low(pool, thin):
    """The event of a pool that reaches its low-water mark wakes the monitor, and moves the pool's counter."""
    pool.reconfigure(low_water_mark=pool.status().free_data)
    with EventMonitor(name_prefix=pool.name) as monitor:
        with open(thin.path, "r+b", buffering=0) as file:
            file.write(bytes(1 << 20))
            os.fsync(file)
        (change,) = monitor.poll(10)
    assert (change.kind, change.device.name, change.events) == ("changed", pool.name, 1)


def test_what_counts_as_an_event(monitor, unique_name):
    """Suspend, resume, reload and message wake or do not wake, but count no event of the device's own."""
    device = Device.create(unique_name(), ZERO)
    assert monitor.poll(5)
    for verb in (device.suspend, device.resume, lambda: device.reload(ZERO), lambda: device.message("@stats_list")):
        verb()
        assert monitor.read() == ()
    device.remove()


# -- waiting for one device


def test_wait(unique_name):
    """wait() returns the counter once it has moved, at once if it has already, and None when the time is over."""
    device = Device.create(unique_name(), ZERO)
    assert device.info().event_nr == 0
    assert device.wait(7) == 0
    begin = time.monotonic()
    assert device.wait(0, timeout=0.2) is None
    assert 0.2 <= time.monotonic() - begin < 2
    assert device.wait(0, timeout=0) is None
    process = subprocess.Popen(["sh", "-c", f"sleep 0.3; dmsetup rename {device.name} --setuuid late"])
    device.remove()
    device = Device.create(device.name, ZERO, uuid="")
    assert device.wait(0, timeout=20) == 1
    assert process.wait() == 0
    assert device.wait(0) == 1
    device.remove()


@pytest.mark.parametrize("verb", [["remove"], ["rename", "dmlib-test-gone"]])
def test_wait_for_what_goes(unique_name, verb):
    """A device that goes, or gets another name, while it is waited for is an error."""
    device = Device.create(unique_name(), ZERO)
    later = threading.Timer(0.2, tool, ("dmsetup", verb[0], device.name, *verb[1:]))
    later.start()
    with pytest.raises(DeviceNotFoundError):
        device.wait(0, timeout=20)
    later.join()
    with pytest.raises(DeviceNotFoundError):
        device.wait(0, timeout=20)
    if verb[1:]:
        Device(verb[1]).remove()


# -- stopping


def test_closed_by_another_thread(monitor):
    """close() in another thread ends a wait at once, as if its time were over; after it nothing works."""
    closer = threading.Timer(0.2, monitor.close)
    closer.start()
    begin = time.monotonic()
    assert list(monitor) == []
    assert time.monotonic() - begin < 2
    closer.join()
    monitor.close()
    for verb in (monitor.poll, monitor.read, monitor.fileno):
        with pytest.raises(StateError, match="closed"):
            verb()
    assert list(monitor.changes()) == []


def test_one_waits_at_a_time(monitor):
    """A second thread that would wait on the same monitor is refused; the first is not disturbed."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(monitor.poll(20)))
    thread.start()
    wait_until(lambda: monitor._waited_on)
    for verb in (lambda: monitor.poll(0), monitor.read):
        with pytest.raises(StateError, match="waited on"):
            verb()
    assert thread.is_alive()
    monitor.close()
    thread.join(5)
    assert answers == [()]


def test_ctrl_c(unique_name):
    """SIGINT ends a wait, and the program may go on with the same monitor."""
    code = """
import sys
from dmlib import *
with EventMonitor(name_prefix=sys.argv[1]) as monitor:
    print("waiting", flush=True)
    try:
        monitor.poll()
    except KeyboardInterrupt:
        print([change.kind for change in monitor.poll(20)])
"""
    name = unique_name()
    process = child(code, name)
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    device = Device.create(name, ZERO)
    assert output(process) == "['created']\n"
    device.remove()


def test_changes_ends_when_nothing_happens(monitor, unique_name):
    """changes(timeout) yields what there is and ends after a quiet while."""
    device = Device.create(unique_name(), ZERO)
    assert kinds(monitor.changes(timeout=0.1)) == [("created", device.name)]
    device.remove()


def test_fork(monitor, unique_name):
    """A child's looks are its own: neither it nor its parent misses what the other has seen."""
    name = unique_name()
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            before = monitor._listing.descriptor
            mine = monitor.fileno()
            os.write(writer, b"ready")
            status = 0 if kinds(monitor.poll(20)) == [("created", name)] and mine >= 0 and before >= 0 else 2
        finally:
            os._exit(status)
    os.close(writer)
    assert os.read(reader, 5) == b"ready"
    device = Device.create(name, ZERO)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert kinds(monitor.poll(0)) == [("created", name)]
    device.remove()
    os.close(reader)


def test_nothing_stays_open():
    """A monitor takes two descriptors, and gives them back."""
    before = len(os.listdir("/proc/self/fd"))
    with EventMonitor() as monitor:
        assert len(os.listdir("/proc/self/fd")) == before + 2
        assert not os.get_inheritable(monitor.fileno())
    assert len(os.listdir("/proc/self/fd")) == before


# -- asyncio


def test_asyncio(unique_name):
    """In a loop changes come by async for, others run meanwhile, and close() ends the iteration."""
    names = [unique_name() for _ in range(3)]

    async def make():
        for name in names:
            await asyncio.sleep(0.05)
            Device.create(name, ZERO)

    async def watch():
        seen = []
        async with AsyncEventMonitor(name_prefix=names[0][:-1]) as monitor:
            maker = asyncio.create_task(make())
            async for change in monitor:
                seen.append(change.device.name)
                if len(seen) == len(names):
                    asyncio.get_running_loop().call_later(0.1, monitor.close)
            await maker
        assert monitor.closed
        return seen

    assert asyncio.run(asyncio.wait_for(watch(), 20)) == names
    for name in names:
        Device(name).remove()


def test_asyncio_cancelled():
    """A task that is cancelled while it waits leaves the monitor usable."""

    async def watch():
        async with AsyncEventMonitor() as monitor:

            async def first():
                async for change in monitor:
                    pytest.fail(f"{change}")

            with pytest.raises(TimeoutError):
                await asyncio.wait_for(first(), 0.1)
            return monitor.poll(0)

    assert asyncio.run(watch()) == ()


def test_without_the_capability():
    """A process that may not use the driver is told so."""
    code = """
import os
import dmlib.events
from dmlib import DriverUnavailableError, EventMonitor, library_version
library_version()
os.seteuid(65534)
try:
    EventMonitor()
except DriverUnavailableError as error:
    print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "13\n"), done.stderr


@pytest.mark.parametrize(
    ("verb", "error"),
    [
        (lambda device: device.wait("0", timeout=0), TypeError),
        (lambda device: device.wait(True, timeout=0), TypeError),
        (lambda device: device.wait(0, timeout=-1), ArgumentError),
        (lambda device: device.wait(0, timeout=float("nan")), ArgumentError),
        (lambda _: EventMonitor(name_prefix=5), TypeError),
        (lambda _: list_devices(uuid_prefix=b"LVM-"), TypeError),
        (lambda _: Device.from_uuid(None), TypeError),
        (lambda _: Device.from_number("254:0"), TypeError),
        (lambda device: device.set_geometry((1, 2, 3)), TypeError),
        (lambda device: device.set_read_ahead("4TiB"), ArgumentError),
        (lambda _: Device.for_filesystem(3), TypeError),
    ],
)
def test_arguments_of_another_kind(linear_device, verb, error):
    """What makes no sense is refused by name, instead of being taken for something else."""
    with pytest.raises(error, match=r"timeout|event_nr|prefix|uuid|number|geometry|size|path"):
        verb(linear_device)
