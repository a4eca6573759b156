# SPDX-License-Identifier: MIT
"""Pools that grow while in use, and pools that wait for it."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time

import pytest

from dmlib import (
    ArgumentError,
    DataBlocks,
    Device,
    KiB,
    Linear,
    MetaBlocks,
    MiB,
    OutOfDataSpaceError,
    PoolMode,
    Sectors,
    StateError,
    Table,
)

pytestmark = pytest.mark.once


def fill(path, size, seed):
    """Write pseudo-random data and return its checksum."""
    content = random.Random(seed).randbytes(size)  # noqa: S311 - test data
    with open(path, "r+b", buffering=0) as device:
        device.write(content)
        os.fsync(device.fileno())
    return hashlib.sha256(content).hexdigest()


def digest(path, size):
    """Checksum of the first *size* bytes, read from the device and not from the page cache."""
    with open(path, "rb", buffering=0) as device:
        os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.sha256(device.read(size)).hexdigest()


def wait_for(condition, timeout=60.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.01)


class Writer(threading.Thread):
    """Writes *count* blocks of 64 KiB from *first* on and waits until they are on the device."""

    def __init__(self, path, count, first=0):
        super().__init__(name="writer")
        self.path, self.count, self.first = path, count, first
        self.error = None

    def run(self):
        try:
            with open(self.path, "r+b", buffering=0) as device:
                for block in range(self.first, self.first + self.count):
                    os.pwrite(device.fileno(), bytes([block % 251]) * 65536, block * 65536)
                os.fsync(device.fileno())
        except OSError as error:
            self.error = error


def is_full(pool):
    return pool.status().mode is PoolMode.OUT_OF_DATA_SPACE


class TestData:
    def test_live(self, pool, thin, backing, sh):
        """The data device grows under a volume in use: size and table follow, its data stays."""
        before = fill(thin.path, 4 << 20, 1)
        with open(thin.path, "r+b", buffering=0) as user:
            backing[1].grow(MiB(96))
            pool.grow_data()
            user.seek(8 << 20)
            user.write(b"in use")
            os.fsync(user.fileno())
        assert pool.status().total_data == DataBlocks(1536)
        assert sh(f"dmsetup table {pool.name}").split()[1] == sh(f"blockdev --getsz {backing[1].path}").strip()
        assert digest(thin.path, 4 << 20) == before
        assert not pool.device.info().suspended

    def test_in_steps(self, pool, backing):
        """A size may be named; it is rounded down to whole blocks, and the same size again is no error."""
        backing[1].grow(MiB(96))
        pool.grow_data(MiB(64) + KiB(100))
        assert pool.status().total_data == DataBlocks(1025)
        pool.grow_data("70MiB")
        pool.grow_data(MiB(70))
        assert pool.status().total_data == DataBlocks(1120)

    def test_features_stay(self, pool, backing):
        """Mark and features of the table are as before."""
        pool.reconfigure(low_water_mark=DataBlocks(5), error_if_no_space=True, discard_passdown=False)
        before = pool.target()
        backing[1].grow(MiB(80))
        pool.grow_data()
        assert pool.target() == before

    @pytest.mark.parametrize("size", [KiB(64), MiB(63), MiB(64) - Sectors(1)])
    def test_no_shrinking(self, pool, sh, size):
        """A smaller size is refused before the kernel sees it (it would leave the pool suspended)."""
        table = sh(f"dmsetup table {pool.name}")
        with pytest.raises(ArgumentError, match="cannot shrink"):
            pool.grow_data(size)
        assert sh(f"dmsetup table {pool.name}") == table
        assert sh(f"dmsetup info -c --noheadings -o suspended,tables_loaded {pool.name}").strip() == "Active:Live"

    def test_device_too_small(self, pool):
        """A size that the device does not have is refused (the kernel would take the table)."""
        with pytest.raises(ArgumentError, match="more than the data device has"):
            pool.grow_data(MiB(65))
        assert pool.status().total_data == DataBlocks(1024)

    def test_suspended_pool(self, pool, backing):
        """A pool that somebody suspended is left alone."""
        backing[1].grow(MiB(80))
        with pool.device.suspended(flush=False):
            with pytest.raises(StateError, match="is suspended"):
                pool.grow_data()
            assert pool.device.info().suspended
        pool.grow_data()


class TestMetadata:
    def test_live(self, pool, thin, backing):
        """The metadata device grows under a volume in use; its data stays."""
        before = fill(thin.path, 1 << 20, 2)
        backing[0].grow(MiB(6))
        pool.grow_metadata()
        status = pool.status()
        assert status.total_metadata == MetaBlocks(1536)
        assert status.mode is PoolMode.READ_WRITE
        assert digest(thin.path, 1 << 20) == before

    def test_nothing_to_grow_into(self, pool):
        """A metadata device that is as large as before is an error, not a silent success."""
        with pytest.raises(ArgumentError, match="no more than the 1024 metadata blocks in use"):
            pool.grow_metadata()

    def test_both_at_once(self, pool, backing):
        """With both devices larger, the growing of one makes the kernel take the other too, and neither breaks."""
        backing[0].grow(MiB(8))
        backing[1].grow(MiB(80))
        pool.grow_data()
        assert pool.status().total_data == DataBlocks(1280)
        assert pool.status().total_metadata == MetaBlocks(2048)


@pytest.fixture
def full(pool, backing):
    """A pool that queues: a thin device wants 40 blocks more than there are."""
    thin = pool.create_thin(0, MiB(128))
    writer = Writer(thin.path, 1024 + 40)
    writer.start()
    wait_for(lambda: is_full(pool))
    yield pool, thin, writer
    if writer.is_alive():
        backing[1].grow(MiB(128))
        pool.grow_data()
        writer.join()


class TestFull:
    def test_waiting_writer_goes_on(self, full, backing, sh):
        """A write that waits in a full pool completes when the pool has grown, and reads back right."""
        pool, thin, writer = full
        assert "out_of_data_space" in sh(f"dmsetup status --noflush {pool.name}").split()
        backing[1].grow(MiB(96))
        pool.grow_data()
        writer.join(10)
        assert not writer.is_alive()
        assert writer.error is None
        assert pool.status().mode is PoolMode.READ_WRITE
        with open(thin.path, "rb", buffering=0) as device:
            os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for block in range(0, 1064, 37):
                assert os.pread(device.fileno(), 65536, block * 65536) == bytes([block % 251]) * 65536

    def test_delete_heals(self, pool):
        """Deleting a volume with blocks of its own lets a waiting write go on."""
        victim = pool.create_thin(1, MiB(16))
        fill(victim.path, 8 << 20, 3)
        victim.deactivate()
        thin = pool.create_thin(0, MiB(128))
        writer = Writer(thin.path, 1000)
        writer.start()
        wait_for(lambda: is_full(pool))
        victim.delete()
        writer.join(10)
        assert not writer.is_alive()
        assert writer.error is None

    def test_error_if_no_space(self, pool):
        """A pool that is told to fails the write at once with ENOSPC, and says so in its status."""
        pool.reconfigure(error_if_no_space=True)
        thin = pool.create_thin(0, MiB(128))
        writer = Writer(thin.path, 1030)
        writer.start()
        writer.join(10)
        assert not writer.is_alive()
        assert writer.error is not None
        assert writer.error.errno in (5, 28)
        status = pool.status()
        assert status.mode is PoolMode.OUT_OF_DATA_SPACE
        assert status.error_if_no_space

    def test_creating_works(self, full):
        """A full pool still makes, activates and deletes thin ids, without touching the waiting writer."""
        pool, _, writer = full
        other = pool.create_thin(7, MiB(1))
        other.deactivate()
        other.delete()
        assert writer.is_alive()
        assert is_full(pool)

    def test_no_room_refuses_a_snapshot(self, full):
        """A snapshot of the origin that waits is refused at once, nothing is suspended, the writer is unharmed."""
        pool, thin, writer = full
        begin = time.monotonic()
        with pytest.raises(OutOfDataSpaceError):
            thin.snapshot(1, timeout=5)
        assert time.monotonic() - begin < 4
        assert not thin.device.info().suspended
        assert writer.is_alive()
        assert pool.active(1) is None


@pytest.mark.concurrency
def test_growing_past_a_blocked_suspend(pool, backing, unique_name):
    """
    A thread blocked in a flushing suspend of a device above a full pool keeps no other from growing the pool.

    The suspend waits for a write that waits for space; the growing frees both.
    """
    thin = pool.create_thin(0, MiB(128))
    above = Device.create(unique_name(), Table.single(MiB(128), Linear(thin.path, Sectors(0))))
    writer = Writer(above.path, 1024 + 16)
    writer.start()
    wait_for(lambda: is_full(pool))
    failures = []

    def suspend():
        try:
            above.suspend(lockfs=False, timeout=None)
        except Exception as error:  # noqa: BLE001 - looked at by the test
            failures.append(error)

    suspender = threading.Thread(target=suspend, name="suspender")
    suspender.start()
    suspender.join(0.5)
    assert suspender.is_alive(), "the suspend was to wait for the queued write"
    begin = time.monotonic()
    backing[1].grow(MiB(128))
    pool.grow_data()
    assert time.monotonic() - begin < 20, "it waited for the queued write to fail, after 60 s"
    suspender.join(30)
    assert not suspender.is_alive()
    assert failures == []
    assert above.info().suspended
    above.resume()
    writer.join(30)
    assert writer.error is None
    above.remove()
