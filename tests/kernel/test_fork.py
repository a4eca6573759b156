# SPDX-License-Identifier: MIT
"""A process that forks while dmlib is at work: the child can use it at once, and the parent is not disturbed."""

import json
import os
import subprocess
import sys

import pytest

from dmlib import Device, MiB, Table, Zero, list_devices

ZERO = Table.single(MiB(1), Zero())
CPUS = os.cpu_count() or 1
UDEV = os.path.exists("/run/udev/control") and "DM_DISABLE_UDEV" not in os.environ

BEGIN = """
import fcntl, json, os, sys, threading, time
from dmlib import Device, DeviceExistsError, MiB, RawTarget, Table, TargetRefusedError, Zero, list_devices
stem = sys.argv[1]
ZERO = Table.single(MiB(1), Zero())

def controls():
    # The descriptors on the control node, as numbers.
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").endswith("/mapper/control"): found.append(int(name))
        except FileNotFoundError: pass
    return found

def reap(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def program(code, *words):
    """Run a program that forks; return what it printed, as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", BEGIN + code, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


ENDINGS = {"os._exit": "os._exit(7)", "sys.exit": "sys.exit(7)", "normal end": "pass"}

AT_WORK = """
failures, rounds = [], [0]
def work(number):
    while not stop.is_set():
        try:
            device = Device.create(f"{stem}-{number}", ZERO)
            assert device.info().number == type(device.info().number).from_dev(os.stat(device.path).st_rdev)
            device.remove()
            rounds[0] += 1
        except BaseException as error:
            failures.append(repr(error))
            raise
stop = threading.Event()
threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
for thread in threads: thread.start()
codes, pid = [], 1
for number in range(int(sys.argv[2])):
    pid = os.fork()
    if pid == 0:
        names = {device.name for device in list_devices()}
        device = Device.create(f"{stem}-child-{number}", ZERO)
        assert device.info().live_table and os.path.exists(device.path)
        device.remove()
        ENDING
        break
    codes.append(reap(pid))
if pid:
    stop.set()
    for thread in threads: thread.join()
    print(json.dumps([codes, failures, rounds[0]]))
"""


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_child_works_at_once_while_threads_of_the_parent_are_at_it(unique_name, ending):
    """
    Children forked in the middle of other threads' work make and remove devices at once, however they end.

    The parent's threads, and the nodes of their devices, are not disturbed.
    """
    children = 4 if CPUS > 1 else 1 if UDEV else 2
    codes, failures, rounds = program(AT_WORK.replace("ENDING", ending), unique_name(), children)
    assert codes == [0 if ending == "pass" else 7] * children
    assert failures == []
    assert rounds >= 1


PENDING = """
failures = []
def work():
    try:
        while not stop.is_set():
            device = Device.create(stem, ZERO)
            for look in range(5):
                if not os.path.exists(device.path): failures.append("the node is gone")
                time.sleep(0.002)
            device.remove()
    except BaseException as error:
        failures.append(repr(error))
stop = threading.Event()
thread = threading.Thread(target=work)
thread.start()
codes = set()
for number in range(int(sys.argv[2])):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    codes.add(reap(pid))
stop.set()
thread.join()
print(json.dumps([failures, sorted(codes)]))
"""


@pytest.mark.parametrize("forks", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_a_child_does_not_carry_out_what_the_parent_has_pending(unique_name, forks):
    """Node changes that a thread of the parent is about to make are the parent's alone, whenever it forks."""
    assert program(PENDING, unique_name(), forks) == [[], [0]]


def test_a_child_has_a_control_descriptor_of_its_own(unique_name):
    """Parent and child each have one descriptor on the control node, of their own, and programs inherit none."""
    code = """
Device(stem).exists()
mine = controls()
kept = [os.get_inheritable(fd) for fd in mine]
flags = fcntl.fcntl(mine[0], fcntl.F_GETFL)
r, w = os.pipe()
if os.fork() == 0:
    before = controls()
    Device(stem).exists()
    after = controls()
    for fd in after: fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_APPEND)
    os.write(w, json.dumps([before, len(after), [os.get_inheritable(fd) for fd in after]]).encode())
    os._exit(0)
os.wait()
print(json.dumps([len(mine), kept, flags == fcntl.fcntl(mine[0], fcntl.F_GETFL), json.loads(os.read(r, 1000))]))
"""
    count, inheritable, untouched, (before, after, inheritable_there) = program(code, unique_name())
    assert (count, inheritable) == (1, [False])
    assert untouched
    assert (before, after, inheritable_there) == ([], 1, [False])


def test_a_program_that_replaces_the_process_inherits_nothing(unique_name):
    """After exec neither the control node nor the kernel's log is open."""
    device = Device.create(unique_name())
    code = """
try: Device(stem).load(Table.single(MiB(1), RawTarget("linear", "7:0 x")))
except TargetRefusedError as error: assert error.kernel_log
assert len(controls()) == 1
look = "import json, os; print(json.dumps([n for n in range(3, 40) if os.path.lexists(f'/proc/self/fd/{n}')]))"
os.execv(sys.executable, [sys.executable, "-c", look])
"""
    assert program(code, device.name) == []


def test_the_lines_of_the_kernel_are_found_by_parent_and_child(unique_name):
    """While parent and child both read the kernel's log for their own failures, neither misses a line."""
    device = Device.create(unique_name())
    code = """
def fail(words):
    try:
        Device(stem).load(Table.single(MiB(1), RawTarget("linear", words)))
    except TargetRefusedError as error:
        return "\\n".join(error.kernel_log)
assert "Invalid argument count" in fail("7:0")
pid = os.fork()
if pid == 0:
    lost = sum("Invalid device sector" not in fail("7:0 x") for _ in range(60))
    os._exit(lost)
lost = sum("Invalid argument count" not in fail("7:0") for _ in range(60))
print(json.dumps([lost, reap(pid)]))
"""
    assert program(code, device.name) == [0, 0]


def test_a_suspended_device_of_the_parent_stays_suspended(unique_name):
    """A child that is forked while the parent holds a device suspended, and ends, leaves that to the parent."""
    device = Device.create(unique_name(), ZERO)
    with device.suspended():
        pid = os.fork()
        if pid == 0:
            os._exit(0 if device.info().suspended else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert device.info().suspended
    assert not device.info().suspended
    device.remove()


def test_grandchildren_work_too(unique_name):
    """A child of a child, as daemons are made, makes devices and its parents see them."""
    name = unique_name()
    code = """
Device(stem).exists()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        Device.create(stem, ZERO)
        os._exit(0)
    os.wait()
    os._exit(0 if Device(stem).exists() else 1)
print(json.dumps([os.wait()[1], Device(stem).info().live_table, len(controls())]))
"""
    assert program(code, name) == [0, True, 1]
    assert name in {device.name for device in list_devices()}
