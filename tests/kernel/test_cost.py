# SPDX-License-Identifier: MIT
"""What each verb costs in ioctls on the control node, counted by strace outside of the process."""

import re
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.once

MARK = 0x2E01
"""A request that no driver knows, sent to a pipe: it tells the verbs apart in strace's record."""

SNAPSHOT = 7
"""Who has the origin active; may the pool be written and has it room, twice; suspend, message, resume; committed?"""

MARK_IN_RECORD = "_IOC(_IOC_NONE, 0x2e, 0x1, 0)"

PROGRAM = """
    import fcntl, os, sys
    from dmlib import *
    from dmlib import Linear, Operation, Sectors, Table, Task, Zero

    pipe, _ = os.pipe()

    def mark():
        try:
            fcntl.ioctl(pipe, {MARK})
        except OSError:
            pass

    def cost(verb):
        mark()
        result = verb()
        mark()
        return result
"""


@pytest.fixture
def counted(tmp_path):
    """Run a program in which ``cost(verb)`` calls a verb; return the ioctls of each such call, by strace's names."""

    def run(program, *words):
        record = tmp_path / "strace"
        code = textwrap.dedent(PROGRAM).replace("{MARK}", hex(MARK)) + textwrap.dedent(program)
        command = ["strace", "-f", "-qq", "-e", "trace=ioctl", "-o", str(record), sys.executable, "-c", code, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        verbs = record.read_text(encoding="utf-8", errors="replace").split(MARK_IN_RECORD)
        assert len(verbs) % 2 == 1
        assert len(verbs) > 1
        return [re.findall(r"ioctl\(\d+, DM_(?:DEV_|TABLE_|TARGET_)?(\w+)", text) for text in verbs[1::2]]

    return run


def test_questions_and_lifecycle(counted, unique_name):
    """A question is one ioctl; create with a table and removal are four together; a reload is four."""
    program = """
        name, table = sys.argv[1], Table.single(MiB(1), Zero())
        Device.create(name + "-first", table).remove()  # what is opened and loaded once
        list_devices()
        device = Device(name)

        def life():
            Device.create(name, table)
            device.remove()

        cost(life)
        Device.create(name, table, uuid="")
        for verb in (
            device.info, device.exists, device.table, lambda: device.table(inactive=True), device.status,
            lambda: device.status(flush=True), device.deps, lambda: device.message("@stats_list"),
            lambda: device.load(table), device.clear, device.suspend, device.resume,
            lambda: device.reload(table), lambda: device.set_uuid(name), list_devices, driver_version,
            target_versions, lambda: device.rename(name + "-b").rename(name), device.remove,
        ):
            cost(verb)
    """
    name = unique_name()
    assert counted(program, name) == [
        ["CREATE", "LOAD", "SUSPEND", "REMOVE"],
        ["STATUS"],
        ["STATUS"],
        ["STATUS"],
        ["STATUS"],
        ["STATUS"],
        ["STATUS"],
        ["DEPS"],
        ["MSG"],
        ["LOAD"],
        ["CLEAR"],
        ["SUSPEND"],
        ["SUSPEND"],
        ["STATUS", "LOAD", "SUSPEND", "SUSPEND"],
        ["RENAME"],
        ["LIST_DEVICES"],
        ["VERSION"],
        ["LIST_VERSIONS"],
        ["RENAME", "RENAME"],
        ["REMOVE"],
    ]


def test_waiting(counted, unique_name):
    """A monitor arms once and lists once at its making and for each look, whatever there is; a wait is the same."""
    program = """
        device = Device.create(sys.argv[1], Table.single(MiB(1), Zero()))
        others = [Device.create(f"{sys.argv[1]}-{number}", Table.single(MiB(1), Zero())) for number in range(20)]
        with EventMonitor() as monitor:
            device = device.rename(device.name + "-b")
            cost(lambda: monitor.poll(5))
            cost(lambda: monitor.poll(0))
            cost(monitor.read)
        cost(lambda: EventMonitor().close())
        cost(lambda: device.wait(0))
        cost(lambda: device.wait(1, timeout=0))
        for one in (device, *others):
            one.remove()
    """
    look, probe = ["ARM_POLL", "LIST_DEVICES"], ["VERSION"]
    assert counted(program, unique_name()) == [look, [], look, probe + look, probe + look, probe + look]


def test_thin_devices(counted, pool):
    """Activation costs three ioctls and at most two to see that the id is not active; a snapshot in use adds a few."""
    program = """
        pool = ThinPool.open(sys.argv[1])
        pool.create_thin(0, MiB(1)).deactivate()
        list_devices()
        first, second = pool.thin(0, MiB(1)), pool.thin(1, MiB(1))
        cost(lambda: pool.create_thin(1, MiB(1), activate=False))
        cost(first.activate)
        cost(second.activate)
        first.deactivate()
        second.snapshot(2)
        cost(first.activate)
        cost(lambda: second.snapshot(3, activate=False))
        cost(lambda: second.snapshot(4))
        cost(second.status)
        cost(pool.status)
        cost(lambda: ThinPool.open(sys.argv[1]))
    """
    made, alone, with_another, with_two, message_only, snapshot, *questions = counted(program, pool.name)
    assert made == ["MSG", "STATUS"]
    mapping = ["CREATE", "LOAD", "SUSPEND"]
    for activation in (alone, with_another, with_two):
        assert activation[-3:] == mapping
        assert len(activation) <= 3 + 2, activation
    assert message_only.count("SUSPEND") == 2
    suspend = message_only.index("SUSPEND")
    assert message_only[suspend : suspend + 3] == ["SUSPEND", "MSG", "SUSPEND"]
    assert snapshot == [*message_only, "STATUS", *mapping]
    assert len(message_only) == SNAPSHOT
    assert questions == [["STATUS"]] * 3


def test_a_foreign_device_costs_its_tables(counted, pool, sh):
    """The tables of devices that dmlib did not make are read, both slots of each, and of no others."""
    pool.create_thin(0, "1MiB")
    pool.create_thin(1, "1MiB", activate=False)
    pool.create_thin(2, "1MiB", activate=False)
    number = pool.number
    sh(f"dmsetup create {pool.name}-foreign --table '0 2048 thin {number} 1'")
    program = """
        pool = ThinPool.open(sys.argv[1])
        list_devices()
        cost(pool.thin(2, MiB(1)).activate)
        try:
            cost(pool.thin(1, MiB(1)).activate)
        except DeviceExistsError as error:
            mark()
    """
    try:
        free, taken = counted(program, pool.name)
    finally:
        sh(f"dmsetup remove {pool.name}-foreign")
    assert len(free) == 3 + 2 + 2, free
    assert "CREATE" not in taken
    assert "LOAD" not in taken
