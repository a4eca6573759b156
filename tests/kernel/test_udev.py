# SPDX-License-Identifier: MIT
"""Working together with a real udevd and dmsetup's rules, and without udev."""

import os
import subprocess
from pathlib import Path

import pytest

from dmlib import (
    ArgumentError,
    Device,
    Linear,
    MiB,
    Sectors,
    Table,
    UdevFlags,
    UnsupportedError,
    Zero,
    set_udev,
)
from dmlib.udev import flags_in_database, udev_timeout
from kernel_kit import MAKE_AND_SHOW, child, link, output, semaphores, settle

ZERO = Table.single(MiB(1), Zero())
with_udev = pytest.mark.udev


def properties(device):
    """What udev's database says of a device."""
    printed = subprocess.run(
        ["udevadm", "info", "--query=property", f"--name={device.path}"], capture_output=True, text=True, check=True
    ).stdout
    return dict(line.split("=", 1) for line in printed.splitlines())


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
    device = Device.create(name, uuid="")
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


@with_udev
def test_a_role_is_kept(pool, thin, backing, sh):
    """A pool stays private, and a snapshot behind its origin, through whatever else is done to them."""
    sh(f"mkfs.ext4 -q {thin.path}")
    settle()
    by_uuid = Path(f"/dev/disk/by-uuid/{sh(f'blkid -o value -s UUID {thin.path}').strip()}")
    origin = f"dm-{thin.device.info().number.minor}"
    snap = thin.snapshot(1)
    backing[1].grow(MiB(80))
    pool.grow_data()
    snap.resize(MiB(40))
    snap.snapshot(2, activate=False)
    with snap.device.suspended():
        assert snap.device.info().suspended
    renamed = snap.device.rename(f"{snap.name}-b")
    assert flags_in_database(renamed.info().number) == UdevFlags.SNAPSHOT
    assert flags_in_database(pool.number) == UdevFlags.PRIVATE
    assert flags_in_database(thin.device.info().number) == UdevFlags.NONE
    assert properties(renamed)["DM_UDEV_LOW_PRIORITY_FLAG"] == "1"
    assert "ID_FS_TYPE" not in properties(pool.device)
    assert by_uuid.resolve().name == origin
    renamed.suspend()
    renamed.resume(udev=UdevFlags.NONE)
    assert flags_in_database(renamed.info().number) == UdevFlags.NONE
    renamed.remove()


@with_udev
def test_flags_of_a_subsystem(unique_name):
    """Each flag arrives in udev's database, those of the device's own program among them."""
    flags = UdevFlags.SUBSYSTEM_0 | UdevFlags.SUBSYSTEM_5 | UdevFlags.DISABLE_OTHER_RULES
    device = Device.create(unique_name(), ZERO, udev=flags)
    assert flags_in_database(device.info().number) == flags
    assert properties(device)["DM_SUBSYSTEM_UDEV_FLAG5"] == "1"
    device.reload(ZERO)
    assert flags_in_database(device.info().number) == flags
    device.remove()


# -- without udev


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
