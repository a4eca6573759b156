# SPDX-License-Identifier: MIT
"""
Pools in trouble, each brought about for real: metadata that fails under the pool, metadata used up, fail mode.

The metadata device is a linear device of which some sectors, or all, are replaced by the error target.
"""

from __future__ import annotations

import os

import pytest

from dmlib import (
    Device,
    Error,
    KiB,
    Linear,
    MetaBlocks,
    MiB,
    OutOfMetadataSpaceError,
    PoolFailedError,
    PoolMode,
    PoolNeedsCheckError,
    PoolReadOnlyError,
    RawTarget,
    Sectors,
    StateError,
    Table,
    ThinPool,
)

pytestmark = pytest.mark.once

SIZE = MiB(4)


class Fragile:
    """A pool whose metadata device can be made to fail."""

    def __init__(self, loop_device, unique_name):
        self.loop, self.data = loop_device(SIZE), loop_device(MiB(64))
        self.good = Table.single(SIZE, Linear(self.loop.number, Sectors(0)))
        self.metadata = Device.create(unique_name("-metadata"), self.good)
        self.name = unique_name()
        self.pool = ThinPool.create(self.name, metadata=self.metadata.path, data=self.data, data_block_size=KiB(64))

    def break_writes(self):
        """From now on reads work and writes fail."""
        flakey = RawTarget("flakey", f"{self.loop.number} 0 0 3600 1 error_writes")
        self.metadata.reload(Table.single(SIZE, flakey), flush=False, lockfs=False)

    def break_writes_but_superblock(self):
        """From now on only the first 4 KiB can be written, so that the flag "needs check" can."""
        flakey = RawTarget("flakey", f"{self.loop.number} 8 0 3600 1 error_writes")
        parts = [(Sectors(8), Linear(self.loop.number, Sectors(0))), (SIZE - Sectors(8), flakey)]
        self.metadata.reload(Table.concat(parts), flush=False, lockfs=False)

    def break_all(self):
        """From now on every read and write fails."""
        self.metadata.reload(Table.single(SIZE, Error()), flush=False, lockfs=False)

    def mend(self):
        self.metadata.reload(self.good, flush=False, lockfs=False)


@pytest.fixture
def fragile(loop_device, unique_name):
    made = Fragile(loop_device, unique_name)
    yield made
    made.mend()
    if made.pool.device.exists():
        made.pool.deactivate()


def nothing_suspended(*devices):
    return not any(device.info().suspended for device in devices)


class TestNeedsCheck:
    """Needs check, with the flag on disk: what was not committed is gone, and growing is refused."""

    def test_message_is_not_taken_for_done(self, fragile, sh):
        """The kernel answers a message before its commit fails; dmlib tells the failure, and no undo is left over."""
        fragile.pool.create_thin(0, MiB(1), activate=False)
        fragile.break_writes_but_superblock()
        with pytest.raises(PoolNeedsCheckError, match="create_thin: the metadata needs thin_check") as told:
            fragile.pool.create_thin(1, MiB(1))
        assert told.value.status.needs_check
        assert "needs_check" in sh(f"dmsetup status --noflush {fragile.name}").split()
        fragile.pool.deactivate()
        fragile.mend()
        assert sh(f"thin_ls --no-headers -o DEV {fragile.metadata.path}").split() == ["0"]

    def test_dmsetup_takes_it_for_done(self, fragile, sh):
        """The premise of the test above: dmsetup reports success for a thin id that does not survive."""
        fragile.break_writes_but_superblock()
        sh(f"dmsetup message {fragile.name} 0 'create_thin 1'")
        fragile.pool.deactivate()
        fragile.mend()
        assert sh(f"thin_ls --no-headers -o DEV {fragile.metadata.path}").split() == []

    @pytest.mark.parametrize("call", ["create_snap", "delete", "set_transaction_id"])
    def test_every_message(self, fragile, call, sh):
        """Snapshot, delete and transaction id are told to have failed as well, and are not on disk."""
        fragile.pool.create_thin(0, MiB(1), activate=False)
        fragile.break_writes_but_superblock()
        arguments = {"create_snap": (1, 0), "delete": (0,), "set_transaction_id": (0, 1)}[call]
        with pytest.raises(PoolNeedsCheckError, match=call):
            getattr(fragile.pool, call)(*arguments)
        fragile.pool.deactivate()
        fragile.mend()
        assert sh(f"thin_ls --no-headers -o DEV,TRANSACTION {fragile.metadata.path}").split() == ["0", "0"]
        assert 'transaction="0"' in sh(f"thin_dump {fragile.metadata.path}").splitlines()[0]

    def test_growing_is_refused(self, fragile, sh):
        """Growing raises before anything is suspended or loaded; checked and cleared, the pool grows."""
        fragile.break_writes_but_superblock()
        with pytest.raises(PoolNeedsCheckError):
            fragile.pool.create_thin(0, MiB(1))
        fragile.mend()
        fragile.data.grow(MiB(96))
        table = sh(f"dmsetup table {fragile.name}")
        for grow in (fragile.pool.grow_data, fragile.pool.grow_metadata):
            with pytest.raises(PoolNeedsCheckError):
                grow()
            assert sh(f"dmsetup table {fragile.name}") == table
            state = sh(f"dmsetup info -c --noheadings -o suspended,tables_loaded {fragile.name}").strip()
            assert state == "Active:Live"
        fragile.pool.deactivate()
        sh(f"thin_check --clear-needs-check-flag {fragile.metadata.path}")
        pool = ThinPool.activate(fragile.name, metadata=fragile.metadata.path, data=fragile.data)
        assert pool.status().mode is PoolMode.READ_WRITE
        assert pool.status().total_data.count == 1536

    def test_after_restart(self, fragile):
        """A pool that is started with the flag on disk says so, takes no change, and its volumes can be read."""
        thin = fragile.pool.create_thin(0, MiB(1))
        with open(thin.path, "r+b", buffering=0) as device:
            device.write(b"readable" * 512)
            os.fsync(device.fileno())
        fragile.break_writes_but_superblock()
        with pytest.raises(PoolNeedsCheckError):
            fragile.pool.set_transaction_id(0, 1)
        fragile.pool.deactivate()
        fragile.mend()
        pool = ThinPool.activate(fragile.name, metadata=fragile.metadata.path, data=fragile.data)
        assert pool.status().needs_check
        assert pool.status().mode is PoolMode.READ_ONLY
        with pytest.raises(PoolNeedsCheckError, match="delete"):
            pool.delete(0)
        thin.activate()
        with open(thin.path, "rb") as device:
            assert device.read(4096) == b"readable" * 512

    def test_snapshot(self, fragile, sh):
        """A snapshot whose commit fails is told so; the origin runs on, and no device and no id is left."""
        thin = fragile.pool.create_thin(0, MiB(4))
        fragile.break_writes_but_superblock()
        with pytest.raises(PoolNeedsCheckError):
            thin.snapshot(1)
        assert nothing_suspended(thin.device, fragile.pool.device)
        assert fragile.pool.active(1) is None
        fragile.pool.deactivate()
        fragile.mend()
        assert sh(f"thin_ls --no-headers -o DEV {fragile.metadata.path}").split() == ["0"]


class TestFailMode:
    """Fail mode: the metadata cannot even be read."""

    def test_every_verb(self, fragile, sh):
        """Status, messages and growing all raise, nothing is suspended, and all can be taken down."""
        thin = fragile.pool.create_thin(0, MiB(4))
        fragile.break_all()
        with pytest.raises(PoolFailedError):
            fragile.pool.create_thin(1, MiB(1))
        assert sh(f"dmsetup status --noflush {fragile.name}").split()[3] == "Fail"
        for call in (
            fragile.pool.status,
            fragile.pool.grow_data,
            lambda: fragile.pool.delete(0),
            lambda: fragile.pool.set_transaction_id(0, 1),
            lambda: thin.snapshot(1, timeout=3),
        ):
            with pytest.raises(PoolFailedError):
                call()
        with pytest.raises(StateError, match="has no figures"):
            thin.status()
        assert nothing_suspended(thin.device, fragile.pool.device)


def test_rolled_back_without_a_trace(fragile, sh):
    """Where the flag could not be written either, the pool says "needs check" while it runs, and nothing later."""
    fragile.pool.set_transaction_id(0, 1)
    fragile.break_writes()
    with pytest.raises(PoolNeedsCheckError):
        fragile.pool.set_transaction_id(1, 2)
    assert "needs_check" in sh(f"dmsetup status --noflush {fragile.name}").split()
    fragile.pool.deactivate()
    fragile.mend()
    pool = ThinPool.activate(fragile.name, metadata=fragile.metadata.path, data=fragile.data)
    status = pool.status()
    assert (status.mode, status.needs_check, status.transaction_id) == (PoolMode.READ_WRITE, False, 1)


class TestReadOnly:
    def test_messages_and_growing(self, pool, backing):
        """A read-only pool takes neither messages nor growth, and both again once it is writable."""
        pool.create_thin(0, MiB(1), activate=False)
        pool.reconfigure(read_only=True)
        backing[0].grow(MiB(6))
        backing[1].grow(MiB(80))
        for call in (
            lambda: pool.create_thin(1, MiB(1)),
            lambda: pool.create_snap(1, 0),
            lambda: pool.delete(0),
            lambda: pool.set_transaction_id(0, 1),
            pool.grow_data,
            pool.grow_metadata,
        ):
            with pytest.raises(PoolReadOnlyError, match="made read-only"):
                call()
        assert pool.status().total_data.count == 1024
        assert pool.device.table().length == MiB(64)
        assert nothing_suspended(pool.device)
        pool.reconfigure(read_only=False)
        pool.grow_data()
        pool.delete(0)

    def test_snapshot_of_active(self, pool, thin):
        """A snapshot in a read-only pool is refused before anything is suspended."""
        pool.reconfigure(read_only=True)
        with pytest.raises(PoolReadOnlyError):
            thin.snapshot(1)
        assert nothing_suspended(thin.device)


class TestOutOfMetadata:
    @pytest.fixture
    def exhausted(self, loop_device, unique_name):
        """A pool whose metadata was used up by making thin ids."""
        metadata, data = loop_device(KiB(512)), loop_device(MiB(64))
        pool = ThinPool.create(unique_name(), metadata=metadata, data=data, data_block_size=KiB(64))
        made = []

        def make_ids():
            made.extend(pool.create_thin(thin_id, MiB(1), activate=False) for thin_id in range(2000))

        with pytest.raises(OutOfMetadataSpaceError, match="no metadata space; grow the metadata device") as full:
            make_ids()
        assert full.value.status.free_metadata <= MetaBlocks(1)
        yield pool, metadata, data, made[-1].thin_id
        pool.deactivate()

    def test_growing_heals(self, exhausted, sh):
        """Out of metadata space the pool takes no messages and no data; a larger metadata device heals it online."""
        pool, metadata, data, last = exhausted
        assert pool.status().needs_check is False
        data.grow(MiB(80))
        for call in (lambda: pool.delete(0), lambda: pool.set_transaction_id(0, 1), pool.grow_data):
            with pytest.raises(OutOfMetadataSpaceError):
                call()
        assert nothing_suspended(pool.device)
        metadata.grow(MiB(2))
        pool.grow_metadata()
        assert pool.status().mode is PoolMode.READ_WRITE
        pool.grow_data()
        pool.delete(last)
        pool.create_thin(last, MiB(1), activate=False)
        assert pool.status().total_data.count == 1280
        assert sh(f"dmsetup status {pool.name}").split()[7] == "rw"
