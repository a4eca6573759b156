# SPDX-License-Identifier: MIT
"""Thin pools: made, refused, started again, taken down, asked, told. The oracles are dmsetup and checksums."""

from __future__ import annotations

import hashlib
import os
import re

import pytest

from dmlib import (
    ArgumentError,
    DataBlocks,
    Device,
    DeviceBusyError,
    DeviceExistsError,
    DeviceNotFoundError,
    DiscardMode,
    KiB,
    Linear,
    MiB,
    PoolMode,
    PoolReadOnlyError,
    Sectors,
    StateError,
    Table,
    ThinDevice,
    ThinPool,
    list_devices,
)


def digest(loop):
    """Checksum of what is on the file below a loop device."""
    os.sync()
    return hashlib.sha256(loop.file.read_bytes()).hexdigest()


def write(path, content, offset=0):
    """Write through the page cache, down to the device."""
    with open(path, "r+b", buffering=0) as device:
        device.seek(offset)
        device.write(content)
        os.fsync(device.fileno())


def superblock_state(loop):
    """First 4 KiB of a metadata device, as on disk."""
    with loop.file.open("rb") as file:
        return file.read(4096)


@pytest.fixture
def devices(loop_device):
    """Metadata of 4 MiB and data of 64 MiB, blank."""
    return {"metadata": loop_device(MiB(4)), "data": loop_device(MiB(64))}


class TestCreate:
    def test_on_blank_devices(self, devices, unique_name, sh):
        """A new pool has the table that was asked for, all blocks free, and a uuid of dmlib's."""
        pool = ThinPool.create(unique_name(), **devices, data_block_size=KiB(64))
        metadata, data = devices["metadata"].number, devices["data"].number
        assert sh(f"dmsetup table {pool.name}").split() == f"0 131072 thin-pool {metadata} {data} 128 0 0".split()
        assert sh(f"dmsetup info -c --noheadings -o uuid {pool.name}").strip() == f"DMLIB-{metadata}-pool"
        status = pool.status()
        assert (status.mode, status.transaction_id, status.needs_check) == (PoolMode.READ_WRITE, 0, False)
        assert (status.used_data, status.total_data) == (DataBlocks(0), DataBlocks(1024))
        assert pool.data_block_size == KiB(64)
        pool.deactivate()
        sh(f"thin_check {devices['metadata'].path}")

    def test_refuses_data(self, devices, unique_name):
        """A metadata device with data on it is refused without format=True, and nothing on it changes."""
        write(devices["metadata"].path, b"precious", 512)
        before = digest(devices["metadata"])
        with pytest.raises(ArgumentError, match="holds data; format=True erases it") as refusal:
            ThinPool.create(unique_name(), **devices, data_block_size=KiB(64))
        assert refusal.value.field == "metadata"
        assert digest(devices["metadata"]) == before

    def test_refuses_a_pool(self, devices, unique_name):
        """Metadata of a pool is refused without format=True, and the pool is whole afterwards."""
        pool = ThinPool.create(unique_name(), **devices, data_block_size=KiB(64))
        pool.create_thin(7, MiB(8), activate=False)
        pool.deactivate()
        before = digest(devices["metadata"])
        with pytest.raises(ArgumentError, match=r"holds a thin pool \(start it with ThinPool.activate\)"):
            ThinPool.create(unique_name(), **devices, data_block_size=KiB(128))
        assert digest(devices["metadata"]) == before

    def test_format_erases(self, devices, unique_name, sh):
        """With format=True a pool makes way for a new one of another block size, without the old thin ids."""
        old = ThinPool.create(unique_name(), **devices, data_block_size=KiB(64))
        old.create_thin(7, MiB(8), activate=False)
        old.set_transaction_id(0, 5)
        old.deactivate()
        new = ThinPool.create(unique_name(), **devices, data_block_size=KiB(128), format=True)
        assert new.data_block_size == KiB(128)
        assert new.status().transaction_id == 0
        with pytest.raises(DeviceNotFoundError):
            new.delete(7)
        new.deactivate()
        assert 'data_block_size="256"' in sh(f"thin_dump {devices['metadata'].path}")

    @pytest.mark.parametrize("which", ["metadata", "data"])
    def test_claimed_device(self, devices, unique_name, which):
        """A device that is mapped by somebody is refused as busy, and the metadata stays blank."""
        table = Table.single(MiB(1), Linear(devices[which].number, Sectors(0)))
        holder = Device.create(unique_name(), table)
        with pytest.raises(DeviceBusyError):
            ThinPool.create(unique_name(), **devices, data_block_size=KiB(64))
        assert not any(superblock_state(devices["metadata"]))
        holder.remove()

    def test_read_only_is_refused(self, devices, unique_name):
        """A new pool cannot be read-only, and is refused before anything is written."""
        with pytest.raises(ArgumentError, match="has to be written"):
            ThinPool.create(unique_name(), **devices, data_block_size=KiB(64), read_only=True)
        assert not any(superblock_state(devices["metadata"]))

    @pytest.mark.parametrize("field", ["metadata", "data"])
    def test_not_a_block_device(self, devices, unique_name, tmp_path, field):
        """A regular file where a block device is wanted is refused, by the name of its argument."""
        (tmp_path / "file").write_bytes(bytes(1 << 20))
        with pytest.raises(ArgumentError, match="must be a block device") as refusal:
            ThinPool.create(unique_name(), **{**devices, field: tmp_path / "file"}, data_block_size=KiB(64))
        assert refusal.value.field == field


class TestActivate:
    def test_again(self, pool, unique_name, backing):
        """A pool that was taken down starts with the block size, thin ids and transaction id that it had."""
        pool.create_thin(3, MiB(8), activate=False)
        pool.set_transaction_id(0, 11)
        pool.deactivate()
        again = ThinPool.activate(unique_name(), metadata=backing[0], data=backing[1])
        assert again.data_block_size == KiB(64)
        assert again.status().transaction_id == 11
        again.delete(3)
        again.deactivate()

    def test_after_reboot(self, devices, unique_name, sh):
        """On other loop devices over the same files, as after a reboot, the data of a thin device is there."""
        pool = ThinPool.create(unique_name(), **devices, data_block_size=KiB(192))
        thin = pool.create_thin(1, MiB(8))
        write(thin.path, b"kept" * 1024, 12345 * 512)
        pool.deactivate()
        others = [sh(f"losetup -f --show {loop.file}").strip() for loop in devices.values()]
        pool = ThinPool.activate(unique_name(), metadata=others[0], data=others[1])
        assert pool.data_block_size == KiB(192)
        thin = pool.thin(1, MiB(8))
        thin.activate()
        with open(thin.path, "rb") as device:
            device.seek(12345 * 512)
            assert device.read(4096) == b"kept" * 1024
        pool.deactivate()
        for path in others:
            sh(f"losetup -d {path}")

    def test_blank_is_refused(self, devices, unique_name):
        """Starting a pool on blank metadata is refused (the kernel would format it), and it stays blank."""
        with pytest.raises(ArgumentError, match="holds no thin pool"):
            ThinPool.activate(unique_name(), **devices)
        assert not any(devices["metadata"].file.read_bytes())

    def test_running_pool_is_busy(self, pool, unique_name, backing):
        """A pool that runs already is not started twice: its metadata device is busy."""
        with pytest.raises(DeviceBusyError):
            ThinPool.activate(unique_name(), metadata=backing[0], data=backing[1])
        assert pool.status().mode is PoolMode.READ_WRITE

    def test_name_taken(self, pool, backing, linear_device):
        """A name that another device has is refused, and that device keeps its table."""
        pool.deactivate()
        table = linear_device.table()
        with pytest.raises(DeviceExistsError):
            ThinPool.activate(linear_device.name, metadata=backing[0], data=backing[1])
        assert linear_device.table() == table


class TestOpen:
    def test_made_by_dmsetup(self, devices, unique_name, sh):
        """A pool that dmsetup made is opened by its name, and works as one that dmlib made."""
        name = unique_name()
        metadata, data = devices["metadata"], devices["data"]
        sh(f"dmsetup create {name} --table '0 131072 thin-pool {metadata.path} {data.path} 128 4 1 error_if_no_space'")
        pool = ThinPool.open(name)
        assert (pool.metadata_device, pool.data_device) == (metadata.number, data.number)
        assert pool.target().error_if_no_space
        thin = pool.create_thin(0, MiB(1))
        assert sh(f"dmsetup table {thin.name}").split()[2:] == ["thin", str(pool.number), "0"]
        pool.deactivate()

    def test_not_a_pool(self, linear_device):
        """Another kind of device is not a pool."""
        with pytest.raises(StateError, match="is not a live thin pool"):
            ThinPool.open(linear_device.name)

    def test_absent(self, unique_name):
        """A name that nobody has is not found."""
        with pytest.raises(DeviceNotFoundError):
            ThinPool.open(unique_name())


class TestTemporary:
    def test_takes_all_down(self, devices):
        """At the end of the block the pool and its thin devices are gone."""
        with ThinPool.temporary(**devices, data_block_size=KiB(64)) as pool:
            thins = [pool.create_thin(i, MiB(4)) for i in range(3)]
            assert all(thin.device.exists() for thin in thins)
        assert not {device.name for device in list_devices()} & {pool.name, *(thin.name for thin in thins)}

    def test_also_after_an_exception(self, devices, sh):
        """An exception passes through unchanged, and the pool is gone."""
        made = []

        def body():
            with ThinPool.temporary(**devices, data_block_size=KiB(64)) as pool:
                made.append(pool.create_thin(0, MiB(4)))
                raise RuntimeError("of the body")

        with pytest.raises(RuntimeError, match="of the body"):
            body()
        assert made
        assert made[0].pool.name not in sh("dmsetup ls")

    def test_taken_down_by_the_body(self, devices):
        """A block that takes its pool down itself ends well."""
        with ThinPool.temporary(**devices, data_block_size=KiB(64)) as pool:
            pool.deactivate()
        assert not pool.device.exists()


class TestDeactivate:
    def test_refused_as_a_whole(self, pool, sh):
        """While one thin device is open, none is removed; the error says which, and it works once it is closed."""
        thins = [pool.create_thin(i, MiB(4)) for i in range(3)]
        with open(thins[1].path, "rb"), pytest.raises(DeviceBusyError) as busy:
            pool.deactivate(timeout=0.1)
        assert busy.value.device == thins[1].name
        names = sh("dmsetup ls").split()
        assert all(thin.name in names for thin in thins)
        pool.deactivate()
        assert pool.name not in sh("dmsetup ls").split()

    def test_refused_while_mounted(self, pool, thin, sh, tmp_path):
        """A mounted thin device keeps the pool up."""
        sh(f"mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 {thin.path}")
        sh(f"mount {thin.path} {tmp_path}")
        with pytest.raises(DeviceBusyError):
            pool.deactivate(timeout=0.1)
        (tmp_path / "file").write_text("still works", encoding="utf-8")
        sh(f"umount {tmp_path}")

    def test_foreign_device_on_it(self, pool, thin, unique_name, sh):
        """A device of another program on the pool keeps everything up, and is named."""
        pool.create_thin(1, MiB(4), activate=False)
        other = unique_name()
        sh(f"dmsetup create {other} --table '0 8192 thin {pool.device.path} 1'")
        with pytest.raises(DeviceBusyError, match=other):
            pool.deactivate(timeout=0.1)
        assert thin.device.exists()
        sh(f"dmsetup remove {other}")

    def test_absent(self, pool):
        """A pool that is not there cannot be taken down."""
        pool.deactivate()
        with pytest.raises(DeviceNotFoundError):
            pool.deactivate()


FEATURES = {
    "zero_new_blocks": (False, "skip_block_zeroing"),
    "discard": (False, "ignore_discard"),
    "discard_passdown": (False, "no_discard_passdown"),
    "error_if_no_space": (True, "error_if_no_space"),
}


@pytest.mark.parametrize("argument", FEATURES)
def test_feature_arrives(devices, unique_name, sh, argument):
    """A feature that is asked for is in the table that dmsetup shows, alone, at creation and at activation."""
    value, word = FEATURES[argument]
    name = unique_name()
    pool = ThinPool.create(name, **devices, data_block_size=KiB(64), **{argument: value})
    assert sh(f"dmsetup table {name}").split()[7:] == ["1", word]
    pool.deactivate()
    pool = ThinPool.activate(name, **devices, **{argument: value}, low_water_mark=DataBlocks(77))
    assert sh(f"dmsetup table {name}").split()[6:] == ["77", "1", word]
    pool.deactivate()


def test_read_only_activation(pool, backing, unique_name, sh):
    """A pool started read-only shows its ids and takes no change."""
    pool.create_thin(0, MiB(4), activate=False)
    pool.deactivate()
    pool = ThinPool.activate(unique_name(), metadata=backing[0], data=backing[1], read_only=True)
    assert sh(f"dmsetup table {pool.name}").split()[7:] == ["1", "read_only"]
    with pytest.raises(PoolReadOnlyError):
        pool.create_thin(1, MiB(4))
    thin = pool.thin(0, MiB(4))
    thin.activate()
    thin.deactivate()
    pool.deactivate()


def test_reconfigure(pool, thin, sh):
    """Mark and features of a pool in use change as named, the others stay, and nothing is left suspended."""
    changes = [
        ({"low_water_mark": DataBlocks(9)}, "9 0"),
        ({"zero_new_blocks": False}, "9 1 skip_block_zeroing"),
        ({"error_if_no_space": True}, "9 2 skip_block_zeroing error_if_no_space"),
        ({"discard_passdown": False}, "9 3 skip_block_zeroing no_discard_passdown error_if_no_space"),
        ({"read_only": True, "zero_new_blocks": True}, "9 3 no_discard_passdown read_only error_if_no_space"),
        ({"read_only": False, "error_if_no_space": False, "discard_passdown": True}, "9 0"),
    ]
    for change, words in changes:
        pool.reconfigure(**change)
        assert sh(f"dmsetup table {pool.name}").split()[6:] == words.split()
        status = pool.status()
        assert status.mode is (PoolMode.READ_ONLY if change.get("read_only") else PoolMode.READ_WRITE)
        assert status.error_if_no_space == ("error_if_no_space" in words)
        assert status.discard is (DiscardMode.NO_PASSDOWN if "no_discard" in words else DiscardMode.PASSDOWN)
    assert "suspended" not in sh(f"dmsetup info -c --noheadings -o suspended {pool.name}").lower().split()
    write(thin.path, b"x")


def test_status_is_what_dmsetup_says(pool, thin, sh):
    """The figures are those of dmsetup's line, after writes, a held metadata snapshot and a new transaction id."""
    write(thin.path, bytes(300_000), 65536)
    pool.set_transaction_id(0, 42)
    sh(f"dmsetup message {pool.name} 0 reserve_metadata_snap")
    line = sh(f"dmsetup status --noflush {pool.name}")
    status = pool.status()
    assert status.raw.strip() == line.split("thin-pool")[1].strip()
    words = line.split()[3:]
    assert words[:4] == [
        str(status.transaction_id),
        f"{status.used_metadata.count}/{status.total_metadata.count}",
        f"{status.used_data.count}/{status.total_data.count}",
        str(status.held_metadata_root),
    ]
    assert (status.transaction_id, status.used_data) == (42, DataBlocks(5))
    sh(f"dmsetup message {pool.name} 0 release_metadata_snap")
    assert pool.status().held_metadata_root is None


def test_low_water_event(pool, thin, sh):
    """Crossing the low-water mark raises the pool's event counter by one, once."""
    pool.reconfigure(low_water_mark=DataBlocks(1000))
    before = pool.device.info().event_nr
    write(thin.path, bytes(65536 * 23))
    assert pool.device.info().event_nr == before
    write(thin.path, bytes(65536 * 3), 65536 * 23)
    sh(f"dmsetup wait --noflush {pool.name} {before}")
    assert pool.device.info().event_nr == before + 1
    assert re.search(rf"Event number: +{before + 1}\n", sh(f"dmsetup info {pool.name}"))
    assert ThinDevice.open(thin.name).status().mapped == KiB(64) * 26
