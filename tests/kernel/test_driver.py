# SPDX-License-Identifier: MIT
"""The driver as a whole: versions and lists as dmsetup prints them; who may use it, and who inherits it."""

import os
import re
import subprocess
import sys
import textwrap

import pytest

from dmlib import (
    Device,
    ListedDevice,
    MiB,
    Operation,
    Table,
    Task,
    Zero,
    _control,
    driver_version,
    library_version,
    list_devices,
    target_versions,
)

ZERO = Table.single(MiB(1), Zero())


def child(program, *words, **options):
    """Run a Python program that uses dmlib and return its output; it must end well and print no error."""
    command = [sys.executable, "-c", textwrap.dedent(program), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, **options)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_versions(sh):
    """Library and driver report the versions that dmsetup prints."""
    printed = dict(re.findall(r"(\w+) version: +(.*)", sh("dmsetup version")))
    assert library_version() == printed["Library"]
    assert ".".join(map(str, driver_version())) == printed["Driver"]


def test_target_versions(sh, unique_name):
    """The loaded targets are those of dmsetup; one more is there once a table has named it."""
    Device.create(unique_name(), ZERO)
    found = target_versions()
    assert found == {
        name: tuple(map(int, version.split(".")))
        for name, version in re.findall(r"(\S+) +v(\S+)", sh("dmsetup targets"))
    }
    assert found["zero"] >= (1, 1, 0)


def test_no_devices(sh):
    """An empty list is an ordinary result."""
    assert sh("dmsetup ls") == "No devices found\n"
    assert list_devices() == []


def test_list(sh, unique_name, thin):
    """The list has names, numbers, event numbers and uuids, as dmsetup has them."""
    device = Device.create(unique_name(" with blanks"), ZERO, uuid="a uuid")
    bare = Device.create(unique_name(), uuid="")
    printed = sh("dmsetup info -c --noheadings --separator ^ -o name,major,minor,events,uuid")
    expected = set()
    for line in printed.splitlines():
        name, major, minor, events, uuid = line.split("^")
        expected.add(ListedDevice(name, (int(major), int(minor)), int(events), uuid))
    assert set(list_devices()) == expected
    assert {device.name, bare.name, thin.name, thin.pool.name} == {entry.name for entry in list_devices()}
    assert [entry.uuid for entry in list_devices() if entry.name == bare.name] == [""]


def test_event_numbers_move(pool, sh):
    """A device's event number in the list is that of its info, and counts the pool's events."""

    def events():
        return next(entry.event_nr for entry in list_devices() if entry.name == pool.name)

    before = events()
    assert before == pool.device.info().event_nr
    thin = pool.create_thin(0, MiB(80))
    with open(thin.path, "r+b", buffering=0) as file:
        file.seek(MiB(10).bytes)
        file.write(bytes(MiB(1).bytes))
        os.fsync(file.fileno())
        pool.reconfigure(low_water_mark=pool.status().free_data)  # the next block is below it
        file.write(bytes(MiB(1).bytes))
        os.fsync(file.fileno())
    assert events() == pool.device.info().event_nr > before
    assert sh(f"dmsetup info -c --noheadings -o events {pool.name}").strip() == str(events())


def test_a_list_that_outgrows_its_buffer(unique_name, monkeypatch):
    """The buffer grows until the list fits, and stays as large."""
    names = {Device.create(unique_name("-" + "n" * 60)).name for _ in range(40)}
    whole = list_devices()
    monkeypatch.setattr(_control, "_first_buffer", 512)
    assert list_devices() == whole
    assert {entry.name for entry in whole} == names
    assert 4096 <= _control._first_buffer <= 1 << 14


def test_without_permission():
    """Who may not open the driver is told so, each time anew; the refusal is not remembered for who may."""
    program = """
        import os
        from dmlib import Device, DriverUnavailableError, driver_version, library_version, list_devices
        library_version()  # loads what that user might not be able to read
        os.seteuid(65534)
        for verb in (driver_version, list_devices, Device("x").info, Device("x").exists, driver_version):
            try:
                verb()
            except DriverUnavailableError as error:
                print(error.errno, error)
        os.seteuid(0)
        print(driver_version() > (4, 0, 0), Device("x").exists(), list_devices())
    """
    refused = "13 device mapper is not available: /dev/mapper/control may not be opened by this process; root is needed"
    assert child(program).splitlines() == [refused] * 5 + ["True False []"]


def test_for_an_ordinary_user():
    """A process of an ordinary user gets the same error from its first verb and from any later one."""
    program = """
        import os
        from dmlib import Device, DriverUnavailableError, MiB, Table, Zero, library_version, list_devices
        table = Table.single(MiB(1), Zero())
        library_version()  # which the user might not be able to read, but may use
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        for attempt in range(2):
            for verb in (lambda: Device.create("dmlib-test-refused", table), list_devices):
                try:
                    verb()
                except DriverUnavailableError as error:
                    print(os.getuid(), error.errno)
    """
    assert child(program) == "65534 13\n" * 4
    assert list_devices() == []


def test_without_a_control_node():
    """Where the node is missing but the driver is there, root has it made; others are told what to do."""
    program = """
        import os
        from dmlib import DriverUnavailableError, driver_version, library_version, list_devices
        library_version()  # loads what an ordinary user might not be able to read
        number = os.stat("/dev/mapper/control").st_rdev
        os.rename("/dev/mapper/control", "/dev/mapper/away")
        try:
            os.seteuid(65534)
            try:
                driver_version()
            except DriverUnavailableError as error:
                print(error.errno, "modprobe dm-mod" in str(error))
            os.seteuid(0)
            print(driver_version() > (4, 0, 0), list_devices(), os.stat("/dev/mapper/control").st_rdev == number)
        finally:
            os.seteuid(0)
            os.rename("/dev/mapper/away", "/dev/mapper/control")
    """
    assert child(program) == "2 True\nTrue [] True\n"


def test_a_control_node_that_is_none():
    """A control node that leads nowhere, or is no device node at all, is reported as such."""
    program = """
        import os, stat
        from dmlib import DriverUnavailableError, driver_version
        node = "/dev/mapper/control"
        os.rename(node, "/dev/mapper/away")
        try:
            device = lambda: os.mknod(node, 0o600 | stat.S_IFCHR, os.makedev(10, 254))
            for make in (device, lambda: open(node, "w").close()):
                make()
                try:
                    driver_version()
                except DriverUnavailableError as error:
                    print(error)
                os.unlink(node)
        finally:
            os.rename("/dev/mapper/away", node)
        print(driver_version() > (4, 0, 0))
    """
    nowhere, plain, after = child(program).splitlines()
    assert "/dev/mapper/control cannot be opened: the kernel has no device-mapper driver" in nowhere
    assert "/dev/mapper/control is not a device node" in plain
    assert after == "True"


@pytest.mark.parametrize("close_fds", [True, False])
def test_the_control_descriptor_is_not_inherited(close_fds):
    """No program that is started afterwards has the control node or the kernel's log open, however it is started."""
    with pytest.raises(OSError, match="message"):
        Task(Operation.MESSAGE, name="dmlib-test-missing", message="x").run()
    Device("dmlib-test-missing").exists()
    program = "import os; print([os.path.realpath(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')])"
    here = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    assert {"/dev/mapper/control", "/dev/kmsg"} <= here
    there = child(program, close_fds=close_fds)
    assert "/dev/null" in there or "pipe:" in there
    assert "/dev/mapper/control" not in there
    assert "/dev/kmsg" not in there


def test_the_driver_is_opened_by_the_first_verb():
    """Importing dmlib and naming devices opens nothing."""
    program = """
        import os
        import dmlib
        from dmlib import Device, Linear, ThinPool, Task, Operation
        def control():
            opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
            return "/dev/mapper/control" in opened
        Device("x"), Task(Operation.INFO, name="x")
        print(control())
        print(Device("x").exists(), control())
    """
    assert child(program) == "False\nFalse True\n"
