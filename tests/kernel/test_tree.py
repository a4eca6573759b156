# SPDX-License-Identifier: MIT
"""The tree of devices, held against lsblk; and stacks taken down in order."""

import os

import pytest

from dmlib import (
    ArgumentError,
    Device,
    DeviceBusyError,
    DeviceNotFoundError,
    DeviceNumber,
    DeviceTree,
    ForeignDeviceError,
    Linear,
    LoopDevice,
    MiB,
    Sectors,
    Table,
    Zero,
    block_device,
    list_devices,
    tear_down,
)
from kernel_kit import attached, tool

pytestmark = pytest.mark.once

ZERO = Table.single(MiB(1), Zero())


def linear(below, mib=2):
    return Table.single(MiB(mib), Linear(below, Sectors(0)))


@pytest.fixture
def stack(loop_device, unique_name):
    """A loop device, a device on it, two on that, and one on both of these."""
    loop = loop_device(MiB(8))
    low = Device.create(unique_name("-low"), linear(loop.number, 8))
    left, right = (Device.create(unique_name(side), linear(low.info().number)) for side in ("-left", "-right"))
    both = [(MiB(1), Linear(one.info().number, Sectors(0))) for one in (left, right)]
    top = Device.create(unique_name("-top"), Table.concat(both))
    return loop, low, left, right, top


def names(devices):
    return [device.name for device in devices]


def test_as_lsblk_shows_it(thin, stack, tmp_path, unique_name):
    """The lines are lsblk's, for a pool with thin devices, a mounted file system, swap and a diamond."""
    snap = thin.snapshot(1)
    tool("mkfs.ext4", "-q", thin.path)
    tool("mkswap", snap.path)
    places = [tmp_path / "one", tmp_path / "two"]
    foreign = unique_name()
    tool("dmsetup", "create", foreign, "--readonly", "--uuid", "LVM-x", "--table", "0 3072000 zero")
    for place in places:
        place.mkdir()
        tool("mount", thin.path, os.fspath(place))
    tool("swapon", snap.path)
    try:
        shown = tool("env", "LC_ALL=C.UTF-8", "lsblk").splitlines()
        lines = DeviceTree.read().lines()
        assert [line.split() for line in lines] == [line.split() for line in shown]
        assert lines[0].split() == ["NAME", "MAJ:MIN", "RM", "SIZE", "RO", "TYPE", "MOUNTPOINTS"]
        assert any(line.endswith("[SWAP]") for line in lines)
    finally:
        tool("swapoff", snap.path)
        for place in places:
            tool("umount", os.fspath(place))
        tool("dmsetup", "remove", foreign)
    tear_down(stack[1])


def test_the_graph(stack):
    """What is above and below a device is told both ways."""
    loop, low, left, right, top = stack
    tree = DeviceTree.read()
    assert names(tree.above(tree.devices[loop.number])) == [low.name]
    assert set(names(tree.above(block_device(low)))) == {left.name, right.name}
    assert set(names(tree.below(block_device(top)))) == {left.name, right.name}
    assert loop.number in {device.number for device in tree.roots()}
    ordered = names(tree.users_first([block_device(low)]))
    assert (ordered[0], ordered[-1], len(ordered)) == (top.name, low.name, 4)
    tear_down(low)


# -- taking down


def test_a_stack_goes_users_first(stack):
    """All of a stack goes, the top first, each step told; what it stands on stays."""
    loop, low, _left, _right, top = stack
    told = []
    gone = tear_down(low, on_step=told.append)
    assert told == gone
    assert (gone[0].name, gone[-1].name, len(gone)) == (top.name, low.name, 4)
    assert list_devices() == []
    assert loop.path in attached()


def test_part_of_a_stack(stack):
    """Only what stands on the device that is named goes with it."""
    _loop, low, left, right, top = stack
    assert names(tear_down(left.path)) == [top.name, left.name]
    assert {device.name for device in list_devices()} == {low.name, right.name}
    tear_down(right.info().number, low)


def test_with_loop_devices(stack):
    """Loop devices below go as well if that is asked for, and nothing else stands on them; so do those on top."""
    loop, low, _left, _right, top = stack
    over = LoopDevice.attach(top.path)
    with pytest.raises(DeviceNotFoundError) as caught:
        tear_down(low)
    assert caught.value.device == os.path.basename(over.path)
    assert len(list_devices()) == 4
    gone = names(tear_down(low, detach_loops=True))
    assert gone[0] == os.path.basename(over.path)
    assert gone[-1] == os.path.basename(loop.path)
    assert attached() == {}
    loop.device.exists()


def test_what_is_in_use_stays_as_a_whole(stack, tmp_path):
    """A mount, an open node or swap at the top keeps all of the stack: nothing is removed."""
    _loop, low, left, _right, top = stack
    tool("mkfs.ext4", "-q", top.path)
    tool("mount", top.path, os.fspath(tmp_path))
    with pytest.raises(DeviceBusyError) as caught:
        tear_down(low)
    assert caught.value.users == (f"mounted on {tmp_path}",)
    tool("umount", os.fspath(tmp_path))
    descriptor = os.open(left.path, os.O_RDONLY)
    with pytest.raises(DeviceBusyError) as caught:
        tear_down(low, timeout=0.1)
    assert (caught.value.device, len(caught.value.users)) == (left.name, 1)
    os.close(descriptor)
    assert len(list_devices()) == 4
    assert len(tear_down(low)) == 4


def test_devices_of_others(stack, unique_name):
    """A device of another program on top keeps the stack, unless that is said to go as well."""
    _loop, low, _left, _right, top = stack
    name = unique_name()
    tool("dmsetup", "create", name, "--uuid", "CRYPT-x", "--table", f"0 8 linear {top.info().number} 0")
    with pytest.raises(ForeignDeviceError) as caught:
        tear_down(low)
    assert (caught.value.device, caught.value.owner) == (name, "cryptsetup")
    assert len(list_devices()) == 5
    assert names(tear_down(low, foreign=True))[0] == name


def test_a_pool_with_its_devices(pool, thin):
    """A pool goes after its thin devices; what is in it is there when it is started again."""
    snap = thin.snapshot(1)
    metadata, data = pool.metadata_device, pool.data_device
    assert names(tear_down(pool.device))[-1] == pool.name
    assert list_devices() == []
    again = type(pool).activate(pool.name, metadata=metadata, data=data)
    again.thin(snap.thin_id, snap.size).activate()
    again.deactivate()


def test_what_is_not_there():
    """A number without a device, a path without one and a disk are refused."""
    with pytest.raises(DeviceNotFoundError):
        tear_down(DeviceNumber(253, 999))
    with pytest.raises(ArgumentError):
        tear_down("/dev/none")
    with pytest.raises(TypeError, match="device must be a DeviceNumber, a path"):
        tear_down(None)
    assert tear_down() == []
