# SPDX-License-Identifier: MIT
"""What dmlib holds does not grow with use; and what it says where it may not use the driver, or no longer."""

import json
import os
import subprocess
import sys

import pytest

from dmlib import Device, Linear, MiB, Sectors, Table, Zero

UDEV = os.path.exists("/run/udev/control") and "DM_DISABLE_UDEV" not in os.environ
ZERO = Table.single(MiB(1), Zero())

BEGIN = """
import gc, json, os, sys, tracemalloc
from dmlib import *
from dmlib import _kmsg
name = sys.argv[1]
ZERO = Table.single(MiB(1), Zero())
REFUSED = Table.single(MiB(1), RawTarget("linear", "7:0 x"))
device = Device(name)

def resident():
    # KiB of memory in use.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

def held():
    with open("/proc/sysvipc/sem") as semaphores:
        return len(os.listdir("/proc/self/fd")), len(semaphores.readlines()), len(list_devices())
"""


def program(code, *words, **keywords):
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        **keywords,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture
def busy_device(loop_device, unique_name):
    """A device of eight segments with an inactive table."""
    loop = loop_device(MiB(8))
    parts = [(MiB(1), Linear(loop.number, MiB(number))) for number in range(8)]
    device = Device.create(unique_name(), Table.concat(parts), uuid="dmlib-test-busy")
    device.load(Table.single(MiB(4), Linear(loop.number, Sectors(0))))
    yield device
    device.remove()


ASKING = """
def ask():
    device.info(); device.table(); device.status(); device.deps(); device.table(inactive=True)
    Task(Operation.INFO, uuid="dmlib-test-busy").run()
    device.message("@stats_list"); driver_version(); list_devices(); target_versions()
"""
FAILING = """
def ask():
    for verb in (missing.info, missing.table, missing.remove, missing.suspend, lambda: device.load(REFUSED),
                 lambda: device.message("hello"), lambda: Device.create(name, ZERO),
                 lambda: device.set_uuid("dmlib-test-other")):
        try:
            verb()
        except TaskError:
            continue
        raise SystemExit("that should have failed")
missing = Device(name + "-missing")
"""
CHANGING = """
def ask():
    other = Device.create(name + "-other", ZERO)
    other.reload(ZERO); other.suspend(); other.resume()
    other.rename(name + "-renamed").remove()
"""
MEASURE = """
def collect():
    _kmsg._lines.clear()  # of which a few hundred are kept
    gc.collect()
warm, rounds, traced = map(int, sys.argv[2:])
for _ in range(warm): ask()
collect()
before = held(), resident()
for _ in range(rounds): ask()
collect()
after = held(), resident()
tracemalloc.start()
for _ in range(traced): ask()
collect()
first = tracemalloc.get_traced_memory()[0]
for _ in range(traced): ask()
collect()
second = tracemalloc.get_traced_memory()[0]
print(json.dumps([before[0], after[0], after[1] - before[1], second - first]))
"""

# Warm-up, rounds, rounds under tracemalloc: about ten, eight and twelve tasks a round.
COUNTS = {
    "asking": (ASKING, 30, 1000, 10),
    "failing": (FAILING, 20, 100, 10),
    "changing": (CHANGING, 2, 2, 1) if UDEV else (CHANGING, 20, 100, 10),
}


@pytest.mark.slow
@pytest.mark.parametrize(("ask", "warm", "rounds", "traced"), COUNTS.values(), ids=COUNTS)
def test_ten_thousand_tasks_leave_nothing(busy_device, ask, warm, rounds, traced):
    """After thousands of tasks, failing ones too, memory, descriptors, semaphores and devices are what they were."""
    held_before, held_after, resident, traced_growth = program(ask + MEASURE, busy_device.name, warm, rounds, traced)
    assert held_after == held_before
    assert resident < 512
    assert traced_growth < 4096


def test_hundreds_of_tasks_leave_nothing(busy_device):
    """The same in short: questions, failures and changes leave memory, descriptors and semaphores as they were."""
    parts = [ASKING, FAILING] if UDEV else [ASKING, FAILING, CHANGING]
    code = "".join(f"{part}\nparts = [*globals().get('parts', []), ask]\n" for part in parts)
    code += "def ask():\n    for part in parts: part()\n"
    held_before, held_after, resident, traced_growth = program(code + MEASURE, busy_device.name, 5, 3, 1)
    assert held_after == held_before
    assert resident < 512
    assert traced_growth < 8192


# -- with less than everything


def test_a_failure_for_want_of_permission_does_not_last():
    """A process that may not open the control node is told so; once it may, the same process works."""
    code = """
library_version()  # loads what an ordinary user might not be able to read
os.setresuid(65534, 65534, 0)
reasons = []
for attempt in range(2):
    try: driver_version()
    except DriverUnavailableError as error: reasons.append([error.reason, error.errno])
os.setresuid(0, 0, 0)
print(json.dumps([reasons, driver_version(), Device(name).exists()]))
"""
    reasons, version, exists = program(code, "dmlib-test-none")
    assert len(reasons) == 2
    for reason, errno in reasons:
        assert "root is needed" in reason
        assert errno == 13
    assert version[0] == 4
    assert exists is False


def test_privileges_that_are_lost_later_are_reported(busy_device):
    """With the control node open, a process that gives up root is refused by the kernel, call by call."""
    code = """
device.info()
os.setresuid(65534, 65534, 65534)
found = []
for verb in (device.info, device.status, device.resume, device.remove, lambda: device.load(ZERO)):
    try: verb()
    except PermissionDeniedError as error: found.append([error.operation, error.errno])
try: list_devices()
except DriverUnavailableError as error: found.append(["list", error.errno])
print(json.dumps(found))
"""
    found = program(code, busy_device.name)
    verbs = ["info", "status", "resume", "remove", "load", "list"]
    assert found == [[verb, 13] for verb in verbs]


def test_a_library_that_cannot_reach_the_driver_is_reported_each_time(tmp_path):
    """Where the driver answers but libdevmapper finds no control node, its own words are with the error, once."""
    (tmp_path / "mapper").touch()
    code = """
from dmlib import _ffi
lib, _ = _ffi.load()
assert lib.dm_set_dev_dir(sys.argv[2].encode())
out = []
for attempt in range(2):
    try: driver_version()
    except DriverUnavailableError as error: out.append([str(error), list(error.log)])
print(json.dumps([out, len(os.listdir("/proc/self/fd"))]))
"""
    (first, second), descriptors = program(code, "dmlib-test-none", tmp_path)
    for text, _ in (first, second):
        assert text.startswith("device mapper is not available: ")
        assert "libdevmapper" in text
    assert any("Existing path" in line for line in first[1])
    assert second[1] == []
    assert descriptors <= 5


def test_a_missing_control_node_is_made_where_the_driver_is():
    """In a /dev without nodes of device mapper, as in a fresh container, root's first verb finds the driver."""
    words = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/mapper && exec "$@"', "sh"]
    code = 'import os\nfrom dmlib import driver_version\nprint(driver_version()[0], os.listdir("/dev/mapper"))'
    done = subprocess.run([*words, sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4 ['control']\n"


SHORT_OF_DESCRIPTORS = """
import resource
from dmlib import _ffi
_ffi.load()
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
said = []
for limit in (*range(3, 12), most):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    try:
        device.info()
    except DmError as error:
        said.append(type(error).__name__)
print(json.dumps(said))
"""


def test_few_descriptors_at_the_start_do_no_lasting_harm(busy_device):
    """A process that is out of descriptors at its first try can use the driver once it has some."""
    said = program(SHORT_OF_DESCRIPTORS, busy_device.name)
    assert set(said) == {"DriverUnavailableError"}
    assert 1 <= len(said) <= 6
