# SPDX-License-Identifier: MIT
"""The fixtures that the pytest plugin has for everybody."""

import os

import pytest

from dmlib import Device, KiB, LoopDevice, MiB, Sectors, ThinPool
from kernel_kit import sectors_of, tool

pytestmark = pytest.mark.once


def test_sparse_file(sparse_file):
    """Files are as large as asked for, take no room, and are all different."""
    first, second = sparse_file("4MiB"), sparse_file(MiB(8))
    assert first != second
    assert [path.stat().st_size for path in (first, second)] == [4 << 20, 8 << 20]
    assert second.stat().st_blocks * 512 <= 4096


def test_loop_device(loop_device):
    """A loop device has its file's size, and grows with it."""
    loop = loop_device("4MiB")
    assert sectors_of(loop.device) == MiB(4)
    loop.grow("6MiB")
    assert sectors_of(loop.device) == MiB(6)
    assert os.stat(loop).st_rdev == os.makedev(*loop.number)


def test_ram_disk(ram_disk):
    """A disk in memory holds what is written, over a file that nobody else can find."""
    disk = ram_disk("1MiB")
    with open(disk.path, "r+b") as file:
        file.write(b"content")
    with open(disk.path, "rb") as file:
        assert file.read(7) == b"content"
    status = disk.status()
    assert status.deleted
    assert os.path.dirname(status.backing_file) == "/dev/shm"  # noqa: S108 - where memory is


def test_devices(linear_device, thin_pool, thin_device, unique_name):
    """Devices are there and what their names say."""
    assert isinstance(linear_device, Device)
    assert tool("dmsetup", "table", linear_device.name).split()[2] == "linear"
    assert isinstance(thin_pool, ThinPool)
    assert (thin_pool.data_block_size, thin_pool.status().total_data.count) == (KiB(64), 1024)
    assert thin_device.pool is thin_pool
    assert thin_device.status().mapped == Sectors(0)
    assert unique_name() != unique_name()


def test_what_a_test_detaches_itself(loop_device):
    """A loop device that the test has detached is no trouble for the fixture."""
    loop = loop_device("1MiB")
    LoopDevice(loop.path).detach()
