# SPDX-License-Identifier: MIT
"""
The limits of a pool from both sides, and its messages with what the kernel answers.

Where dmlib refuses by a rule, dmsetup is asked for the same thing: the rule must be the kernel's own.
"""

from __future__ import annotations

import shlex
import subprocess

import pytest

from dmlib import (
    ArgumentError,
    DataBlocks,
    DeviceBusyError,
    DeviceExistsError,
    DeviceNotFoundError,
    GiB,
    KiB,
    MetaBlocks,
    MiB,
    OutOfMetadataSpaceError,
    PoolNeedsCheckError,
    Sectors,
    StateError,
    ThinPool,
)
from dmlib.targets.thin import METADATA_MAX, METADATA_MIN

pytestmark = pytest.mark.once

U64_MAX = (1 << 64) - 1
ID_MAX = (1 << 24) - 1


def kernel_takes(table, name):
    """Whether dmsetup can make a device of *table*; it is removed again."""
    made = subprocess.run(
        ["dmsetup", "create", name, "--table", table], capture_output=True, text=True, check=False, timeout=60
    )
    if made.returncode == 0:
        subprocess.run(["dmsetup", "remove", name], check=True, timeout=60)
    return made.returncode == 0


def kernel_takes_message(pool, words):
    """Whether dmsetup can send a message."""
    command = ["dmsetup", "message", pool.name, "0", *shlex.split(words)]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


def first_block(loop):
    with loop.file.open("rb") as file:
        return file.read(4096)


def blank(loop):
    """Make a metadata device blank."""
    with loop.file.open("r+b") as file:
        file.write(bytes(4096))


class TestDataBlockSize:
    @pytest.mark.parametrize("size", [KiB(64), KiB(128), KiB(192), GiB(1) - KiB(64), GiB(1)])
    def test_good(self, loop_device, unique_name, sh, size):
        """The smallest, the largest and odd multiples of 64 KiB work; the superblock has the size."""
        metadata, data = loop_device(MiB(4)), loop_device(GiB(2))
        sizes = {"data_block_size": size, "zero_new_blocks": size < MiB(1)}  # not a GiB of zeros
        pool = ThinPool.create(unique_name(), metadata=metadata, data=data, **sizes)
        thin = pool.create_thin(0, GiB(1))
        with open(thin.path, "r+b", buffering=0) as device:
            device.write(b"x")
        assert pool.status().total_data == DataBlocks(GiB(2) // size)
        pool.deactivate()
        assert f'data_block_size="{size.count}"' in sh(f"thin_dump {metadata.path}")

    @pytest.mark.parametrize(
        "size", [Sectors(0), KiB(32), KiB(64) - Sectors(1), KiB(64) + Sectors(1), KiB(96), GiB(1) + KiB(64), GiB(2)]
    )
    def test_bad(self, loop_device, unique_name, size):
        """What is too small, too large or no multiple is refused by dmlib, as the kernel would; nothing is written."""
        metadata, data = loop_device(MiB(4)), loop_device(GiB(4))
        with pytest.raises(ArgumentError) as refusal:
            ThinPool.create(unique_name(), metadata=metadata, data=data, data_block_size=size)
        assert refusal.value.field == "data_block_size"
        assert not any(first_block(metadata))
        table = f"0 4194304 thin-pool {metadata.path} {data.path} {size.count} 0"
        assert not kernel_takes(table, unique_name())


class TestMetadataSize:
    def test_smallest(self, loop_device, unique_name):
        """The smallest metadata device carries a pool through a write, a snapshot and the breaking of its sharing."""
        metadata, data = loop_device(METADATA_MIN), loop_device(MiB(64))
        pool = ThinPool.create(unique_name(), metadata=metadata, data=data, data_block_size=KiB(64))
        thin = pool.create_thin(0, MiB(16))
        for thin_id in (1, None):
            with open(thin.path, "r+b", buffering=0) as device:
                device.write(bytes(4096))
            thin.status(flush=True)
            if thin_id:
                thin.snapshot(thin_id, activate=False)
        assert pool.status().needs_check is False
        assert pool.status().used_data == DataBlocks(2)
        pool.delete(1)
        pool.deactivate()

    def test_one_block_less(self, loop_device, unique_name, sh):
        """One block less is refused; the kernel starts such a pool, which breaks at its first write."""
        metadata, data = loop_device(METADATA_MIN - MetaBlocks(1).to_sectors()), loop_device(MiB(64))
        arguments = {"metadata": metadata, "data": data}
        with pytest.raises(ArgumentError, match="must be at least 68KiB"):
            ThinPool.create(unique_name(), **arguments, data_block_size=KiB(64))
        assert not any(first_block(metadata))
        name, thin = unique_name(), unique_name()
        sh(f"dmsetup create {name} --table '0 131072 thin-pool {metadata.path} {data.path} 128 0'")
        sh(f"dmsetup message {name} 0 'create_thin 0'")
        sh(f"dmsetup create {thin} --table '0 8192 thin /dev/mapper/{name} 0'")
        sh(f"dd if=/dev/zero of=/dev/mapper/{thin} bs=64k count=1 oflag=direct conv=fsync", check=False)
        assert "needs_check" in sh(f"dmsetup status {name}").split()
        sh(f"dmsetup remove {thin}")
        with pytest.raises(PoolNeedsCheckError):
            ThinPool.open(name).create_thin(1, MiB(1))
        sh(f"dmsetup remove {name}")

    @pytest.mark.parametrize("size", [KiB(4), KiB(28)])
    def test_refused_by_the_kernel(self, loop_device, unique_name, size):
        """Of much less, the kernel refuses to make a pool as well."""
        metadata, data = loop_device(size), loop_device(MiB(64))
        with pytest.raises(ArgumentError, match="must be at least"):
            ThinPool.create(unique_name(), metadata=metadata, data=data, data_block_size=KiB(64))
        assert not kernel_takes(f"0 131072 thin-pool {metadata.path} {data.path} 128 0", unique_name())

    @pytest.mark.parametrize("size", [KiB(68), KiB(80), KiB(96)])
    def test_too_small_for_the_data(self, loop_device, unique_name, size):
        """Enough for a small data device but not for 131072 blocks: refused, with the metadata blank again."""
        metadata, data = loop_device(size), loop_device(GiB(8))
        name = unique_name()
        with pytest.raises(OutOfMetadataSpaceError, match="too small for 131072 data blocks"):
            ThinPool.create(name, metadata=metadata, data=data, data_block_size=KiB(64))
        assert not any(first_block(metadata))
        pool = ThinPool.create(name, metadata=metadata, data=data, data_block_size=GiB(1))
        assert pool.status().total_data == DataBlocks(8)
        pool.deactivate()

    def test_largest(self, loop_device, unique_name):
        """Of a metadata device of 17 GiB the pool uses 15.88 GiB, and there is nothing left to grow into."""
        metadata, data = loop_device(GiB(17)), loop_device(MiB(64))
        pool = ThinPool.create(unique_name(), metadata=metadata, data=data, data_block_size=KiB(64))
        assert pool.status().total_metadata.to_sectors() == METADATA_MAX == MetaBlocks(4161600).to_sectors()
        with pytest.raises(ArgumentError, match="no more than the 4161600 metadata blocks in use"):
            pool.grow_metadata()
        pool.deactivate()


@pytest.mark.parametrize(("size", "blocks"), [(KiB(1023), 0), (MiB(1), 1), (MiB(2) - Sectors(1), 1), (MiB(2), 2)])
def test_data_in_whole_blocks(loop_device, unique_name, size, blocks):
    """The data device is used in whole blocks, and one without a whole block is refused."""
    arguments = {"metadata": loop_device(MiB(4)), "data": loop_device(size)}
    if not blocks:
        with pytest.raises(ArgumentError, match="smaller than one block") as refusal:
            ThinPool.create(unique_name(), **arguments, data_block_size=MiB(1))
        assert refusal.value.field == "data"
        return
    pool = ThinPool.create(unique_name(), **arguments, data_block_size=MiB(1))
    assert pool.status().total_data == DataBlocks(blocks)
    pool.deactivate()


class TestThinId:
    def test_both_ends(self, pool, sh):
        """Id 0 and id 16777215 are made, mapped and deleted."""
        for thin_id in (0, ID_MAX):
            thin = pool.create_thin(thin_id, MiB(1))
            assert sh(f"dmsetup table {thin.name}").split()[4] == str(thin_id)
            thin.deactivate()
            thin.delete()

    @pytest.mark.parametrize("bad", [-1, ID_MAX + 1, U64_MAX])
    def test_beyond(self, pool, bad):
        """An id on the far side is refused in every place that takes one, as the kernel would."""
        thin = pool.create_thin(1, MiB(1))
        for call in (
            lambda: pool.create_thin(bad, MiB(1)),
            lambda: pool.create_snap(bad, 1),
            lambda: pool.create_snap(2, bad),
            lambda: pool.delete(bad),
            lambda: pool.thin(bad, MiB(1)),
            lambda: pool.active(bad),
            lambda: thin.snapshot(bad),
        ):
            with pytest.raises(ArgumentError, match="24 bits"):
                call()
        assert not kernel_takes_message(pool, f"'create_thin {bad}'")

    @pytest.mark.parametrize("bad", ["1", 1.0, True, None])
    def test_not_a_number(self, pool, bad):
        """What is no whole number is a TypeError."""
        with pytest.raises(TypeError):
            pool.create_thin(bad, MiB(1))


class TestMessages:
    def test_create_twice(self, pool):
        """An id in use is refused, and what is there stays (EEXIST)."""
        pool.create_thin(5, MiB(1), activate=False)
        for call in (lambda: pool.create_thin(5, MiB(1)), lambda: pool.create_snap(5, 5)):
            with pytest.raises(DeviceExistsError, match=f"thin 5 of {pool.name}") as taken:
                call()
            assert taken.value.errno == 17
        pool.delete(5)

    def test_delete_unknown(self, pool):
        """An id that is not there cannot be deleted (ENODATA)."""
        with pytest.raises(DeviceNotFoundError, match=f"delete thin 5 of {pool.name}") as missing:
            pool.delete(5)
        assert missing.value.errno == 61

    def test_snap_of_unknown(self, pool):
        """A snapshot of an origin that is not there is refused, and its id stays free."""
        with pytest.raises(DeviceNotFoundError, match="origin 5"):
            pool.create_snap(6, 5)
        pool.create_thin(6, MiB(1), activate=False)

    def test_delete_active(self, pool, thin):
        """An active id is not deleted, and the error names the device that has it (EBUSY)."""
        with pytest.raises(DeviceBusyError, match=thin.name) as busy:
            pool.delete(0)
        assert busy.value.errno == 16
        thin.deactivate()
        pool.delete(0)

    def test_snap_of_active(self, pool, thin):
        """The message alone refuses an active origin unless it is suspended, or the caller vouches for it."""
        with pytest.raises(StateError, match=f"is active as {thin.name} and not suspended"):
            pool.create_snap(1, 0)
        with thin.device.suspended():
            pool.create_snap(1, 0)
        pool.create_snap(2, 0, origin_may_be_active=True)
        thin.deactivate()
        pool.create_snap(3, 1)
        for thin_id in (0, 1, 2, 3):
            pool.delete(thin_id)

    def test_pool_suspended(self, pool):
        """Messages work while the pool is suspended, and it stays suspended."""
        with pool.device.suspended(flush=False):
            pool.create_thin(0, MiB(1), activate=False)
            pool.set_transaction_id(0, 1)
            pool.delete(0)
            assert pool.device.info().suspended
        assert pool.status().transaction_id == 1


class TestTransactionId:
    def test_compare_and_swap(self, pool, sh):
        """The id moves from what it is to any other, down too, up to 2^64-1; from anything else it does not move."""
        now = 0
        for new in (1, 7, 3, U64_MAX, U64_MAX - 1, 0):
            with pytest.raises(StateError, match=f"has transaction id {now}, not {now + 1 if now < U64_MAX else 0}"):
                pool.set_transaction_id(now + 1 if now < U64_MAX else 0, new)
            pool.set_transaction_id(now, new)
            assert sh(f"dmsetup status {pool.name}").split()[3] == str(new)
            now = new

    def test_on_disk(self, pool, backing, loop_device, sh):
        """When the call returns, the id is on the metadata device."""
        pool.set_transaction_id(0, U64_MAX)
        copy = loop_device(MiB(4))
        copy.file.write_bytes(backing[0].file.read_bytes())
        assert f'transaction="{U64_MAX}"' in sh(f"thin_dump {copy.path}")

    @pytest.mark.parametrize(("field", "pair"), [("current", (-1, 1)), ("new", (0, 1 << 64)), ("new", (0, -1))])
    def test_beyond(self, pool, field, pair):
        """What does not fit 64 bits is refused."""
        with pytest.raises(ArgumentError, match="64 bits") as refusal:
            pool.set_transaction_id(*pair)
        assert refusal.value.field == field
        assert pool.status().transaction_id == 0
