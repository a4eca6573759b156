# SPDX-License-Identifier: MIT
"""
One thin id, one device: the kernel would map an id twice, and dmlib does not.

Others are here dmlib itself under another name, another process with dmlib, and dmsetup.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from dmlib import Device, DeviceBusyError, DeviceExistsError, MiB, Sectors, StateError, ThinDevice, ThinPool
from dmlib.task import Task

pytestmark = pytest.mark.once


@pytest.fixture
def dmsetup_thin(pool, unique_name, sh):
    """Make a device over a thin id with dmsetup; ``live=False`` leaves the table in the inactive slot."""
    made = []

    def make(thin_id, *, live=True):
        name = unique_name()
        table = f"0 8192 thin {pool.device.path} {thin_id}"
        if live:
            sh(f"dmsetup create {name} --table '{table}'")
        else:
            sh(f"dmsetup create {name} --notable")
            sh(f"dmsetup load {name} --table '{table}'")
        made.append(name)
        return name

    yield make
    for name in made:
        sh(f"dmsetup remove {name}", check=False)


@pytest.fixture
def ioctls(monkeypatch):
    """Record each task that is sent, and each listing."""
    sent = []
    run = Task.run

    def recorded(task):
        sent.append(task.operation.value)
        return run(task)

    monkeypatch.setattr(Task, "run", recorded)

    import dmlib._active  # noqa: PLC0415 - what is watched is looked up here

    listing = dmlib._active.list_devices

    def recorded_listing():
        sent.append("list")
        return listing()

    monkeypatch.setattr(dmlib._active, "list_devices", recorded_listing)
    return sent


def test_the_kernel_would(pool, dmsetup_thin):
    """The premise: the kernel maps one id to two devices without a complaint."""
    pool.create_thin(0, MiB(4), activate=False)
    first, second = dmsetup_thin(0), dmsetup_thin(0)
    assert Device(first).table() == Device(second).table()


def test_ours_under_another_name(pool, thin):
    """An id that is active is not activated under a second name; the error says where it is."""
    other = pool.thin(0, MiB(32), name="dmlib-test-other-name")
    with pytest.raises(DeviceExistsError, match=f"as {thin.name}"):
        other.activate()
    assert not other.device.exists()
    assert other.active() == thin.device.info()


def test_ours_under_the_same_name(thin):
    """An id that is active is not activated again under its own name either."""
    with pytest.raises(DeviceExistsError, match=f"thin 0 of {thin.pool.name} \\(as {thin.name}\\)"):
        thin.activate()


def test_name_of_another_device(pool, linear_device):
    """A name that another device has is refused as that."""
    thin = pool.create_thin(0, MiB(4), activate=False)
    with pytest.raises(DeviceExistsError, match=f"create {linear_device.name}"):
        pool.thin(0, MiB(4), name=linear_device.name).activate()
    thin.activate()


def test_another_process(pool):
    """An id that another process activated with dmlib is not activated here, though this pool object is older."""
    pool.create_thin(0, MiB(4), activate=False)
    code = (
        "import sys; from dmlib import MiB, ThinPool\n"
        "ThinPool.open(sys.argv[1]).thin(0, MiB(4), name='dmlib-test-other-process').activate()"
    )
    subprocess.run([sys.executable, "-c", code, pool.name], check=True, timeout=60)
    with pytest.raises(DeviceExistsError, match="as dmlib-test-other-process"):
        pool.thin(0, MiB(4)).activate()
    pool.thin(0, MiB(4), name="dmlib-test-other-process").deactivate()
    thin = pool.thin(0, MiB(4))
    thin.activate()


@pytest.mark.parametrize("live", [True, False], ids=["live", "inactive"])
class TestDmsetup:
    def test_refused(self, pool, dmsetup_thin, live):
        """A device that dmsetup made over the id, with a table live or only loaded, keeps it from being activated."""
        thin = pool.create_thin(0, MiB(4), activate=False)
        other = dmsetup_thin(0, live=live)
        with pytest.raises(DeviceExistsError, match=f"thin 0 of {pool.name} \\(as {other}\\)"):
            thin.activate()
        assert thin.active().name == other
        with pytest.raises(DeviceBusyError, match=other):
            thin.delete()
        Device(other).remove()
        thin.activate()

    def test_beside_ours(self, pool, dmsetup_thin, live):
        """It is found among devices of dmlib's, and does not keep other ids from being activated."""
        ours = [pool.create_thin(i, MiB(4)) for i in (1, 2)]
        thin = pool.create_thin(0, MiB(4), activate=False)
        other = dmsetup_thin(0, live=live)
        pool.create_thin(3, MiB(4), activate=False).activate()
        with pytest.raises(DeviceExistsError, match=other):
            thin.activate()
        ours[0].deactivate()
        with pytest.raises(DeviceExistsError, match=other):
            thin.activate()

    def test_in_place_of_ours(self, pool, dmsetup_thin, live):
        """Neither a count from before nor a device of ours without a table hides it."""
        ours = pool.create_thin(1, MiB(4))
        empty = Device.create("dmlib-test-empty", uuid=pool.uuid_of(2))
        pool.create_thin(0, MiB(4), activate=False)
        Device(ours.name).remove()
        other = dmsetup_thin(0, live=live)
        with pytest.raises(DeviceExistsError, match=other):
            pool.thin(0, MiB(4)).activate()
        empty.remove()


def test_device_of_the_same_id_in_another_pool(thin, loop_device, unique_name, sh):
    """The same id in another pool is another volume."""
    second = ThinPool.create(
        unique_name(), metadata=loop_device(MiB(4)), data=loop_device(MiB(8)), data_block_size="64KiB"
    )
    second.create_thin(0, MiB(4), activate=False)
    other = unique_name()
    sh(f"dmsetup create {other} --table '0 8192 thin {second.device.path} 0'")
    thin.deactivate()
    thin.activate()
    sh(f"dmsetup remove {other}")
    second.deactivate()


def test_cost_of_looking(pool, ioctls):
    """Activation sends create, load and resume, and at most two ioctls more to see who else has the id."""
    thins = [pool.create_thin(i, MiB(4), activate=False) for i in range(4)]
    ioctls.clear()
    counts = []
    for thin in thins:
        thin.activate()
        needed = {"create", "load", "resume"}
        counts.append(len([operation for operation in ioctls if operation not in needed]))
        ioctls.clear()
    assert counts == [1, 2, 2, 2]  # the first finds that nobody has the pool open


def test_cost_of_asking(pool, thin, ioctls):
    """For an active device of dmlib's, one ioctl tells; for an id that nobody has, three."""
    ioctls.clear()
    assert pool.active(0).name == thin.name
    assert ioctls == ["info"]
    ioctls.clear()
    assert pool.active(1) is None
    assert ioctls == ["info", "info", "list"]


def test_working_with_a_foreign_device(pool, dmsetup_thin):
    """A device that dmsetup made is opened, resized, snapshotted and deactivated like one of dmlib's."""
    pool.create_thin(0, MiB(4), activate=False)
    other = dmsetup_thin(0)
    thin = ThinDevice.open(other)
    with pytest.raises(StateError, match=f"is active as {other} and not suspended"):
        pool.create_snap(1, 0)
    thin.resize(MiB(8))
    snap = thin.snapshot(1)
    assert (thin.size, snap.size) == (MiB(8), MiB(8))
    assert Device(other).table().length == MiB(8)
    thin.deactivate()
    assert thin.active() is None


def test_small_snapshot_object(pool, thin, sh):
    """A snapshot is as large as its origin is, not as large as an object says that does not know better."""
    snap = pool.thin(0, Sectors(8), name=thin.name).snapshot(1)
    assert sh(f"blockdev --getsz {snap.path}").strip() == str(MiB(32).count)
