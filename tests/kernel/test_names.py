# SPDX-License-Identifier: MIT
"""Hostile names: what the kernel can take makes the round trip unchanged, the rest is refused before any ioctl."""

import os
import subprocess

import pytest

from dmlib import ArgumentError, Device, DeviceNumber, MiB, Operation, Table, Task, Zero, list_devices
from dmlib.ids import mangle

ZERO = Table.single(MiB(1), Zero())
ODD = {
    "blank": "two words",
    "blanks": "  on both sides ",
    "utf-8": "größe-日本-💾",
    "percent": "100%s %n",
    "backslash": "a\\b\\\\c",
    "backslash x": "a\\X41",
    "quotes": "'it' \"is\" `so`; rm -rf $HOME & # *?[a]",
    "control": "tab\tline\nbell\x07del\x7fescape\x1b[31m",
    "dots": "...",
    "dash": "-rf",
    "allowed": "#+-.:=@_",
    "127 bytes": "n" * 127,
    "127 bytes as stored": "é" * 15 + "n" * 7,
    "31 blanks": " " * 31,
    "not utf-8": os.fsdecode(b"latin-\xe9"),
    "like an option": "--help",
    "control as a prefix": "control2",
}


def as_dmsetup_says(*columns):
    """Names and uuids as the kernel stores them, read by dmsetup without any unmangling."""
    command = ["dmsetup", "--manglename", "none", "info", "-c", "--noheadings", "-o", ",".join(columns)]
    done = subprocess.run(command, capture_output=True, check=True)
    return os.fsdecode(done.stdout).splitlines()


@pytest.mark.parametrize("name", ODD.values(), ids=ODD)
def test_round_trip(name):
    """A name that the kernel can take comes back the same from info, list, dmsetup, node and a rename."""
    device = Device.create(name, ZERO)
    try:
        info = device.info()
        assert info.name == name
        assert [entry.name for entry in list_devices() if entry.number == info.number] == [name]
        assert mangle(name) in as_dmsetup_says("name")
        assert device.path == f"/dev/mapper/{mangle(name)}"
        assert os.stat(device.path).st_rdev == os.makedev(*info.number)
        shown = subprocess.run(["dmsetup", "table", "--", name], capture_output=True, text=True, check=True)
        assert shown.stdout == "0 2048 zero \n"
        plain = device.rename("dmlib-test-plain")
        assert not os.path.lexists(device.path)
        device = plain.rename(name)
        assert device.name == device.info().name == name
        assert os.stat(device.path).st_rdev == os.makedev(*info.number)
    finally:
        Device(device.name).remove()
    assert not os.path.lexists(device.path)


@pytest.mark.parametrize(
    "uuid", ["u" * 128, "DMLIB with blanks / and % slash", "größe", "../..", "\x07"], ids=lambda uuid: mangle(uuid)[:20]
)
def test_uuid_round_trip(uuid, unique_name):
    """A uuid may be longer than a name and have a slash; it comes back the same, and finds its device."""
    device = Device.create(unique_name(), ZERO, uuid=uuid)
    assert device.info().uuid == uuid
    assert Task(Operation.INFO, uuid=uuid).run().device.name == device.name
    assert [entry.uuid for entry in list_devices() if entry.name == device.name] == [uuid]
    assert as_dmsetup_says("uuid") == [mangle(uuid)]
    late = Device.create(unique_name(), ZERO, uuid="")
    device.remove()
    late.set_uuid(uuid)
    assert late.info().uuid == uuid


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "control", "a/b", "/", "../../etc/passwd", "a\0b", "n" * 128, "é" * 16, " " * 32, "a\\x41b", "\\x"],
)
def test_refused(name, unique_name):
    """A name that cannot be is refused as the name of a device, of a task and of a rename; nothing is made."""
    before = list_devices()
    for refused in (lambda: Device(name), lambda: Device.create(name, ZERO), lambda: Task(Operation.INFO, name=name)):
        with pytest.raises(ArgumentError) as caught:
            refused()
        assert caught.value.field == "name"
    assert list_devices() == before
    device = Device.create(unique_name(), ZERO)
    with pytest.raises(ArgumentError):
        device.rename(name)
    assert device.info().name == device.name


@pytest.mark.parametrize("uuid", ["u" * 129, "é" * 33, "a\0b", "\\x41"])
def test_refused_uuid(uuid, unique_name):
    """A uuid that cannot be is refused before the device is made."""
    name = unique_name()
    with pytest.raises(ArgumentError):
        Device.create(name, ZERO, uuid=uuid)
    assert not Device(name).exists()
    device = Device.create(name, ZERO, uuid="")
    for refused in (uuid, ""):
        with pytest.raises(ArgumentError):
            device.set_uuid(refused)
    assert device.info().uuid == ""


def test_a_raw_name_of_another_program():
    """A name that somebody stored unmangled breaks libdevmapper's list, but not ours; by number it can be asked."""
    raw = ["dmsetup", "--manglename", "none"]
    subprocess.run([*raw, "create", "a b\t%", "--table", "0 2048 zero"], check=True)
    try:
        assert subprocess.run(["dmsetup", "ls"], capture_output=True, check=False).returncode != 0
        (entry,) = [entry for entry in list_devices() if entry.name == "a b\t%"]
        assert as_dmsetup_says("major", "minor") == [f"{entry.number.major}:{entry.number.minor}"]
        assert not Device("a b\t%").exists()  # which would be stored mangled
        ours = Device.create("a b\t%", ZERO)
        assert ours.info().number != entry.number
        assert sorted(e.number for e in list_devices()) == sorted([entry.number, ours.info().number])
        ours.remove()
        assert isinstance(entry.number, DeviceNumber)
    finally:
        subprocess.run([*raw, "remove", "a b\t%"], check=True)
    assert not list_devices()
