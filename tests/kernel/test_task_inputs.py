# SPDX-License-Identifier: MIT
"""Each thing that can be said to a task, seen in what it does; oracles are dmsetup, stat, sysfs and HDIO_GETGEO."""

import fcntl
import logging
import os
import stat
import struct
import subprocess
import sys

import pytest

from dmlib import (
    ArgumentError,
    Device,
    DeviceExistsError,
    DeviceNotFoundError,
    Geometry,
    KiB,
    Linear,
    MiB,
    Operation,
    Sectors,
    StateError,
    Table,
    TargetRefusedError,
    Task,
    UnsupportedError,
    Zero,
    list_devices,
    remove_all,
    target_version,
    target_versions,
)
from kernel_kit import tool, wait_until

pytestmark = pytest.mark.once

ZERO = Table.single(MiB(1), Zero())
HDIO_GETGEO = 0x0301


# -- geometry


def geometry_of(device):
    with open(device.path, "rb") as file:
        answer = fcntl.ioctl(file, HDIO_GETGEO, bytes(16))
    heads, sectors, cylinders, start = struct.unpack("@BBHL", answer)
    return Geometry(cylinders, heads, sectors, Sectors(start))


def test_geometry(unique_name):
    """A geometry is what HDIO_GETGEO answers, with where the device begins; a device without a table has none."""
    device = Device.create(unique_name(), Table.single(MiB(64), Zero()))
    device.set_geometry(Geometry(8, 255, 63))
    assert geometry_of(device) == Geometry(8, 255, 63, Sectors(0))
    device.set_geometry(Geometry(65535, 255, 255, KiB(4)))
    assert geometry_of(device) == Geometry(65535, 255, 255, Sectors(8))
    with pytest.raises(DeviceNotFoundError):
        Device("dmlib-test-missing").set_geometry(Geometry(1, 1, 1))
    device.remove()


@pytest.mark.parametrize(
    ("geometry", "field"),
    [
        (Geometry(65536, 1, 1), "cylinders"),
        (Geometry(-1, 1, 1), "cylinders"),
        (Geometry(1, 256, 1), "heads"),
        (Geometry(1, 1, 256), "sectors"),
        (Geometry(1, 1, True), "sectors"),
        (Geometry(1, 2, 3, Sectors(7)), "start"),
    ],
)
def test_geometry_beyond_its_limits(geometry, field):
    """The driver would cut a number that is too large; here it is refused by name."""
    with pytest.raises(ArgumentError) as caught:
        Device("any").set_geometry(geometry)
    assert caught.value.field == field


# -- nodes and numbers


def test_a_minor_of_ones_choice(unique_name):
    """A device can be made with a number that is to be its own; one that is taken is refused."""
    device = Device.create(unique_name(), ZERO, minor=77)
    assert device.info().number.minor == os.minor(os.stat(device.path).st_rdev) == 77
    with pytest.raises(DeviceExistsError):
        Device.create(unique_name(), ZERO, minor=77)
    device.remove()
    for minor in (-1, 1 << 20, True):
        with pytest.raises(ArgumentError):
            Device.create("any", ZERO, minor=minor)


def test_owner_and_mode_of_a_node(unique_name):
    """A node that libdevmapper makes has the owner, group and permissions that were asked for."""
    name = unique_name()
    Task(Operation.CREATE, name=name, uid=1234, gid=2345, mode=0o640).run()
    Device(name).load(ZERO)
    Task(Operation.RESUME, name=name, uid=1234, gid=2345, mode=0o640).run()
    found = os.stat(Device(name).path)
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 2345, 0o640)
    Device(name).remove()
    for field, value in (("uid", -1), ("gid", 1 << 32), ("mode", 0o1000)):
        with pytest.raises(ArgumentError) as caught:
            Task(Operation.CREATE, name=name, **{field: value})
        assert caught.value.field == field


def test_read_ahead(unique_name):
    """How much the kernel reads ahead can be set and read, and blockdev says the same."""
    device = Device.create(unique_name(), ZERO)
    for size in (KiB(512), Sectors(0), KiB(4)):
        device.set_read_ahead(size)
        assert device.read_ahead() == size
        assert tool("blockdev", "--getra", device.path) == str(size.count)
    with pytest.raises(ArgumentError):
        device.set_read_ahead(Sectors(1))
    device.remove()
    with pytest.raises(DeviceNotFoundError):
        device.set_read_ahead(KiB(4))


# -- the driver as a whole


def test_target_version(sh):
    """The version of a target is what dmsetup says, also of one whose module is not loaded yet."""
    assert target_version("linear") == target_versions()["linear"]
    subprocess.run(["modprobe", "-r", "dm-flakey"], check=False, capture_output=True)
    assert "flakey" not in target_versions()
    version = target_version("flakey")
    assert f"v{'.'.join(map(str, version))}" in sh("dmsetup target-version flakey")
    assert target_versions()["flakey"] == version


def test_a_target_that_the_kernel_does_not_have():
    """What the kernel cannot load is unsupported; what cannot be a name is refused."""
    with pytest.raises(UnsupportedError) as caught:
        target_version("no-such-target")
    assert caught.value.feature == "target no-such-target"
    with pytest.raises(ArgumentError):
        target_version("a name that is too long")


def test_remove_all(unique_name, loop_device):
    """All layers of unused devices go with their nodes; what is open stays, or goes when it is closed."""
    with pytest.raises(StateError):
        remove_all(everybodys=False)
    loop = loop_device(MiB(4))
    below = Device.create(unique_name(" below"), Table.single(MiB(4), Linear(loop.number, Sectors(0))))
    above = Device.create(unique_name("-above"), Table.single(MiB(4), Linear(below.info().number, Sectors(0))))
    foreign = unique_name()
    tool("dmsetup", "create", foreign, "--uuid", "LVM-x", "--table", "0 8 zero")
    opened = Device.create(unique_name(), ZERO)
    descriptor = os.open(opened.path, os.O_RDONLY)
    try:
        assert {device.name for device in remove_all(everybodys=True)} == {below.name, above.name, foreign}
        assert [device.name for device in list_devices()] == [opened.name]
        assert set(os.listdir("/dev/mapper")) == {"control", opened.name}
        assert remove_all(everybodys=True, deferred=True) == []
        assert opened.info().deferred_remove
    finally:
        os.close(descriptor)
    wait_until(lambda: not opened.exists())
    os.unlink(opened.path)  # the kernel removed the device, and without udev nobody the node


# -- questions about the other table


def test_the_inactive_table_in_info(unique_name):
    """Info can be asked about the inactive table: its segments, and whether it is read-only."""
    device = Device.create(unique_name(), ZERO)
    device.load(Table.concat([(MiB(1), Zero()), (MiB(1), Zero())]), readonly=True)
    live = Task(Operation.INFO, name=device.name).run().device
    inactive = Task(Operation.INFO, name=device.name, inactive=True).run().device
    assert (live.target_count, inactive.target_count, inactive.readonly) == (1, 2, True)
    device.remove()


# -- secrets


def test_secrets_are_sent_and_not_kept(unique_name, loop_device, caplog):
    """A table and a message given as bytes arrive, are in no log and no error, and leave no copy behind in C."""
    caplog.set_level(logging.DEBUG)
    loop = loop_device(MiB(4))
    name = unique_name()
    device = Device.create(name)
    params = bytearray(f"{loop.number} 0".encode())
    Task(Operation.LOAD, name=name, targets=[(0, 2048, "linear", params)]).run()
    device.resume()
    assert device.table(secure=True) == Table.single(MiB(1), Linear(loop.number, Sectors(0)))
    params[:] = b"7:0 deadbeef"
    with pytest.raises(TargetRefusedError) as caught:
        Task(Operation.LOAD, name=name, targets=[(0, 2048, "linear", params)]).run()
    errors = [repr(caught.value), str(caught.value), *caught.value.log, *caught.value.kernel_log]
    with pytest.raises(TargetRefusedError) as caught:
        device.message(bytearray(b"key set deadbeef"))
    errors += [repr(caught.value), str(caught.value), *caught.value.log, *caught.value.kernel_log]
    assert not [text for text in errors if "deadbeef" in text]
    assert "deadbeef" not in caplog.text
    device.remove()
    for text in (b"", bytearray(b"a\0b")):
        with pytest.raises(ArgumentError) as caught:
            Device("any", foreign=True).message(text)
        assert "(secret)" in str(caught.value)


COPIES = """
import os, sys
from dmlib import *
from dmlib import _ffi

device = Device.create(sys.argv[1], Table.single(MiB(1), Zero()))
secret = bytearray(40)
with open("/dev/urandom", "rb", buffering=0) as random:
    random.readinto(secret)
for place in range(40):
    secret[place] = 97 + secret[place] % 26
window = bytearray(1 << 20)

def copies():
    count = 0
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for area, rights in [line.split()[:2] for line in maps]:
            begin, end = (int(word, 16) for word in area.split("-"))
            for at in range(begin, end if rights.startswith("rw") else begin, len(window)):
                window[:] = bytes(len(window))
                memory.seek(at)
                try:
                    memory.readinto(memoryview(window)[: min(len(window), end - at)])
                except OSError:
                    break
                count += window.count(secret)
    return count

def send(text):
    try:
        device.message(text)
    except TargetRefusedError:
        return copies()

first = copies(), send(secret)
text = secret.decode()
print(*first, copies(), send(text))
device.remove()
"""


def test_no_copy_of_a_secret_stays(unique_name):
    """After a secret was sent as bytes, the process has it no more often in its memory than before."""
    before, after, as_str, _ = map(int, tool(sys.executable, "-c", COPIES, unique_name()).split())
    assert before >= 1
    assert after == before
    assert as_str > after


# -- measurements


def test_measurement(unique_name):
    """Status can answer with what the kernel measures, as dmsetup does; a kernel without IMA measures nothing."""
    device = Device.create(unique_name(), ZERO)
    text = Task(Operation.STATUS, name=device.name, measurement=True).run().lines[0][3]
    assert tool("dmsetup", "measure", device.name).removeprefix("0 2048 zero").strip() == text.strip()
    device.remove()


# -- what an operation does not take


@pytest.mark.parametrize(
    ("operation", "parts", "problem"),
    [
        (Operation.SUSPEND, {"name": "a", "deferred": True}, "does not take deferred"),
        (Operation.REMOVE, {"name": "a", "flush": False}, "does not take flush"),
        (Operation.INFO, {"name": "a", "minor": 3}, "does not take minor"),
        (Operation.SET_GEOMETRY, {"name": "a"}, "needs geometry"),
        (Operation.TARGET_VERSION, {}, "target type"),
        (Operation.INFO, {"name": "a", "target": "linear"}, "target type"),
        (Operation.TARGET_VERSION, {"target": "linear", "name": "a"}, "one way"),
        (Operation.REMOVE_ALL, {"name": "a"}, "one way"),
    ],
)
def test_what_does_not_belong_together(operation, parts, problem):
    """An input that the operation would ignore is refused, as is one that it lacks."""
    with pytest.raises(StateError, match=problem):
        Task(operation, **parts)
