# SPDX-License-Identifier: MIT
"""
Working together with a real udevd and dmsetup's rules, also when it is stopped, dead or out of reach.

Tests that take udevd away put it back, and let it finish.
"""

import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dmlib import (
    ArgumentError,
    Device,
    DeviceNumber,
    Linear,
    MiB,
    Sectors,
    Table,
    TaskError,
    UdevFlags,
    UdevTimeoutError,
    UnsupportedError,
    Zero,
    set_udev,
)
from dmlib.udev import udev_timeout

ZERO = Table.single(MiB(1), Zero())
UDEVD = shutil.which("systemd-udevd", path="/usr/lib/systemd:/lib/systemd")
with_udev = pytest.mark.udev


def semaphores():
    return Path("/proc/sysvipc/sem").read_text(encoding="ascii").splitlines()[1:]


def settle():
    subprocess.run(["udevadm", "settle", "--timeout=60"], check=True)


def udevd_pids():
    found = subprocess.run(["pidof", "systemd-udevd"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def properties(device):
    """What udev's database says of a device."""
    printed = subprocess.run(
        ["udevadm", "info", "--query=property", f"--name={device.path}"], capture_output=True, text=True, check=True
    ).stdout
    return dict(line.split("=", 1) for line in printed.splitlines())


def link(name):
    """Where udev's link points; the node itself would be a block device."""
    return os.readlink(f"/dev/mapper/{name}")


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


def child(code, *words, env=None, under=()):
    """Start a Python program that uses dmlib."""
    return subprocess.Popen(
        [*under, sys.executable, "-c", code, *words],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


# -- udev answers


@with_udev
def test_node_and_database_are_ready_when_a_verb_returns(unique_name):
    """After create, rename and remove, udev's link and database are as they must be at once, and no cookie is left."""
    name, other = unique_name(), unique_name("-renamed")
    before = semaphores()
    device = Device.create(name, ZERO, uuid=f"dmlib-test-{name}")
    number = device.info().number
    assert link(name) == f"../dm-{number.minor}"
    known = properties(device)
    assert (known["DM_NAME"], known["DM_UUID"]) == (name, f"dmlib-test-{name}")
    renamed = device.rename(other)
    assert not os.path.lexists(f"/dev/mapper/{name}")
    assert link(other) == f"../dm-{number.minor}"
    assert properties(renamed)["DM_NAME"] == other
    renamed.remove()
    assert not os.path.lexists(f"/dev/mapper/{other}")
    assert semaphores() == before


@with_udev
def test_resume_and_uuid_are_known_to_udev(unique_name):
    """A device made step by step gets its node with the first resume, and a uuid set later is in the database."""
    name = unique_name()
    device = Device.create(name)
    assert not os.path.lexists(device.path)
    device.load(ZERO)
    device.resume()
    assert link(name) == f"../dm-{device.info().number.minor}"
    device.set_uuid(f"dmlib-test-{name}")
    assert properties(device)["DM_UUID"] == f"dmlib-test-{name}"
    device.remove()


@with_udev
@pytest.mark.parametrize(("flags", "probed"), [(UdevFlags.NONE, True), (UdevFlags.PRIVATE, False)])
def test_a_private_device_is_not_probed(loop_device, unique_name, flags, probed, sh):
    """The rules of udev run blkid on a device unless it was asked for privacy."""
    loop = loop_device(MiB(4))
    sh(f"mkfs.ext4 -q {loop.path}")
    device = Device.create(unique_name(), Table.single(MiB(4), Linear(loop.number, Sectors(0))), udev=flags)
    known = properties(device)
    assert known.get("ID_FS_TYPE") == ("ext4" if probed else None)
    assert known.get("DM_UDEV_DISABLE_DISK_RULES_FLAG") == (None if probed else "1")
    assert known["DM_NAME"] == device.name
    device.remove()


@with_udev
def test_a_snapshot_does_not_take_the_links_of_its_origin(thin, sh):
    """The file system's by-uuid link stays on the origin while a snapshot with the same uuid is there."""
    sh(f"mkfs.ext4 -q {thin.path}")
    settle()
    uuid = sh(f"blkid -o value -s UUID {thin.path}").strip()
    by_uuid = Path(f"/dev/disk/by-uuid/{uuid}")
    origin = f"dm-{thin.device.info().number.minor}"
    assert by_uuid.resolve().name == origin
    snap = thin.snapshot(1)
    known = properties(snap.device)
    assert known["ID_FS_UUID"] == uuid
    assert known["DM_UDEV_LOW_PRIORITY_FLAG"] == "1"
    assert by_uuid.resolve().name == origin
    snap.deactivate()
    assert by_uuid.resolve().name == origin


# -- without udev

MAKE_AND_SHOW = """
import os, stat, sys
from dmlib import Device, MiB, Table, Zero, set_udev
exec(sys.argv[2])
device = Device.create(sys.argv[1], Table.single(MiB(1), Zero()))
print(os.stat(device.path).st_rdev == os.makedev(*device.info().number))
other = device.rename(sys.argv[1] + "-renamed")
print(os.path.lexists(device.path), os.stat(other.path).st_rdev == os.makedev(*other.info().number))
other.remove()
print(os.path.lexists(other.path))
"""


@pytest.mark.parametrize(
    ("env", "setting"),
    [({"DM_DISABLE_UDEV": "1"}, ""), ({}, "set_udev('off')"), ({"DM_DISABLE_UDEV": "1"}, "set_udev()")],
)
def test_the_library_makes_nodes_where_udev_is_off(unique_name, env, setting):
    """With DM_DISABLE_UDEV=1 or set_udev("off") the node follows the device without udev and without cookies."""
    before = semaphores()
    assert output(child(MAKE_AND_SHOW, unique_name(), setting, env=env)).split() == ["True", "False", "True", "False"]
    assert semaphores() == before


def test_udev_cannot_be_insisted_on_where_it_is_not():
    """set_udev("on") is refused where libdevmapper sees no udev, and says so."""
    code = "from dmlib import set_udev\ntry: set_udev('on')\nexcept Exception as e: print(type(e).__name__, e, sep='|')"
    kind, text = output(child(code, env={"DM_DISABLE_UDEV": "1"})).strip().split("|")
    assert kind == UnsupportedError.__name__
    assert "running udev" in text


@with_udev
def test_udev_can_be_insisted_on():
    """set_udev("on") is accepted where udev runs."""
    set_udev("on")
    assert udev_timeout() == 30


@pytest.mark.parametrize(
    ("mode", "timeout", "field"),
    [
        ("yes", 30, "mode"),
        ("", 30, "mode"),
        (None, 30, "mode"),
        (True, 30, "mode"),
        ("auto", 0, "timeout"),
        ("auto", -1, "timeout"),
        ("auto", float("nan"), "timeout"),
    ],
)
def test_bad_settings_change_nothing(mode, timeout, field):
    """A word or a timeout that makes no sense is refused by name, and the old setting stays."""
    with pytest.raises(ArgumentError) as caught:
        set_udev(mode, timeout=timeout)
    assert caught.value.field == field
    assert udev_timeout() == 30


# -- udev does not answer


def lifecycle(name):
    """Run every verb that waits for udev, check its result right after, and yield how long each took."""
    device, renamed = Device(name), Device(f"{name}-renamed")

    def timed(verb, *words):
        begin = time.monotonic()
        verb(*words)
        return time.monotonic() - begin

    yield timed(Device.create, name, ZERO)
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
