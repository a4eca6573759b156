# SPDX-License-Identifier: MIT
"""Devices of other programs, told by their uuid, are changed only where the caller says so."""

import subprocess

import pytest

from dmlib import (
    ArgumentError,
    Device,
    ForeignDeviceError,
    KiB,
    Linear,
    MiB,
    Sectors,
    Table,
    ThinDevice,
    ThinPool,
    Zero,
)

pytestmark = pytest.mark.once

ZERO = Table.single(MiB(1), Zero())
OTHERS = "LVM-Yfz3MsxMtCkA9Gl4pDkMp2jxVqUhHr4oLpeQ2vWzjsd4wXR8Q7xXzQyM6v3cGUkq"


@pytest.fixture
def lvms(unique_name, sh):
    """A device that another program made, with LVM's kind of uuid; no LVM is needed to have one."""
    name = unique_name()
    sh(f"dmsetup create {name} --uuid {OTHERS} --table '0 2048 zero'")
    yield Device(name)
    subprocess.run(["dmsetup", "remove", "--retry", name], check=False, capture_output=True)


CHANGES = {
    "remove": Device.remove,
    "rename": lambda device: device.rename(f"{device.name}-x"),
    "set_uuid": lambda device: device.set_uuid("LVM-other"),
    "load": lambda device: device.load(ZERO),
    "clear": Device.clear,
    "resume": Device.resume,
    "suspend": Device.suspend,
    "reload": lambda device: device.reload(ZERO),
    "message": lambda device: device.message("x"),
}


@pytest.mark.parametrize("verb", CHANGES)
def test_a_change_is_refused(lvms, verb, sh):
    """Each verb that changes a device refuses LVM's, says whose it is, and has changed nothing."""
    before = sh("dmsetup info -c --noheadings"), sh(f"dmsetup table {lvms.name}")
    with pytest.raises(ForeignDeviceError) as caught:
        CHANGES[verb](lvms)
    error = caught.value
    assert (error.operation, error.device, error.uuid, error.owner) == (verb, lvms.name, OTHERS, "LVM")
    assert (sh("dmsetup info -c --noheadings"), sh(f"dmsetup table {lvms.name}")) == before


def test_suspended_and_deferred_removal_are_refused(lvms):
    """So do the context manager and what is done by message."""
    with pytest.raises(ForeignDeviceError), lvms.suspended():
        pytest.fail("suspended")
    with pytest.raises(ForeignDeviceError):
        lvms.cancel_deferred_removal()
    assert not lvms.info().suspended


def test_questions_are_answered(lvms, sh):
    """Asking is free, and so are statistics, which are no concern of the device's targets."""
    assert lvms.exists()
    assert lvms.info().uuid == OTHERS
    assert str(lvms.table()) == sh(f"dmsetup table {lvms.name}").strip()
    assert lvms.status()[0].type_name == "zero"
    assert lvms.deps() == ()
    assert lvms.message("@stats_list") == ""


def test_with_consent(lvms, unique_name):
    """With foreign=True everything works, also under the new name."""
    device = Device(lvms.name, foreign=True)
    device.load(Table.single(MiB(2), Zero()))
    device.clear()
    device.reload(Table.single(MiB(2), Zero()))
    with device.suspended():
        assert device.info().suspended
    renamed = device.rename(unique_name())
    assert renamed.table().length == MiB(2)
    renamed.remove()
    assert not renamed.exists()


def test_a_device_without_node_is_asked_about(unique_name, sh):
    """A device that has no node yet is known by the driver's answer."""
    name = unique_name()
    sh(f"dmsetup create {name} --uuid {OTHERS} --notable")
    with pytest.raises(ForeignDeviceError):
        Device(name).load(ZERO)
    with pytest.raises(ForeignDeviceError):
        Device(name).remove()
    Device(name, foreign=True).remove()


def test_a_node_that_leads_elsewhere_does_not_decide(lvms, linear_device, sh):
    """It is the driver's name for the device that counts, not what a node of that name happens to be."""
    number = linear_device.info().number
    sh(f"rm {lvms.path}")
    sh(f"mknod {lvms.path} b {number.major} {number.minor}")
    with pytest.raises(ForeignDeviceError):
        lvms.clear()
    linear_device.clear()


@pytest.mark.parametrize("uuid", ["CRYPT-LUKS2-00-root", "mpath-1", "part1-mpath-1", "DMLIB-x", "my-own", ""])
def test_what_we_make_we_may_change(unique_name, uuid):
    """A device goes up and down as a whole whatever uuid it is given; later only those of others take consent."""
    with Device.temporary(ZERO, uuid=uuid) as device:
        assert device.info().uuid == uuid
        foreign = uuid.startswith(("CRYPT", "mpath", "part"))
        if foreign:
            with pytest.raises(ForeignDeviceError):
                device.clear()
        else:
            device.clear()
    assert not device.exists()
    with pytest.raises(ArgumentError):
        Device.create(unique_name(), Table.single(MiB(1), Linear("7:0", Sectors(0))), uuid=uuid + "\0")


def test_all_that_we_make_carries_our_prefix(unique_name, thin, pool):
    """Devices, pools and thin devices say in their uuid that they are dmlib's."""
    made = Device.create(unique_name(), ZERO)
    other = Device.create(unique_name(), ZERO)
    uuids = [device.info().uuid for device in (made, other, pool.device, thin.device)]
    assert all(uuid.startswith("DMLIB-") for uuid in uuids)
    assert len(set(uuids)) == 4
    made.remove()
    other.remove()


def test_a_pool_of_others(loop_device, unique_name, sh):
    """LVM's pool is read freely; messages and snapshots in it take consent, and then work as in any other."""
    name, metadata, data = unique_name(), loop_device(MiB(4)), loop_device(MiB(64))
    table = f"0 131072 thin-pool {metadata.path} {data.path} 128 0"
    sh(f"dmsetup create {name} --uuid {OTHERS}-tpool --table '{table}'")
    pool = ThinPool.open(name)
    assert pool.status().used_data.count == 0
    assert pool.active(0) is None
    for change in (
        lambda: pool.create_thin(0, MiB(4)),
        lambda: pool.delete(0),
        lambda: pool.set_transaction_id(0, 1),
        pool.deactivate,
    ):
        with pytest.raises(ForeignDeviceError):
            change()
    assert pool.status().transaction_id == 0
    pool = ThinPool.open(name, foreign=True)
    thin = pool.create_thin(0, MiB(4))
    snap = ThinDevice.open(thin.name, foreign=True).snapshot(1)
    assert snap.status().mapped == KiB(0)
    snap.deactivate()
    pool.deactivate()
