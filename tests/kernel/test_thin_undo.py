# SPDX-License-Identifier: MIT
"""
All of it happens, or nothing stays: a failure at each step of making, snapshotting, growing and deleting.

Each failure has a real cause. What the pool holds afterwards is read from its metadata with thin_ls.
"""

from __future__ import annotations

import os

import pytest

from dmlib import (
    CleanupError,
    Device,
    DeviceBusyError,
    DeviceExistsError,
    DeviceNotFoundError,
    DeviceNumber,
    DmError,
    Error,
    KiB,
    Linear,
    MiB,
    PoolMode,
    PoolNeedsCheckError,
    RawTarget,
    Sectors,
    Table,
    TargetRefusedError,
    TaskError,
    ThinPool,
    list_devices,
    set_udev,
)

SIZE = MiB(4)


def names():
    return {device.name for device in list_devices()}


def is_blank(loop):
    with loop.file.open("rb") as file:
        return not any(file.read(4096))


@pytest.fixture
def ids_of(sh):
    """Take a pool down and read the thin ids from its metadata; thin_check has to be content with it."""

    def read(pool):
        path = f"/dev/loop{pool.metadata_device.minor}"
        pool.deactivate()
        sh(f"thin_check {path}")
        return [int(word) for word in sh(f"thin_ls --no-headers -o DEV {path}").split()]

    return read


@pytest.fixture
def obstructed(unique_name):
    """A name whose node cannot be made: a folder is in its place, with something in it."""
    name = unique_name()
    folder = f"/dev/mapper/{name}"
    os.mkdir(folder)
    os.mkdir(f"{folder}/in-the-way")
    set_udev(timeout=0.3)
    yield name
    set_udev()
    os.rmdir(f"{folder}/in-the-way")
    os.rmdir(folder)


@pytest.fixture
def taken(linear_device):
    """A name that another device has; the device must be untouched at the end."""
    table = linear_device.table()
    yield linear_device.name
    assert linear_device.table() == table
    assert not linear_device.info().inactive_table


class TestCreatePool:
    @pytest.fixture
    def devices(self, loop_device):
        return {"metadata": loop_device(SIZE), "data": loop_device(MiB(64))}

    def test_name_taken(self, devices, taken):
        """The name belongs to another device: the metadata stays blank."""
        with pytest.raises(DeviceExistsError):
            ThinPool.create(taken, **devices, data_block_size=KiB(64))
        assert is_blank(devices["metadata"])

    def test_name_taken_and_format(self, devices, taken, unique_name, ids_of):
        """The name belongs to another device: not even format=True has erased the pool that was there."""
        pool = ThinPool.create(unique_name(), **devices, data_block_size=KiB(64))
        pool.create_thin(3, MiB(1), activate=False)
        pool.deactivate()
        before = devices["metadata"].file.read_bytes()
        with pytest.raises(DeviceExistsError):
            ThinPool.create(taken, **devices, data_block_size=KiB(64), format=True)
        assert devices["metadata"].file.read_bytes() == before
        assert ids_of(ThinPool.activate(pool.name, **devices)) == [3]

    def test_uuid_taken(self, devices, unique_name):
        """The pool's uuid belongs to another device: the same."""
        other = Device.create(unique_name(), uuid=f"DMLIB-{devices['metadata'].number}-pool")
        before = names()
        with pytest.raises(DeviceExistsError):
            ThinPool.create(unique_name(), **devices, data_block_size=KiB(64))
        assert names() == before
        assert is_blank(devices["metadata"])
        other.remove()

    def test_formatting_fails(self, devices, unique_name):
        """The metadata device fails beyond its first block: no device, and the first block blank again."""
        number = devices["metadata"].number
        parts = [(Sectors(8), Linear(number, Sectors(0))), (SIZE - Sectors(8), Error())]
        broken = Device.create(unique_name(), Table.concat(parts))
        name = unique_name()
        with pytest.raises(TaskError) as failure:
            ThinPool.create(name, metadata=broken.path, data=devices["data"], data_block_size=KiB(64))
        assert failure.value.operation in ("load", "resume")
        assert name not in names()
        assert is_blank(devices["metadata"])

    def test_metadata_cannot_be_written(self, devices, unique_name):
        """No write to the metadata works: the failure is told, with what of the undo could not be done."""
        number = devices["metadata"].number
        flakey = RawTarget("flakey", f"{number} 0 0 3600 1 error_writes")
        broken = Device.create(unique_name(), Table.single(SIZE, flakey))
        name = unique_name()
        with pytest.raises(CleanupError, match=f"create pool {name} failed") as failure:
            ThinPool.create(name, metadata=broken.path, data=devices["data"], data_block_size=KiB(64))
        assert isinstance(failure.value.__cause__, TaskError)
        assert [error.operation for error in failure.value.exceptions] == ["write"]
        assert name not in names()
        assert is_blank(devices["metadata"])

    def test_no_node(self, devices, obstructed):
        """The node cannot be made: no device, metadata blank, and with the way clear it works."""
        with pytest.raises(DmError):
            ThinPool.create(obstructed, **devices, data_block_size=KiB(64))
        assert obstructed not in names()
        assert is_blank(devices["metadata"])

    def test_activation_fails(self, devices, unique_name):
        """The metadata is damaged: starting the pool fails, no device is left, and not a byte has changed."""
        name = unique_name()
        ThinPool.create(name, **devices, data_block_size=KiB(64)).deactivate()
        with devices["metadata"].file.open("r+b") as file:
            file.seek(64)
            file.write(b"\xff" * 8)
        before = devices["metadata"].file.read_bytes()
        with pytest.raises(TaskError):
            ThinPool.activate(name, **devices)
        assert name not in names()
        assert devices["metadata"].file.read_bytes() == before

    def test_data_too_short(self, devices, unique_name, loop_device):
        """The data device is shorter than the pool was: starting it fails, and the pool is whole."""
        name = unique_name()
        ThinPool.create(name, **devices, data_block_size=KiB(64)).deactivate()
        with pytest.raises(TargetRefusedError) as refusal:
            ThinPool.activate(name, metadata=devices["metadata"], data=loop_device(MiB(32)))
        assert refusal.value.operation == "resume"
        assert name not in names()
        pool = ThinPool.activate(name, **devices)
        assert pool.status().mode is PoolMode.READ_WRITE
        pool.deactivate()


MAKE = {
    "create_thin": lambda pool, **arguments: pool.create_thin(1, MiB(1), **arguments),
    "snapshot of active": lambda pool, **arguments: pool.thin(0, MiB(1)).snapshot(1, **arguments),
    "snapshot of inactive": lambda pool, **arguments: pool.thin(0, MiB(1)).snapshot(1, **arguments),
}


@pytest.mark.parametrize("what", MAKE)
class TestMakeThin:
    @pytest.fixture
    def origin(self, pool, what):
        thin = pool.create_thin(0, MiB(1), activate=False)
        if what != "snapshot of inactive":
            thin.activate()
        return thin

    @staticmethod
    def check(pool, origin, before):
        """Nothing is left: no device, no suspended origin, no inactive table."""
        assert names() == before
        if origin.active():
            info = origin.active()
            assert not info.suspended
            assert not info.inactive_table
            with open(origin.path, "r+b", buffering=0) as device:
                device.write(b"x")
                os.fsync(device.fileno())
        assert not pool.device.info().suspended

    def test_name_taken(self, pool, origin, what, taken, ids_of):
        """The name belongs to another device: the id that was made is gone."""
        before = names()
        with pytest.raises(DeviceExistsError, match=f"create {taken}"):
            MAKE[what](pool, name=taken)
        self.check(pool, origin, before)
        assert ids_of(pool) == [0]

    def test_no_node(self, pool, origin, what, obstructed, ids_of):
        """The node cannot be made: the device and the id are gone."""
        before = names()
        with pytest.raises(DmError):
            MAKE[what](pool, name=obstructed)
        self.check(pool, origin, before)
        assert ids_of(pool) == [0]

    def test_id_taken(self, pool, origin, what, ids_of):
        """The id is taken: what has it stays, and nothing else is left."""
        pool.create_thin(1, MiB(1), activate=False)
        before = names()
        with pytest.raises(DeviceExistsError):
            MAKE[what](pool)
        self.check(pool, origin, before)
        assert ids_of(pool) == [0, 1]

    def test_uuid_taken(self, pool, origin, what, unique_name, ids_of):
        """A device that somebody else made carries the uuid: it stays, the error names it, and the id is gone."""
        other = Device.create(unique_name(), uuid=pool.uuid_of(1))
        before = names()
        with pytest.raises(DeviceExistsError, match=other.name):
            MAKE[what](pool)
        self.check(pool, origin, before)
        other.remove()
        assert ids_of(pool) == [0]

    def test_name_that_cannot_be(self, pool, origin, what, ids_of):
        """A name that no device can have is refused before the id is made."""
        before = names()
        with pytest.raises(DmError, match="must not contain '/'"):
            MAKE[what](pool, name="a/b")
        self.check(pool, origin, before)
        assert ids_of(pool) == [0]


def test_external_origin_missing(pool, ids_of):
    """The external origin is not there: the load fails, and the id is gone."""
    before = names()
    with pytest.raises(TaskError) as failure:
        pool.create_thin(1, MiB(1), external_origin=DeviceNumber(240, 7))
    assert failure.value.operation == "load"
    assert names() == before
    assert ids_of(pool) == []


def test_create_in_suspended_pool(pool, ids_of):
    """In a suspended pool the id can be made and not be mapped: it is gone again, and the pool still suspended."""
    with pool.device.suspended(flush=False):
        with pytest.raises(TargetRefusedError):
            pool.create_thin(1, MiB(1))
        assert pool.device.info().suspended
    assert ids_of(pool) == []


def test_pool_removed_meanwhile(pool):
    """The pool is gone: every verb says that it is not found."""
    thin = pool.create_thin(0, MiB(1), activate=False)
    pool.deactivate()
    for call in (
        lambda: pool.create_thin(1, MiB(1)),
        lambda: thin.snapshot(1),
        thin.activate,
        thin.delete,
        pool.status,
        pool.grow_data,
        pool.reconfigure,
    ):
        with pytest.raises(DeviceNotFoundError):
            call()


def test_delete_fails(pool, thin, ids_of):
    """A delete that is refused leaves device and id."""
    with open(thin.path, "rb"), pytest.raises(DeviceBusyError):
        thin.delete()
    assert thin.active().live_table
    assert ids_of(pool) == [0]


def test_growing_fails(loop_device, unique_name, sh):
    """The metadata fails while the pool grows: the failure is told, and no device is left suspended."""
    metadata, data = loop_device(SIZE), loop_device(MiB(64))
    good = Table.single(SIZE, Linear(metadata.number, Sectors(0)))
    below = Device.create(unique_name(), good)
    pool = ThinPool.create(unique_name(), metadata=below.path, data=data, data_block_size=KiB(64))
    thin = pool.create_thin(0, MiB(1))
    data.grow(MiB(96))
    flakey = RawTarget("flakey", f"{metadata.number} 8 0 3600 1 error_writes")
    parts = [(Sectors(8), Linear(metadata.number, Sectors(0))), (SIZE - Sectors(8), flakey)]
    below.reload(Table.concat(parts), flush=False, lockfs=False)
    with pytest.raises(PoolNeedsCheckError, match="grow_data"):
        pool.grow_data()
    for device in (pool.device, thin.device):
        info = device.info()
        assert (info.suspended, info.internal_suspend, info.inactive_table) == (False, False, False)
    below.reload(good, flush=False, lockfs=False)
    pool.deactivate()
    assert 'nr_data_blocks="1024"' in sh(f"thin_dump {below.path}")


def test_grow_load_fails(pool, backing):
    """The kernel will not take the new table: the old one stays live, and nothing is suspended."""
    backing[1].grow(MiB(96))
    before = pool.device.table()
    with pytest.raises(TaskError) as failure:
        pool.device.reload(Table.single(MiB(96), RawTarget("thin-pool", "240:7 240:8 128 0")))
    assert failure.value.operation == "load"
    assert pool.device.table() == before
    pool.grow_data()
    assert pool.status().total_data.count == 1536
