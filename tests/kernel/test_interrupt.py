# SPDX-License-Identifier: MIT
"""Exceptions and Ctrl-C while a device is suspended, or is about to be: it is resumed, and the caller hears of it."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from dmlib import (
    MiB,
    StateError,
    Table,
    TargetRefusedError,
    Zero,
)
from kernel_kit import unbuffered_write, undisturbed, wait_until

ZERO = Table.single(MiB(1), Zero())


# -- suspended(), where Python runs


def test_suspended(linear_device):
    """The device is suspended in the block and resumed after it, also when that fails."""
    with linear_device.suspended() as device:
        assert device.info().suspended
    assert not linear_device.info().suspended
    with pytest.raises(ZeroDivisionError), linear_device.suspended():
        raise ZeroDivisionError
    assert not linear_device.info().suspended


def test_suspended_and_ctrl_c(linear_device):
    """A Ctrl-C in the block, and more of them during the resume, reach the caller with the device resumed."""
    with pytest.raises(KeyboardInterrupt), linear_device.suspended():
        signal.raise_signal(signal.SIGINT)
    assert not linear_device.info().suspended


def test_suspended_and_a_storm_of_ctrl_c(linear_device):
    """More of them, at any moment of the resume, do not keep the device from being resumed."""

    def attempt(pressing):
        with linear_device.suspended():
            pressing.start()
            time.sleep(5)

    def handler(_, frame):
        while frame:
            if frame.f_code is attempt.__code__:
                raise KeyboardInterrupt
            frame = frame.f_back

    def press(pause):
        for _ in range(5):
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, handler)
    try:
        for pause in (0, 0.0002, 0.0005, 0.001, 0.002):
            pressing = threading.Thread(target=press, args=[pause])
            with pytest.raises(KeyboardInterrupt):
                attempt(pressing)
            assert not linear_device.info().suspended
            pressing.join()
    finally:
        time.sleep(0.01)
        signal.signal(signal.SIGINT, before)


def test_suspended_by_another(linear_device):
    """A device that is suspended already is refused and stays as it is."""
    linear_device.suspend()
    with pytest.raises(StateError, match="suspended already"), linear_device.suspended():
        pytest.fail("the block ran")
    assert linear_device.info().suspended
    linear_device.resume()


def test_suspended_when_block_and_resume_fail(pool):
    """Both errors are there: the resume's is raised, with that of the block as its context."""
    before = pool.device.table()

    def body():
        pool.device.load(Table.single(MiB(16), pool.target()))  # shorter than the pool is
        raise ZeroDivisionError

    with pytest.raises(TargetRefusedError) as caught, pool.device.suspended(flush=False):
        body()
    assert caught.value.operation == "resume"
    chain, error = [], caught.value
    while error is not None:
        chain.append(type(error))
        error = error.__context__
    assert ZeroDivisionError in chain
    pool.device.load(before)
    pool.device.resume()
    undisturbed(pool.device, before)


# -- Ctrl-C


def child(program, *words):
    """Start a Python program that uses dmlib; SIGINT does in it what it does in a terminal."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_in_a_suspend_that_waits(slow):
    """A process gets its KeyboardInterrupt at once, ends when the kernel is through, and leaves nothing suspended."""
    device, below = slow
    before = device.table()
    program = """
        import sys, threading, time
        from dmlib import Device, DeviceNumber, Linear, MiB, Table
        device, number = Device(sys.argv[1]), DeviceNumber.parse(sys.argv[2])
        table = Table.single(MiB(2), Linear(number, MiB(1)))
        device.info()
        print("ready", flush=True)
        sys.stdin.readline()
        begin = time.monotonic()
        try:
            device.reload(table)
        except KeyboardInterrupt:
            left = device.info().inactive_table
            print("interrupted", left, time.monotonic() - begin < 1.4, flush=True)
            raise
    """
    with child(program, device.name, str(below.info().number)) as process:
        assert process.stdout.readline() == "ready\n"
        writing = unbuffered_write(device.path)
        process.stdin.write("go\n")
        process.stdin.flush()
        wait_until(lambda: device.info().inactive_table)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted False True\n"
        _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT, errors
    assert errors.strip().endswith("KeyboardInterrupt")
    writing.join()
    undisturbed(device, before)


HARSH = [pytest.param(verb, 200, marks=pytest.mark.slow) for verb in ("reload", "snapshot")]


@pytest.mark.parametrize(("verb", "rounds"), [("reload", 80), ("snapshot", 20), *HARSH])
def test_a_storm_of_ctrl_c(verb, rounds, thin, linear_device):
    """Signals at any moment of many reloads and snapshots leave nothing suspended and no table waiting."""
    program = """
        import os, random, signal, sys, threading, time
        from dmlib import Device, ThinDevice
        verb, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
        device = Device(name)
        if verb == "reload":
            table = device.table()
        else:
            thin = ThinDevice.open(name)

        def step(number):
            if verb == "reload":
                device.reload(table)
            else:
                thin.snapshot(number, activate=False)

        def handler(number, frame):
            while frame:
                if frame.f_code is step.__code__:
                    raise KeyboardInterrupt
                frame = frame.f_back

        def press():
            for pause in sorted(random.uniform(0, 2 * usual) for _ in range(random.choice((1, 1, 1, 3)))):
                time.sleep(pause)
                os.kill(os.getpid(), signal.SIGINT)

        signal.signal(signal.SIGINT, handler)
        begin = time.monotonic()
        for number in range(5):
            step(number + 1)
        usual = (time.monotonic() - begin) / 5
        done = interrupted = 0
        for number in range(5, 5 + rounds):
            pressing = threading.Thread(target=press)
            pressing.start()
            try:
                step(number + 1)
                done += 1
            except KeyboardInterrupt:
                interrupted += 1
            pressing.join()
            deadline = time.monotonic() + 2
            while device.info().suspended and time.monotonic() < deadline:
                time.sleep(0.001)  # given up as the kernel carried the suspend out: the resume follows at once
            info = device.info()
            assert not info.suspended and not info.inactive_table, info
        step(5 + rounds + 1)  # and after the storm, calm
        done += 1
        print(done, interrupted)
    """
    device = linear_device if verb == "reload" else thin.device
    if os.path.exists("/run/udev/control") and "DM_DISABLE_UDEV" not in os.environ:
        rounds //= 4  # each resume waits for udev's rules
    with child(program, verb, device.name, str(rounds)) as process:
        printed, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    done, interrupted = map(int, printed.split())
    assert done > 0, printed
    assert done + interrupted == rounds + 1, printed
    assert interrupted > rounds / 20, printed
    info = device.info()
    assert (info.suspended, info.inactive_table) == (False, False)
    if verb == "snapshot":  # each that was interrupted took its thin id back
        assert len(thin_ids(thin)) == 1 + 5 + done


def thin_ids(thin):
    """The ids that are in the pool, as its metadata has them."""
    pool = thin.pool.device
    pool.message("reserve_metadata_snap")
    path = f"/dev/loop{thin.pool.metadata_device.minor}"
    dump = subprocess.run(["thin_dump", "-m", path], capture_output=True, text=True, check=True).stdout
    pool.message("release_metadata_snap")
    return [line for line in dump.splitlines() if "<device " in line]
