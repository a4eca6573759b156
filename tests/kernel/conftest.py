# SPDX-License-Identifier: MIT
"""
Fixtures of the kernel tier, on top of those that dmlib's pytest plugin has for everybody.

Oracles are programs that dmlib's authors did not write: dmsetup, losetup, blockdev, thin_check.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dmlib import (
    Device,
    LoopDevice,
    MiB,
    RawTarget,
    Sectors,
    Table,
    ThinDevice,
    ThinPool,
    _loopctl,
    create_sparse_file,
)
from dmlib.testing.fixtures import LoopFile
from kernel_kit import DELAY_MS, slow_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def run(command: str, *, check: bool = True) -> str:
    """Run *command*, words quoted as for a shell, and return what it printed."""
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False, timeout=120)
    if check and done.returncode:
        pytest.fail(f"{command}: exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture(scope="session")
def sh() -> Callable[..., str]:
    """Run an oracle: ``sh("dmsetup table x")`` returns its output and fails the test if it fails."""
    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sparse file of 8 MiB."""
    path = tmp_path / "file"
    create_sparse_file(path, MiB(8))
    return path


@pytest.fixture(params=["one step", "many steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Attach loop devices by LOOP_CONFIGURE, and as on a kernel that does not have it."""
    ways = {"one step": _loopctl._in_one_step, "many steps": _loopctl._in_several_steps}
    monkeypatch.setattr(_loopctl, "_WAYS", (ways[request.param],))
    return str(request.param)


@pytest.fixture
def slow(
    loop_device: Callable[[Sectors], LoopFile], unique_name: Callable[..., str], request: pytest.FixtureRequest
) -> Iterator[tuple[Device, Device]]:
    """A linear device over one that delays each write, so that a flushing suspend has to wait as long."""
    number = loop_device(MiB(4)).number
    target = RawTarget("delay", f"{number} 0 0 {number} 0 {getattr(request, 'param', DELAY_MS)}")
    below = Device.create(unique_name("-delay"), Table.single(MiB(4), target))
    device = Device.create(unique_name("-slow"), slow_table(below, Sectors(0)))
    yield device, below
    device.remove()
    below.remove()


@pytest.fixture
def pool(thin_pool: ThinPool) -> ThinPool:
    """A pool with 64 KiB blocks on 4 MiB of metadata and 64 MiB of data; checked with thin_check afterwards."""
    return thin_pool


@pytest.fixture
def thin(thin_device: ThinDevice) -> ThinDevice:
    """An active thin device of 32 MiB, thin id 0."""
    return thin_device


@pytest.fixture
def backing(pool: ThinPool) -> tuple[LoopFile, LoopFile]:
    """The metadata and the data loop of *pool*."""
    loops = []
    for number in (pool.metadata_device, pool.data_device):
        device = LoopDevice(f"/dev/loop{number.minor}")
        loops.append(LoopFile(device, Path(device.status().backing_file)))
    return loops[0], loops[1]
