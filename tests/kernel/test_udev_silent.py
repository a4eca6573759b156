# SPDX-License-Identifier: MIT
"""
A udevd that is stopped, dead or out of reach: every verb ends in time, with the node right and no cookie left.

Tests that take udevd away put it back, and let it finish.
"""

import logging
import os
import shutil
import signal
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest

from dmlib import (
    Device,
    DeviceNumber,
    MiB,
    Table,
    TaskError,
    UdevTimeoutError,
    Zero,
    set_udev,
)
from kernel_kit import MAKE_AND_SHOW, child, link, output, semaphores, settle

ZERO = Table.single(MiB(1), Zero())
UDEVD = shutil.which("systemd-udevd", path="/usr/lib/systemd:/lib/systemd")
with_udev = pytest.mark.udev


def udevd_pids():
    found = subprocess.run(["pidof", "systemd-udevd"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


@pytest.fixture
def short_wait():
    """Verbs wait half a second for udev."""
    set_udev(timeout=0.5)
    yield
    set_udev()


@pytest.fixture
def udevd_stopped(short_wait):  # noqa: ARG001 - for its effect
    """The real udevd, not scheduled; it goes on afterwards."""
    settle()
    (pid,) = udevd_pids()
    os.kill(pid, signal.SIGSTOP)
    yield
    os.kill(pid, signal.SIGCONT)
    settle()


@pytest.fixture
def udevd_killed(short_wait):  # noqa: ARG001 - for its effect
    """No udevd, though its socket is still there; a new one is started afterwards."""
    settle()
    (pid,) = udevd_pids()
    os.killpg(os.getpgid(pid), signal.SIGKILL)  # with the processes that handle events
    while udevd_pids():
        time.sleep(0.02)
    yield
    subprocess.run([UDEVD, "--daemon"], check=True, stderr=subprocess.DEVNULL)
    subprocess.run(["udevadm", "control", "--ping"], check=True)
    settle()


def lifecycle(name):
    """Run every verb that waits for udev, check its result right after, and yield how long each took."""
    device, renamed = Device(name), Device(f"{name}-renamed")

    def timed(verb, *words):
        begin = time.monotonic()
        verb(*words)
        return time.monotonic() - begin

    yield timed(lambda: Device.create(name, ZERO, uuid=""))
    number = device.info().number
    assert DeviceNumber.from_dev(os.stat(device.path).st_rdev) == number
    yield timed(device.set_uuid, f"dmlib-test-{name}")
    assert device.info().uuid == f"dmlib-test-{name}"
    yield timed(device.rename, renamed.name)
    assert not os.path.lexists(device.path)
    assert DeviceNumber.from_dev(os.stat(renamed.path).st_rdev) == number
    yield timed(renamed.remove)
    assert not renamed.exists()
    assert not os.path.lexists(renamed.path)


@with_udev
@pytest.mark.parametrize("udevd", ["udevd_stopped", pytest.param("udevd_killed", marks=pytest.mark.slow)])
def test_a_silent_udev_holds_nobody_up(unique_name, caplog, udevd, request):
    """With udevd stopped or dead each verb ends at its deadline: node right, warning logged, no semaphore left."""
    request.getfixturevalue(udevd)
    name, before = unique_name(), semaphores()
    with caplog.at_level(logging.WARNING, "dmlib.udev"):
        seconds = list(lifecycle(name))
    assert semaphores() == before
    assert all(0.5 <= took < 1.5 for took in seconds), seconds
    warnings = [record.getMessage() for record in caplog.records if record.name == "dmlib.udev"]
    verbs = [f"resume {name}", f"set_uuid {name}", f"rename {name}", f"remove {name}-renamed"]
    assert [text.split(":")[0] for text in warnings] == verbs
    assert all("cookie 0xd4d" in text and "within 0.5 s" in text for text in warnings)


@with_udev
@pytest.mark.usefixtures("short_wait")
def test_a_link_that_udev_made_goes_with_its_device(unique_name):
    """A device that udev knew is removed together with its link, though udev does not see to it."""
    name, other = unique_name(), unique_name("-other")
    device = Device.create(name, ZERO)
    assert link(name)
    settle()
    (udevd,) = udevd_pids()
    os.kill(udevd, signal.SIGSTOP)
    renamed = device.rename(other)
    assert not os.path.lexists(device.path)
    renamed.remove()
    assert not os.path.lexists(renamed.path)
    os.kill(udevd, signal.SIGCONT)
    settle()


@with_udev
@pytest.mark.usefixtures("udevd_stopped")
def test_a_node_that_cannot_be_made_is_an_error_and_no_device_stays(unique_name):
    """What stands in the place of the node makes create fail with the cookie named; it leaves no device behind."""
    name = unique_name()
    path = Path(f"/dev/mapper/{name}")
    path.mkdir()
    before = semaphores()
    try:
        with pytest.raises(UdevTimeoutError) as caught:
            Device.create(name, ZERO)
        assert not Device(name).exists()
    finally:
        path.rmdir()
    assert caught.value.device == name
    assert caught.value.timeout == 0.5
    assert caught.value.cookie >> 16 == 0xD4D
    assert str(path) in caught.value.problem
    assert semaphores() == before


INTERRUPTED = """
import sys, time
from dmlib import Device, MiB, Table, Zero, set_udev
set_udev(timeout=30)
try:
    Device.create(sys.argv[1], Table.single(MiB(1), Zero()))
except KeyboardInterrupt:
    print("interrupted", Device(sys.argv[1]).exists())
"""


@with_udev
@pytest.mark.usefixtures("udevd_stopped")
def test_ctrl_c_ends_a_wait_for_udev(unique_name):
    """SIGINT during a wait for udev is a KeyboardInterrupt soon after, with the device and its cookies taken back."""
    name = unique_name()
    before = semaphores()
    process = child(INTERRUPTED, name)
    while len(semaphores()) == len(before):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert output(process).split() == ["interrupted", "False"]
    assert time.monotonic() - begin < 2.5
    assert semaphores() == before


@with_udev
def test_a_udev_of_another_ipc_namespace_holds_nobody_up(unique_name):
    """Where udev cannot see our semaphores, verbs end at their deadline and the nodes are right."""
    begin = time.monotonic()
    process = child(MAKE_AND_SHOW, unique_name(), "set_udev(timeout=0.5)", under=["unshare", "-i"])
    assert output(process).split() == ["True", "False", "True", "False"]
    assert 1.5 <= time.monotonic() - begin < 5
    settle()


@with_udev
@pytest.mark.usefixtures("udevd_stopped")
def test_udev_can_be_switched_off_while_somebody_waits(unique_name):
    """set_udev("off") in one thread leaves the wait of another with its deadline, and its cookie is taken down."""
    name = unique_name()
    before = semaphores()
    waiter = threading.Thread(target=Device.create, args=(name, ZERO))
    waiter.start()
    while len(semaphores()) == len(before):
        time.sleep(0.01)
    set_udev("off", timeout=0.5)
    waiter.join(5)
    ended = not waiter.is_alive()
    set_udev(timeout=0.5)
    assert ended
    assert semaphores() == before
    assert stat.S_ISBLK(os.stat(f"/dev/mapper/{name}").st_mode)
    Device(name).remove()


@with_udev
def test_without_semaphores_nothing_is_made(unique_name):
    """Where the kernel has no semaphore left for a cookie, create says so and leaves nothing behind."""
    limits = Path("/proc/sys/kernel/sem")
    name, words = unique_name(), limits.read_text(encoding="ascii").split()
    limits.write_text(" ".join([*words[:3], str(len(semaphores()))]), encoding="ascii")
    try:
        with pytest.raises(TaskError) as caught:
            Device.create(name, ZERO)
    finally:
        limits.write_text(" ".join(words), encoding="ascii")
    assert any("semaphore" in line for line in caught.value.log)
    assert not Device(name).exists()


@with_udev
@pytest.mark.usefixtures("udevd_stopped")
def test_a_pool_works_under_a_silent_udev(pool, thin, backing, sh):
    """With udevd stopped the verbs of a pool end too, with the right result: none waits for what no uevent answers."""
    before = semaphores()
    snap = thin.snapshot(1)
    assert sh(f"blockdev --getsz {snap.path}").strip() == "65536"
    thin.resize(MiB(40))
    assert sh(f"blockdev --getsz {thin.path}").strip() == "81920"
    backing[1].grow(MiB(80))
    pool.grow_data()
    assert pool.status().total_data.count == 1280
    with thin.device.suspended():
        assert thin.device.info().suspended
    snap.deactivate()
    assert not os.path.lexists(snap.path)
    snap.delete()
    thin.deactivate()
    begin = time.monotonic()
    asked = pool.status(), pool.target(), pool.device.deps(), thin.active()
    assert time.monotonic() - begin < 0.5
    assert None not in asked[:3]
    assert asked[3] is None
    assert semaphores() == before


LEAVING = """
import signal, sys, threading
from dmlib import *
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
table = Table.single(MiB(1), Zero())
threading.Timer(0.05, print, ("busy",), {"flush": True}).start()
while True:
    with Device.temporary(table, name=sys.argv[1]) as device:
        device.rename(device.name + "-b").rename(device.name)
"""


@with_udev
@pytest.mark.usefixtures("short_wait")
@pytest.mark.parametrize("turn", range(4))
def test_a_program_that_leaves_at_any_point_leaves_no_cookie(unique_name, turn):
    """sys.exit() from a signal handler, in whatever verb it comes, ends with no semaphore and no device of the name."""
    name, before = unique_name(), semaphores()
    process = child(LEAVING, name)
    assert process.stdout.readline() == "busy\n"
    time.sleep(0.037 * turn)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 3
    settle()
    assert semaphores() == before
    for left in (name, f"{name}-b"):  # renamed at that moment, it is not what temporary() knows
        if Device(left).exists():
            Device(left).remove()
