# SPDX-License-Identifier: MIT
"""Devices found by uuid, number, path and file system; and the view through /sys, which needs no root."""

import os
import struct
import subprocess
import sys

import pytest

from dmlib import (
    ArgumentError,
    Device,
    DeviceNotFoundError,
    DeviceNumber,
    Linear,
    LoopDevice,
    MiB,
    Sectors,
    Table,
    UnsupportedError,
    Zero,
    block_device,
    block_devices,
    device_under,
    sysfs,
)
from kernel_kit import tool

pytestmark = pytest.mark.once

ZERO = Table.single(MiB(1), Zero())


@pytest.fixture
def mounted(linear_device, tmp_path):
    """A file system on a linear device, mounted."""
    tool("mkfs.ext4", "-q", linear_device.path)
    place = tmp_path / "mounted here"
    place.mkdir()
    tool("mount", linear_device.path, os.fspath(place))
    yield place
    tool("umount", os.fspath(place))


# -- finding


def test_each_way(unique_name, tmp_path):
    """A device is found by its uuid, its number, its node, the kernel's node and any link to one."""
    device = Device.create(unique_name(" with blanks"), ZERO, uuid="a uuid")
    number = device.info().number
    link = tmp_path / "link"
    link.symlink_to(device.path)
    (tmp_path / "second").symlink_to(link)
    assert Device.from_uuid("a uuid") == device
    assert Device.from_number(number) == device
    for path in (device.path, link, tmp_path / "second", device, os.fsencode(link).decode()):
        assert Device.from_path(path) == device
    assert Device.from_path(link).table() == ZERO
    device.remove()


def test_what_is_not_there(loop_device):
    """A uuid, number or path that leads to no mapped device is an error that names it."""
    loop = loop_device(MiB(1))
    for find, label in (
        (lambda: Device.from_uuid("dmlib-test-none"), "dmlib-test-none"),
        (lambda: Device.from_number(loop.number), str(loop.number)),
        (lambda: Device.from_path(loop.path), str(loop.number)),
    ):
        with pytest.raises(DeviceNotFoundError) as caught:
            find()
        assert caught.value.device == label
    for path in ("/dev/mapper/none", "/tmp", "/dev/null"):  # noqa: S108
        with pytest.raises(ArgumentError) as caught:
            Device.from_path(path)
        assert caught.value.field == "path"


def test_the_device_of_a_file_system(mounted, linear_device):
    """The device under a file, a directory and a mount point is found, also through links."""
    (mounted / "folder").mkdir()
    (mounted / "folder" / "file").write_text("x", encoding="ascii")
    for path in (mounted, mounted / "folder", mounted / "folder" / "file"):
        assert Device.for_filesystem(path) == linear_device
        assert device_under(path) == linear_device.info().number


def test_the_device_of_no_file_system(tmp_path):
    """Where no single block device is below, or nothing is there at all, that is said."""
    for path in ("/proc", "/dev/shm", tmp_path / "none"):  # noqa: S108
        with pytest.raises(ArgumentError) as caught:
            Device.for_filesystem(path)
        assert (caught.value.field, caught.value.value) == ("path", os.fspath(path))


def test_a_file_system_with_numbers_of_its_own(linear_device, tmp_path):
    """A file system whose files have no device number, such as btrfs, is found by what is mounted."""
    tool("mkfs.ext4", "-q", linear_device.path)
    lower, upper, work, place = (tmp_path / name for name in ("lower", "upper", "work", "place"))
    for folder in (lower, upper, work, place):
        folder.mkdir()
    tool("mount", "-t", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", linear_device.path,
         os.fspath(place))  # fmt: skip
    try:
        assert os.major(os.stat(place).st_dev) == 0
        assert Device.for_filesystem(place) == linear_device
    finally:
        tool("umount", os.fspath(place))


# -- the view without root


def test_a_mapped_device_in_sysfs(unique_name, loop_device, sh):
    """Name, uuid, size, state and neighbours are what dmsetup and blockdev say, odd characters and all."""
    loop = loop_device(MiB(4))
    below = Device.create(unique_name(" böse"), Table.single(MiB(4), Linear(loop.number, Sectors(0))), uuid="a uuid")
    above = Device.create(unique_name(), Table.single(MiB(1), Linear(below.info().number, Sectors(0))), readonly=True)
    seen = block_device(below)
    assert (seen.name, seen.uuid, seen.number) == (below.name, "a uuid", below.info().number)
    assert seen.size == Sectors(int(sh(f"blockdev --getsz '{below.path}'")))
    assert (seen.slaves, seen.holders) == ((loop.number,), (above.info().number,))
    assert (seen.kernel_name, seen.kind) == (f"dm-{seen.number.minor}", "dm")
    assert (seen.readonly, seen.suspended, seen.removable, seen.backing_file) == (False, False, False, None)
    assert (block_device(above.path).readonly, block_device(above.path).kind) == (True, "dmlib")
    with above.suspended():
        assert block_device(above.info().number).suspended
    bottom = block_device(loop)
    assert (bottom.backing_file, bottom.kind, bottom.holders) == (os.fspath(loop.file), "loop", (seen.number,))
    assert not bottom.is_mapped
    empty = Device.create(unique_name())
    assert empty.name not in [one.name for one in block_devices()]
    for device in (above, below, empty):
        device.remove()


def test_a_partition_and_a_loop_over_a_device(loop_device, linear_device, sh):
    """A partition stands on its disk, and a loop device over a node on that device."""
    with LoopDevice.temporary(linear_device.path) as over:
        assert block_device(over).slaves == (linear_device.info().number,)
        assert block_device(linear_device).holders == (over.number,)
    loop = loop_device(MiB(4))
    with open(loop.path, "r+b") as file:  # a DOS label with one partition, from sector 2048, 2048 long
        file.write(bytes(446) + struct.pack("<4x B3xII 48x 2s", 0x83, 2048, 2048, b"\x55\xaa"))
    subprocess.run(["partx", "-a", loop.path], check=False, capture_output=True)
    part = next(one for one in block_devices() if one.slaves == (loop.number,))
    assert (part.kind, part.partition, part.size, block_device(loop).holders) == ("part", 1, MiB(1), (part.number,))
    sh(f"partx -d {loop.path}")


def test_an_ordinary_user_sees_the_same(thin):
    """Without root, without control node and without libdevmapper the view is the same as root's."""
    code = """
import os, sys
sys.modules["dmlib._dm"] = None
from dmlib import block_devices
import dmlib.sysfs, dmlib.units, dmlib.ids, dmlib.errors
os.setgid(65534)
os.setuid(65534)
for device in block_devices():
    print(device)
"""
    assert tool(sys.executable, "-c", code) == "\n".join(map(str, block_devices()))
    assert thin.name in [device.name for device in block_devices()]


def test_no_such_device():
    """A number that no device has is an error; so is /sys that is not there, instead of an empty answer."""
    with pytest.raises(DeviceNotFoundError):
        block_device(DeviceNumber(253, 999))
    code = """
from dmlib import UnsupportedError, block_devices
try:
    block_devices()
except UnsupportedError as error:
    print(error.need)
"""
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /sys; exec "$@"', "sh",
         sys.executable, "-c", code], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "sysfs on /sys\n"), done.stderr
    assert UnsupportedError.__name__ in code
    assert sysfs.read("/sys/none") is None
