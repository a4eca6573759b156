# SPDX-License-Identifier: MIT
"""The life of a mapped device, each verb held against what dmsetup says of it."""

import os
import re
import shlex
import threading
import time

import pytest

from dmlib import (
    ArgumentError,
    Device,
    DeviceBusyError,
    DeviceExistsError,
    DeviceNotFoundError,
    EmptyStatus,
    Error,
    KiB,
    Linear,
    MiB,
    RawStatus,
    RawTarget,
    Sectors,
    StateError,
    Stripe,
    Striped,
    StripedStatus,
    Table,
    TargetRefusedError,
    TaskError,
    Zero,
    list_devices,
)

ZERO = Table.single(MiB(1), Zero())
COLUMNS = "name,uuid,major,minor,attr,open,segments,events"


@pytest.fixture
def columns(sh):
    """What dmsetup info says of a device, in the words of DeviceInfo."""

    def ask(device):
        printed = sh(f"dmsetup info -c --noheadings --separator ^ -o {COLUMNS} {shlex.quote(device.name)}")
        name, uuid, major, minor, attr, opened, segments, events = printed.rstrip("\n").split("^")
        return {
            "name": name,
            "uuid": uuid,
            "number": (int(major), int(minor)),
            "live_table": attr[0] == "L",
            "inactive_table": attr[1] == "I",
            "suspended": attr[2] == "s",
            "readonly": attr[3] == "r",
            "open_count": int(opened),
            "target_count": int(segments),
            "event_nr": int(events),
        }

    return ask


@pytest.fixture
def agreed(columns):
    """The state of a device, after dmsetup was seen to say the same."""

    def ask(device):
        info = device.info()
        seen = columns(device)
        assert {field: getattr(info, field) for field in seen} == seen
        return info

    return ask


def lines(text):
    """What dmsetup prints of a table or status; it may end a line in a space."""
    return [line.rstrip() for line in text.splitlines()]


def test_life(unique_name, loop_device, sh, agreed):
    """Each step of a device's life shows in info and both tables, and dmsetup sees the same."""
    device = Device.create(unique_name(), uuid="")
    assert device.exists()
    info = agreed(device)
    assert (info.live_table, info.inactive_table, info.suspended, info.uuid) == (False, False, False, "")
    assert device.table() is device.table(inactive=True) is None
    assert (device.status(), device.deps(), device.deps(inactive=True)) == ((), (), ())

    loop = loop_device(MiB(2))
    table = Table.single(MiB(2), Linear(loop.number, Sectors(0)))
    device.load(table)
    info = agreed(device)
    assert (info.live_table, info.inactive_table) == (False, True)
    assert str(device.table(inactive=True)) == f"0 4096 linear {loop.number} 0"
    assert lines(sh(f"dmsetup table --inactive {device.name}")) == lines(str(device.table(inactive=True)))
    assert (device.deps(), device.deps(inactive=True)) == ((), (loop.number,))

    device.resume()
    info = agreed(device)
    assert (info.live_table, info.inactive_table, info.target_count) == (True, False, 1)
    assert lines(sh(f"dmsetup table {device.name}")) == lines(str(device.table()))
    assert device.deps() == (loop.number,)
    assert sh(f"blockdev --getsz {device.path}").strip() == "4096"

    device.suspend()
    assert agreed(device).suspended
    device.resume()
    assert not agreed(device).suspended

    device.load(ZERO)
    assert lines(sh(f"dmsetup table --inactive {device.name}")) == ["0 2048 zero"]
    device.clear()
    assert not agreed(device).inactive_table
    device.clear()

    device.reload(ZERO)
    assert str(device.table()) == "0 2048 zero"
    assert device.deps() == ()
    device.remove()
    assert not device.exists()
    assert device.name not in sh("dmsetup ls")
    assert not os.path.exists(device.path)


def test_uuid_and_rename(unique_name, sh, agreed):
    """A uuid can be given once; under another name the device, its uuid and its node are the same."""
    device = Device.create(unique_name(), ZERO, uuid="")
    other = Device.create(unique_name(), ZERO, uuid=f"{device.name}-b")
    with pytest.raises(DeviceExistsError):
        device.set_uuid(f"{device.name}-b")
    device.set_uuid(f"{device.name}-a")
    assert agreed(device).uuid == f"{device.name}-a"
    with pytest.raises(DeviceExistsError):  # as with its own name
        device.set_uuid(f"{device.name}-a")
    with pytest.raises(TaskError) as caught:
        device.set_uuid(f"{device.name}-c")
    assert (type(caught.value), caught.value.errno) == (TaskError, 22)
    assert agreed(device).uuid == f"{device.name}-a"
    number = device.info().number

    with pytest.raises(DeviceExistsError):
        device.rename(other.name)
    with pytest.raises(DeviceExistsError):
        device.rename(device.name)
    renamed = device.rename(unique_name())
    assert not device.exists()
    assert not os.path.exists(device.path)
    assert agreed(renamed).number == number
    assert os.stat(renamed.path).st_rdev == os.makedev(*number)
    assert sh(f"dmsetup info -c --noheadings -o name -u {device.name}-a").strip() == renamed.name


def test_second_create_is_refused(unique_name):
    """A name or uuid that is taken is refused, and the device that has it is not touched."""
    name = unique_name()
    first = Device.create(name, ZERO, uuid=f"{name}-uuid")
    before = first.info()
    with pytest.raises(DeviceExistsError) as caught:
        Device.create(name, Table.single(MiB(2), Error()))
    assert (caught.value.operation, caught.value.device, caught.value.errno) == ("create", name, 16)
    second = unique_name()
    with pytest.raises(DeviceExistsError):
        Device.create(second, ZERO, uuid=f"{name}-uuid")
    assert not Device(second).exists()
    assert first.info() == before
    assert str(first.table()) == "0 2048 zero"


@pytest.mark.parametrize(
    "verb",
    [
        lambda device: device.info(),
        lambda device: device.table(),
        lambda device: device.table(inactive=True),
        lambda device: device.status(),
        lambda device: device.deps(),
        lambda device: device.load(ZERO),
        lambda device: device.resume(),
        lambda device: device.suspend(),
        lambda device: device.reload(ZERO),
        lambda device: device.clear(),
        lambda device: device.message("hello"),
        lambda device: device.rename("dmlib-test-other"),
        lambda device: device.set_uuid("dmlib-test-other"),
        lambda device: device.cancel_deferred_removal(),
        lambda device: device.remove(),
        lambda device: device.remove(deferred=True),
        lambda device: device.suspended().__enter__(),
    ],
)
def test_missing_device(verb, unique_name):
    """Every verb but exists() says that the device is not there, also where libdevmapper calls that success."""
    device = Device(unique_name())
    assert not device.exists()
    with pytest.raises(DeviceNotFoundError) as caught:
        verb(device)
    assert (caught.value.device, caught.value.errno) == (device.name, 6)


def test_readonly(unique_name, loop_device, agreed, sh):
    """A read-only table refuses writes; reload keeps that, or changes it when told."""
    loop = loop_device(MiB(1))
    table = Table.single(MiB(1), Linear(loop.number, Sectors(0)))
    device = Device.create(unique_name(), table, readonly=True)
    assert agreed(device).readonly
    assert sh(f"blockdev --getro {device.path}") == "1\n"
    with open(device.path, "r+b", buffering=0) as file, pytest.raises(PermissionError):
        file.write(b"x" * 512)
    device.reload(table)
    assert agreed(device).readonly
    device.reload(table, readonly=False)
    assert not agreed(device).readonly
    assert sh(f"blockdev --getro {device.path}") == "0\n"
    with open(device.path, "r+b", buffering=0) as file:
        assert file.write(b"x" * 512) == 512


def test_data_reaches_what_is_below(unique_name, loop_device, sh):
    """What is written through linear, striped and concatenated mappings lies where the table says."""
    one, two = loop_device(MiB(4)), loop_device(MiB(4))
    linear = Device.create(unique_name(), Table.single(MiB(1), Linear(one.number, MiB(1))))
    stripes = Striped(chunk_size=KiB(4), stripes=[Stripe(one.number, MiB(2)), Stripe(two.number, MiB(2))])
    striped = Device.create(unique_name(), Table.single(KiB(32), stripes))
    parts = [
        (KiB(4), Linear(two.number, KiB(8))),
        (KiB(4), Linear(one.number, Sectors(0))),
        (KiB(8), Linear(linear.info().number, Sectors(0))),
    ]
    joined = Device.create(unique_name(), Table.concat(parts))

    blocks = [bytes([65 + i]) * 4096 for i in range(8)]
    for device, content in ((striped, blocks), (joined, blocks[:4])):
        with open(device.path, "wb") as file:
            file.write(b"".join(content))
            file.flush()
            os.fsync(file.fileno())
    for device in (joined, striped, linear):
        sh(f"blockdev --flushbufs {device.path}")
    for loop in (one, two):
        sh(f"blockdev --flushbufs {loop.path}")
    first, second = one.file.read_bytes(), two.file.read_bytes()
    assert first[2 << 20 :][:16384] == b"".join(blocks[0::2])
    assert second[2 << 20 :][:16384] == b"".join(blocks[1::2])
    assert second[8192:12288] == blocks[0]
    assert first[:4096] == blocks[1]
    assert first[1 << 20 :][:8192] == blocks[2] + blocks[3]

    for device in (joined, striped, linear):
        assert lines(sh(f"dmsetup table {device.name}")) == lines(str(device.table()))
        assert lines(sh(f"dmsetup status {device.name}")) == [str(segment) for segment in device.status()]
    assert sorted(joined.deps()) == sorted([one.number, two.number, linear.info().number])
    assert joined.info().target_count == len(joined.status()) == 3
    assert isinstance(joined.status()[0].status, EmptyStatus)
    assert isinstance(striped.status()[0].status, StripedStatus)
    joined.remove()


@pytest.mark.parametrize(
    ("type_name", "params", "as_kernel"),
    [("unstriped", "2 128 1 {} 0", "2 128 1 {} 0"), ("switch", "1 2048 0 {} 0", "1 2048 0 {} 0")],
)
def test_raw_target(type_name, params, as_kernel, unique_name, loop_device, sh):
    """A target that dmlib has no class for is created, read back and printed as the kernel has it."""
    loop = loop_device(MiB(1))
    target = RawTarget(type_name, params.replace("{}", str(loop.number)))
    device = Device.create(unique_name(), Table.single(MiB(1), target))
    assert str(device.table()) == f"0 2048 {type_name} {as_kernel.replace('{}', str(loop.number))}"
    assert lines(sh(f"dmsetup table {device.name}")) == lines(str(device.table()))
    assert lines(sh(f"dmsetup status {device.name}")) == [str(segment) for segment in device.status()]
    status = device.status()[0].status
    assert isinstance(status, RawStatus)
    assert (status.type_name, status.problem) == (type_name, None)
    assert device.table() == Table.single(MiB(1), target)
    device.remove()


def test_deferred_removal(linear_device, agreed, sh):
    """An open device goes when its last user closes it; until then it and its node are as before."""
    number = linear_device.info().number
    with open(linear_device.path, "rb") as user:
        linear_device.remove(deferred=True)
        info = agreed(linear_device)
        assert info.deferred_remove
        assert info.live_table
        assert os.stat(linear_device.path).st_rdev == os.makedev(*number)
        assert user.read(512) == bytes(512)
        linear_device.cancel_deferred_removal()
        assert not linear_device.info().deferred_remove
        linear_device.cancel_deferred_removal()
    assert linear_device.exists()

    with open(linear_device.path, "rb"):
        linear_device.remove(deferred=True)
    deadline = time.monotonic() + 2
    while linear_device.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not linear_device.exists()
    with pytest.raises(DeviceNotFoundError):
        linear_device.cancel_deferred_removal()
    sh("dmsetup mknodes")  # nobody tells libdevmapper, so without udev the node would stay


def test_a_stale_node_does_not_stand_in_for_a_new_device(linear_device):
    """What a deferred removal left in /dev/mapper, where no udev cleans up, gives way to the next of that name."""
    with open(linear_device.path, "rb"):
        linear_device.remove(deferred=True)
    other = Device.create(f"{linear_device.name}-other", ZERO)  # takes the number that is free now
    device = Device.create(linear_device.name, ZERO)
    assert os.stat(device.path).st_rdev == os.makedev(*device.info().number)
    with open(device.path, "rb") as file:
        assert file.read(512) == bytes(512)
    other.remove()
    device.remove(deferred=True)  # nobody uses it, so it is gone at once
    assert not device.exists()
    assert not os.path.exists(device.path)


def test_busy(linear_device, agreed):
    """A device in use is not removed: once its time is over, or at once without one; afterwards it is as before."""
    with open(linear_device.path, "rb"):
        before = agreed(linear_device)
        begin = time.monotonic()
        with pytest.raises(DeviceBusyError) as caught:
            linear_device.remove(timeout=0)
        assert time.monotonic() - begin < 1
        begin = time.monotonic()
        with pytest.raises(DeviceBusyError):
            linear_device.remove(timeout=0.5)
        assert 0.1 < time.monotonic() - begin < 2
        assert linear_device.info() == before
    assert (caught.value.operation, caught.value.device, caught.value.errno) == ("remove", linear_device.name, 16)
    assert any(f"pid {os.getpid()}" in user for user in caught.value.users)


def test_remove_waits_for_a_user_that_goes(linear_device):
    """A user who closes the device in time does not stop its removal."""
    user = os.open(linear_device.path, os.O_RDONLY)
    closing = threading.Timer(0.2, os.close, [user])
    closing.start()
    linear_device.remove(timeout=3)
    closing.join()
    assert not linear_device.exists()


def test_message(unique_name):
    """A message without a live table is an error, though the kernel calls it success; a refusal tells why."""
    device = Device.create(unique_name())
    with pytest.raises(StateError, match="no live table"):
        device.message("hello")
    device.load(ZERO)
    with pytest.raises(StateError, match="no live table"):
        device.message("hello")
    device.resume()
    with pytest.raises(TargetRefusedError) as caught:
        device.message("hello")
    assert any("does not support messages" in line for line in caught.value.kernel_log)
    assert "does not support messages" in str(caught.value)
    with pytest.raises(TargetRefusedError):
        device.message("hello", sector=4096)  # beyond its end
    for text in ("", "  ", "a\0b"):
        with pytest.raises(ArgumentError):
            device.message(text)
    assert device.message("@stats_create - /1") == "0"
    assert re.fullmatch(r"0: 0\+2048 2048 .*\n?", device.message("@stats_list"))
    assert device.message("@stats_delete 0") is None


def test_reload_needs_a_live_table_that_is_not_suspended(unique_name):
    """A device that has nothing to replace, or whose suspend is somebody else's, is left as it is."""
    device = Device.create(unique_name())
    with pytest.raises(StateError, match="no live table"):
        device.reload(ZERO)
    assert not device.info().inactive_table
    device.load(ZERO)
    device.resume()
    device.suspend()
    with pytest.raises(StateError, match="is suspended"):
        device.reload(Table.single(MiB(2), Zero()))
    info = device.info()
    assert (info.suspended, info.inactive_table) == (True, False)
    device.resume()


def test_temporary(loop_device):
    """A temporary device has a name and a uuid of its own and is gone after the block, also if that fails."""
    table = Table.single(MiB(1), Linear(loop_device(MiB(1)).number, Sectors(0)))
    with Device.temporary(table) as one, Device.temporary(table) as two:
        assert one.name != two.name
        assert one.info().uuid.startswith("DMLIB-")
        assert {one.name, two.name} <= {device.name for device in list_devices()}
    assert not one.exists()
    assert not two.exists()
    with pytest.raises(ZeroDivisionError), Device.temporary(table) as failing:
        raise ZeroDivisionError
    assert not failing.exists()
    with Device.temporary(table) as removed:
        removed.remove()
