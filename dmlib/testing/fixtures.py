# SPDX-License-Identifier: MIT
"""
Fixtures for tests that need a device mapper, smallest first; all that they make is taken down after the test.

Those named after one device are that device; those that are asked for more than one are functions that make them.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest

import dmlib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_SETTLING: Final = 5.0
_MEMORY: Final = "/dev/shm"  # noqa: S108 - a file of ours with a random name


@pytest.fixture(autouse=True)
def dm_leak_check(request: pytest.FixtureRequest) -> Iterator[None]:
    """
    Fail a marked test that leaves something behind, and remove it.

    Looked at are mapped devices, their nodes, loop devices, semaphores, mounts, and this process's descriptors and
    threads.
    """
    if request.node.get_closest_marker("needs_device_mapper") is None:
        yield
        return
    from dmlib.testing.world import Leftovers  # noqa: PLC0415 - only where there is a device mapper

    before = Leftovers.now()
    yield
    deadline = time.monotonic() + _SETTLING
    while (left := Leftovers.now().beyond(before)) and time.monotonic() < deadline:
        time.sleep(0.05)  # a deferred removal, an autoclear and a closing thread take a moment
    Leftovers.remove(left)
    if left:
        pytest.fail(f"left behind: {left}", pytrace=False)


@dataclass(frozen=True)
class LoopFile:
    """
    A loop device and its file; serves as the path of the device.

    Attributes:
        device: The loop device.
        file: The sparse file below it.
    """

    device: dmlib.LoopDevice
    file: Path

    def __fspath__(self) -> str:
        return self.path

    @property
    def path(self) -> str:
        """Path of the loop device."""
        return self.device.path

    @property
    def number(self) -> dmlib.DeviceNumber:
        """Its number."""
        return self.device.number

    def grow(self, size: dmlib.Size) -> None:
        """Make file and device larger."""
        dmlib.grow_sparse_file(self.file, size)
        self.device.refresh_size()


@pytest.fixture
def sparse_file(tmp_path: Path) -> Callable[[dmlib.Size], Path]:
    """Make sparse files: ``sparse_file("4MiB")`` returns the path of a new one."""

    def make(size: dmlib.Size) -> Path:
        path = tmp_path / f"sparse-{len(list(tmp_path.iterdir()))}"
        dmlib.create_sparse_file(path, size)
        return path

    return make


@pytest.fixture
def loop_device(sparse_file: Callable[[dmlib.Size], Path]) -> Iterator[Callable[[dmlib.Size], LoopFile]]:
    """Make loop devices over sparse files: ``loop_device("4MiB")`` returns a :class:`LoopFile`."""
    made: list[LoopFile] = []

    def make(size: dmlib.Size) -> LoopFile:
        file = sparse_file(size)
        made.append(LoopFile(dmlib.LoopDevice.attach(file), file))
        return made[-1]

    yield make
    for loop in reversed(made):
        if loop.device.exists():
            loop.device.detach(lazy=True)  # a device over it may be removed by a later finaliser


@pytest.fixture
def ram_disk() -> Iterator[Callable[[dmlib.Size], dmlib.LoopDevice]]:
    """Make block devices in memory: ``ram_disk("64MiB")`` returns a loop device over a file without a name."""
    made: list[dmlib.LoopDevice] = []

    def make(size: dmlib.Size) -> dmlib.LoopDevice:
        path = f"{_MEMORY}/dmlib-{secrets.token_hex(8)}"
        dmlib.create_sparse_file(path, size)
        try:
            made.append(dmlib.LoopDevice.attach(path))
        finally:
            os.unlink(path)
        return made[-1]

    yield make
    for loop in reversed(made):
        if loop.exists():
            loop.detach(lazy=True)


@pytest.fixture
def unique_name() -> Iterator[Callable[..., str]]:
    """Make names that no other device has: ``unique_name()``; a device that is left under one is removed."""
    made: list[str] = []
    stem = f"dmlib-test-{secrets.token_hex(4)}"

    def make(suffix: str = "") -> str:
        made.append(f"{stem}-{len(made)}{suffix}")
        return made[-1]

    yield make
    there = {device.name for device in dmlib.list_devices()}
    for name in reversed(made):
        if name in there:
            dmlib.Device(name).remove()


@pytest.fixture
def linear_device(
    loop_device: Callable[[dmlib.Size], LoopFile], unique_name: Callable[..., str]
) -> Iterator[dmlib.Device]:
    """A linear device of 4 MiB over a loop device."""
    size = dmlib.MiB(4)
    device = dmlib.Device.create(unique_name(), dmlib.Table.single(size, dmlib.Linear(loop_device(size).number)))
    yield device
    if device.exists():
        device.remove()


@pytest.fixture
def thin_pool(
    loop_device: Callable[[dmlib.Size], LoopFile], unique_name: Callable[..., str]
) -> Iterator[dmlib.ThinPool]:
    """A thin pool with 64 KiB blocks on 4 MiB of metadata and 64 MiB of data, checked by thin_check at the end."""
    metadata, data = loop_device("4MiB"), loop_device("64MiB")
    pool = dmlib.ThinPool.create(unique_name(), metadata=metadata, data=data, data_block_size="64KiB")
    yield pool
    if pool.device.exists():
        pool.deactivate()
    checked = subprocess.run(["thin_check", metadata.path], capture_output=True, text=True, check=False)
    if checked.returncode:
        pytest.fail(f"thin_check: {checked.stderr or checked.stdout}", pytrace=False)


@pytest.fixture
def thin_device(thin_pool: dmlib.ThinPool) -> dmlib.ThinDevice:
    """An active thin device of 32 MiB in ``thin_pool``, thin id 0."""
    return thin_pool.create_thin(0, "32MiB")
