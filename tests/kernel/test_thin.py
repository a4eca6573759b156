# SPDX-License-Identifier: MIT
"""Thin devices: made, opened, mapped, resized, trimmed, deleted, and what a write costs."""

from __future__ import annotations

import os
import time

import pytest

from dmlib import (
    ArgumentError,
    DataBlocks,
    DeviceBusyError,
    DeviceExistsError,
    DeviceNotFoundError,
    KiB,
    MiB,
    Sectors,
    StateError,
    TargetRefusedError,
    ThinDevice,
)


def write(path, content, offset=0):
    """Write straight to the device, past the page cache's habit of whole pages."""
    with open(path, "r+b", buffering=0) as device:
        os.pwrite(device.fileno(), content, offset)
        os.fsync(device.fileno())


def read(path, size, offset=0):
    with open(path, "rb", buffering=0) as device:
        os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(device.fileno(), size, offset)


def used(pool):
    return pool.status(flush=True).used_data.count


class TestLife:
    def test_create(self, pool, sh):
        """A new thin device is there under its name, as large as asked for, empty, with a uuid of dmlib's."""
        thin = pool.create_thin(5, "100MiB", name="dmlib-test-other-name")
        assert thin.path == "/dev/mapper/dmlib-test-other-name"
        assert sh(f"blockdev --getsz {thin.path}").strip() == str(MiB(100).count)
        assert sh(f"dmsetup table {thin.name}").split() == f"0 204800 thin {pool.number} 5".split()
        assert sh(f"dmsetup info -c --noheadings -o uuid {thin.name}").strip() == thin.uuid
        assert thin.uuid == f"DMLIB-{pool.metadata_device}-thin-5"
        assert (thin.status().mapped, thin.status().highest_mapped) == (Sectors(0), None)
        assert read(thin.path, 4096) == bytes(4096)

    def test_id_alone(self, pool, sh):
        """Without activation only the id is made; it can be activated later."""
        thin = pool.create_thin(5, MiB(1), activate=False)
        assert thin.active() is None
        assert thin.name not in sh("dmsetup ls").split()
        thin.activate()
        assert thin.active().name == thin.name

    def test_data_outlives_deactivation(self, pool, thin):
        """What was written is there after deactivation and activation, under another name too."""
        write(thin.path, b"kept" * 256, 65536)
        thin.deactivate()
        other = pool.thin(0, MiB(32), name="dmlib-test-other-name")
        other.activate()
        assert read(other.path, 1024, 65536) == b"kept" * 256

    def test_open(self, pool, thin):
        """An active thin device is opened by its name, with id, size and pool read from its table."""
        opened = ThinDevice.open(thin.name)
        assert (opened.thin_id, opened.size, opened.pool.name) == (0, MiB(32), pool.name)
        assert opened.external_origin is None
        opened.snapshot(1, activate=False)

    def test_open_another_kind(self, pool, linear_device, unique_name):
        """What is no thin device is not opened as one."""
        for name in (linear_device.name, pool.name):
            with pytest.raises(StateError, match="is not an active thin device"):
                ThinDevice.open(name)
        with pytest.raises(DeviceNotFoundError):
            ThinDevice.open(unique_name())

    def test_delete(self, pool, thin):
        """Deleting gives the blocks back, and the id is free for a new, empty device."""
        write(thin.path, bytes(1 << 20))
        assert used(pool) == 16
        thin.deactivate()
        thin.delete()
        assert used(pool) == 0
        again = pool.create_thin(0, MiB(1))
        assert again.status().mapped == Sectors(0)

    def test_delete_active(self, thin):
        """An active device is not deleted; the error names it, and its data stays."""
        write(thin.path, b"stays")
        with pytest.raises(DeviceBusyError, match=f"in use: the active device {thin.name}"):
            thin.delete()
        assert read(thin.path, 5) == b"stays"

    def test_id_reuse(self, pool, thin):
        """An id in use is refused, and the device that has it is as before."""
        write(thin.path, b"stays")
        with pytest.raises(DeviceExistsError):
            pool.create_thin(0, MiB(1), name="dmlib-test-other-name")
        assert read(thin.path, 5) == b"stays"

    @pytest.mark.parametrize(("size", "error"), [(Sectors(0), ArgumentError), (0, TypeError), (4096, TypeError)])
    def test_no_size(self, pool, size, error):
        """No size, or a number without a unit, is refused before the id is made."""
        with pytest.raises(error):
            pool.create_thin(0, size)
        with pytest.raises(DeviceNotFoundError):
            pool.delete(0)

    def test_unknown_id(self, pool):
        """An id that the pool does not have is not activated, and no device is left."""
        thin = pool.thin(9, MiB(1))
        with pytest.raises(TargetRefusedError) as refusal:
            thin.activate()
        assert refusal.value.errno == 61
        assert not thin.device.exists()

    def test_in_suspended_pool(self, pool):
        """In a suspended pool nothing is activated, and no device is left."""
        other = pool.create_thin(1, MiB(1), activate=False)
        with pool.device.suspended(flush=False), pytest.raises(TargetRefusedError):
            other.activate()
        assert not other.device.exists()
        other.activate()


class TestDeactivate:
    def test_deferred(self, thin, sh):
        """A device in use goes with its last user when that is asked for; until then it works."""
        with open(thin.path, "r+b", buffering=0) as user:
            thin.deactivate(deferred=True)
            assert thin.device.info().deferred_remove
            assert user.write(b"x") == 1
            os.fsync(user.fileno())
        deadline = time.monotonic() + 3
        while thin.name in sh("dmsetup ls").split():
            assert time.monotonic() < deadline, "still there after its last user"
        thin.activate()
        assert read(thin.path, 1) == b"x"

    def test_busy(self, thin):
        """A device in use is not removed, and the error says who has it open."""
        with open(thin.path, "rb"), pytest.raises(DeviceBusyError) as busy:
            thin.deactivate(timeout=0)
        assert any(str(os.getpid()) in user for user in busy.value.users)
        assert thin.device.exists()

    def test_twice(self, thin):
        """What is not active cannot be deactivated."""
        thin.deactivate()
        with pytest.raises(DeviceNotFoundError):
            thin.deactivate()

    def test_another_device_of_that_name(self, pool, linear_device):
        """A device that has the name but is not that thin device stays."""
        pool.create_thin(1, MiB(1), activate=False)
        with pytest.raises(StateError, match="is not thin 1"):
            pool.thin(1, MiB(1), name=linear_device.name).deactivate()
        assert linear_device.exists()


class TestResize:
    def test_grow_in_use(self, thin, sh):
        """A device grows while it is open, and takes writes beyond its old end."""
        with open(thin.path, "r+b", buffering=0):
            thin.resize("48MiB")
            assert sh(f"blockdev --getsz {thin.path}").strip() == str(MiB(48).count)
        write(thin.path, b"new", MiB(40).bytes)
        assert thin.size == MiB(48)
        assert not thin.device.info().suspended

    def test_shrink_only_when_named(self, thin, sh):
        """A smaller size needs shrink=True."""
        with pytest.raises(ArgumentError, match="shrink=True"):
            thin.resize(MiB(31))
        assert sh(f"blockdev --getsz {thin.path}").strip() == str(MiB(32).count)
        thin.resize(MiB(16), shrink=True)
        assert sh(f"blockdev --getsz {thin.path}").strip() == str(MiB(16).count)

    def test_stale_object(self, pool, thin, sh):
        """What counts is the size that the device has, not the one that an older object remembers."""
        stale = pool.thin(0, MiB(16), name=thin.name)
        thin.resize(MiB(64))
        with pytest.raises(ArgumentError, match="is less than 64MiB"):
            stale.resize(MiB(48))
        assert sh(f"blockdev --getsz {thin.path}").strip() == str(MiB(64).count)

    def test_inactive(self, pool, sh):
        """An inactive device has its new size from its next activation on."""
        thin = pool.create_thin(1, MiB(4), activate=False)
        thin.resize(MiB(8))
        thin.activate()
        assert sh(f"blockdev --getsz {thin.path}").strip() == str(MiB(8).count)

    def test_zero(self, thin):
        """Size zero is refused, also as a shrink."""
        with pytest.raises(ArgumentError, match="must not be zero"):
            thin.resize(Sectors(0), shrink=True)

    def test_suspended(self, thin):
        """A device that somebody suspended is left alone."""
        with thin.device.suspended():
            with pytest.raises(StateError, match="is suspended"):
                thin.resize(MiB(64))
            assert thin.device.info().suspended
        assert thin.size == MiB(32)


class TestExternalOrigin:
    @pytest.fixture
    def origin(self, loop_device):
        loop = loop_device(MiB(2))
        write(loop.path, b"golden" * 1000)
        return loop

    def test_read_through(self, pool, origin, sh):
        """What was not written is read from the origin; a write goes to the pool and leaves the origin alone."""
        thin = pool.create_thin(1, MiB(4), external_origin=origin)
        assert sh(f"dmsetup table {thin.name}").split()[5] == str(origin.number)
        assert read(thin.path, 6000) == b"golden" * 1000
        assert read(thin.path, 512, MiB(3).bytes) == bytes(512)
        assert thin.status().mapped == Sectors(0)
        write(thin.path, b"silver")
        assert read(thin.path, 12) == b"silvergolden"
        assert read(origin.path, 12) == b"goldengolden"
        assert thin.status(flush=True).mapped == KiB(64)

    def test_descendants(self, pool, origin):
        """A snapshot reads through to it as well, and so does the device when it grows or is opened by name."""
        thin = pool.create_thin(1, MiB(1), external_origin=origin)
        snap = thin.snapshot(2)
        assert read(snap.path, 6) == b"golden"
        opened = ThinDevice.open(thin.name)
        assert opened.external_origin == origin.number
        pool.thin(1, MiB(1), name=thin.name).resize(MiB(2))
        assert read(thin.path, 6) == b"golden"

    def test_pool_as_origin(self, pool):
        """The pool itself is refused as origin, and no id is left."""
        with pytest.raises(ArgumentError, match="must not be the pool"):
            pool.create_thin(1, MiB(1), external_origin=pool.device)
        with pytest.raises(DeviceNotFoundError):
            pool.delete(1)


class TestCost:
    """What a write costs, in blocks of 64 KiB."""

    @pytest.mark.parametrize(
        ("offset", "size", "blocks"),
        [
            (KiB(0), 1, 1),
            (KiB(640), 56 << 10, 1),
            (KiB(4), 64 << 10, 2),
            (KiB(0), 64 << 10, 1),
            (KiB(0), 1 << 20, 16),
            (KiB(60), 8 << 10, 2),
        ],
    )
    def test_of_a_write(self, pool, thin, offset, size, blocks):
        """A write takes each block that it touches, whole."""
        write(thin.path, b"x" * size, offset.bytes)
        assert used(pool) == blocks
        assert thin.status(flush=True).mapped == KiB(64) * blocks
        write(thin.path, b"y" * size, offset.bytes)
        assert used(pool) == blocks

    @pytest.mark.parametrize(
        ("offset", "size", "blocks"),
        [(KiB(64), 512, 1), (KiB(64), 32 << 10, 1), (KiB(112), 32 << 10, 2), (KiB(124), 8 << 10, 2)],
    )
    def test_after_a_snapshot(self, pool, thin, offset, size, blocks):
        """After a snapshot, a change copies each block that it touches, once."""
        write(thin.path, b"x" * (1 << 20))
        snap = thin.snapshot(1)
        assert used(pool) == 16
        for _ in range(2):
            write(thin.path, b"y" * size, offset.bytes)
            assert used(pool) == 16 + blocks
        assert read(snap.path, 1 << 20) == b"x" * (1 << 20)

    def test_discard_gives_back(self, pool, thin, sh):
        """A discard of whole blocks frees them; of less than a block, or of blocks that a snapshot shares, nothing."""
        write(thin.path, b"x" * (1 << 20))
        sh(f"blkdiscard -o 0 -l 32768 {thin.path}")
        assert used(pool) == 16
        sh(f"blkdiscard -o 0 -l 524288 {thin.path}")
        assert used(pool) == 8
        assert read(thin.path, 4096) == bytes(4096)
        thin.snapshot(1, activate=False)
        sh(f"blkdiscard {thin.path}")
        assert used(pool) == 8
        assert thin.status(flush=True).mapped == Sectors(0)
        pool.delete(1)
        assert pool.status(flush=True).used_data == DataBlocks(0)
