# SPDX-License-Identifier: MIT
"""
Where the driver cannot be used, dmlib says so in one class of error, each time, and makes nothing.

On a machine whose driver can be used, the programs run where it cannot: as root in a mount namespace without the
device nodes, otherwise the tests fail and say so.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dmlib
from dmlib import _control
from dmlib.errors import DriverUnavailableError

ROOT = Path(dmlib.__file__).parent.parent

# Nothing is in /dev/mapper, what libdevmapper may put there cannot be opened, and /proc/misc names no driver.
HIDDEN = """
set -e
mkdir -p /dev/mapper
mount -t tmpfs -o nodev none /dev/mapper
mount --bind /dev/null /proc/misc
exec "$@"
"""


def usable():
    try:
        _control.probe()
    except DriverUnavailableError:
        return False
    return True


def without_driver(code):
    """Run a program that cannot use the driver, and return what it printed as JSON."""
    begin = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", begin + code]
    if usable():  # so this is root
        command = ["unshare", "--mount", "sh", "-c", HIDDEN, "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def nodes():
    """What is below /dev/mapper, and whether that is there at all."""
    return sorted(os.listdir("/dev/mapper")) if os.path.exists("/dev/mapper") else None


CALLS = {
    "driver_version": "driver_version()",
    "target_versions": "target_versions()",
    "list_devices": "list_devices()",
    "create": "Device.create('dmlib-test-x', Table.single(MiB(1), Zero()))",
    "create without table": "Device.create('dmlib-test-x')",
    "info": "Device('dmlib-test-x').info()",
    "exists": "Device('dmlib-test-x').exists()",
    "status": "Device('dmlib-test-x').status()",
    "suspend": "Device('dmlib-test-x').suspend()",
    "resume": "Device('dmlib-test-x').resume()",
    "reload": "Device('dmlib-test-x').reload(Table.single(MiB(1), Zero()))",
    "remove": "Device('dmlib-test-x').remove()",
    "rename": "Device('dmlib-test-x').rename('dmlib-test-y')",
    "message": "Device('dmlib-test-x').message('hello')",
    "task": "Task(Operation.INFO, uuid='dmlib-test-x').run()",
    "pool": "ThinPool.open('dmlib-test-x')",
    "thin": "ThinDevice.open('dmlib-test-x')",
    "udev": "set_udev('on')",
}

PROGRAM = """
import json, os, stat
from dmlib import *
def nodes():
    return sorted(os.listdir("/dev/mapper")) if os.path.exists("/dev/mapper") else None
def descriptors():
    return len(os.listdir("/proc/self/fd"))
library_version()
before = nodes(), descriptors()
found = []
for attempt in range(2):
    try:
        CALL
    except DriverUnavailableError as error:
        found.append([str(error), error.errno, isinstance(error, OSError), list(error.log)])
print(json.dumps([found, before == (nodes(), descriptors())]))
"""


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_entrance_says_that_there_is_no_driver(call):
    """
    Without a driver each verb raises DriverUnavailableError with what to do, also the second time in a process.

    Nothing is made for it below /dev, and no descriptor stays open.
    """
    before = nodes()
    found, same = without_driver(PROGRAM.replace("CALL", call))
    assert len(found) == 2
    for text, errno, is_oserror, log in found:
        assert text.startswith("device mapper is not available: ")
        assert "/dev/mapper/control" in text
        assert "modprobe dm-mod" in text or "root is needed" in text or "no device-mapper driver" in text
        assert "\n" not in text
        assert errno is not None
        assert is_oserror
        assert log == []
    assert same
    assert nodes() == before


def test_what_needs_no_driver_works_without():
    """Sizes, tables, status lines and the library's own version can be had without a driver."""
    code = """
import json
from dmlib import KiB, MiB, Linear, Table, library_version, set_udev
from dmlib.targets import parse_status
set_udev("off")
set_udev("auto", timeout=5)
table = Table.parse("0 8 zero")
print(json.dumps([str(table), MiB(1).bytes, parse_status("thin-pool", "Fail").raw, library_version()]))
"""
    table, size, status, version = without_driver(code)
    assert (table, size, status) == ("0 8 zero", 1 << 20, "Fail")
    assert version.startswith("1.02.")
