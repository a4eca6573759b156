# SPDX-License-Identifier: MIT
"""
Fixtures of the kernel tier, smallest first, and the check after each test that nothing stays behind.

Oracles are programs that dmlib's authors did not write: dmsetup, losetup, blockdev, thin_check.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dmlib import (
    Device,
    DeviceNumber,
    KiB,
    Linear,
    LoopDevice,
    MiB,
    RawTarget,
    Sectors,
    Table,
    ThinDevice,
    ThinPool,
    _loopctl,
    create_sparse_file,
    list_devices,
)
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


@dataclass(frozen=True)
class Leftovers:
    """What a test could leave behind."""

    devices: frozenset[str]
    nodes: frozenset[str]
    loops: frozenset[str]
    semaphores: frozenset[str]
    mounts: frozenset[str]
    descriptors: frozenset[str]
    threads: frozenset[str]

    @classmethod
    def now(cls) -> Leftovers:
        descriptors = set()
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:
                continue
            if not target.endswith(("/mapper/control", "/dev/kmsg")):  # dmlib keeps these two open
                descriptors.add(f"{name} {target}")
        loops = {loop.name for loop in Path("/sys/block").glob("loop*") if (loop / "loop").exists()}
        return cls(
            devices=frozenset(device.name for device in list_devices()),
            nodes=frozenset(os.listdir("/dev/mapper")),
            loops=frozenset(loops),
            semaphores=frozenset(Path("/proc/sysvipc/sem").read_text(encoding="ascii").splitlines()[1:]),
            mounts=frozenset(Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()),
            descriptors=frozenset(d for d in descriptors if "/fd" not in d.split()[-1]),
            # A dummy is Python's note of a thread started in C that once logged; before 3.12 it outlives it.
            threads=frozenset(t.name for t in threading.enumerate() if not isinstance(t, threading._DummyThread)),
        )

    def beyond(self, before: Leftovers) -> dict[str, list[str]]:
        more = {field: getattr(self, field) - getattr(before, field) for field in self.__dataclass_fields__}
        return {field: sorted(values) for field, values in more.items() if values}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After each test, devices, nodes, loops, semaphores, mounts, descriptors and threads are as before."""
    before = Leftovers.now()
    yield
    deadline = time.monotonic() + 5
    while (left := Leftovers.now().beyond(before)) and time.monotonic() < deadline:
        time.sleep(0.05)  # a deferred removal, an autoclear and a closing thread take a moment
    if left:
        for name in left.get("devices", ()):
            run(f"dmsetup remove --retry {shlex.quote(name)}", check=False)
        for name in left.get("loops", ()):
            run(f"losetup -d /dev/{name}", check=False)
    assert not left, f"left behind: {left}"


@pytest.fixture
def sparse_file(tmp_path: Path) -> Callable[[Sectors], Path]:
    """Make sparse files: ``sparse_file(MiB(4))``."""

    def make(size: Sectors) -> Path:
        path = tmp_path / f"sparse-{len(list(tmp_path.iterdir()))}"
        with path.open("xb") as file:
            file.truncate(size.bytes)
        return path

    return make


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


@dataclass
class Loop:
    """A loop device and its file."""

    device: LoopDevice
    file: Path

    def __fspath__(self) -> str:
        return self.path

    @property
    def path(self) -> str:
        return self.device.path

    @property
    def number(self) -> DeviceNumber:
        return self.device.number

    def grow(self, size: Sectors) -> None:
        os.truncate(self.file, size.bytes)
        self.device.refresh_size()


@pytest.fixture
def loop_device(sparse_file: Callable[[Sectors], Path]) -> Iterator[Callable[[Sectors], Loop]]:
    """Make loop devices over sparse files: ``loop_device(MiB(4))``."""
    made: list[Loop] = []

    def make(size: Sectors) -> Loop:
        file = sparse_file(size)
        made.append(Loop(LoopDevice.attach(file), file))
        return made[-1]

    yield make
    for loop in reversed(made):
        loop.device.detach(lazy=True)  # a device over it may be removed by a later finaliser


@pytest.fixture
def unique_name() -> Iterator[Callable[[], str]]:
    """Names for devices that no other test uses; what is left under them is removed."""
    made: list[str] = []

    def make(suffix: str = "") -> str:
        made.append(f"dmlib-test-{os.getpid()}-{len(made)}{suffix}")
        return made[-1]

    yield make
    there = {device.name for device in list_devices()}
    for name in reversed(made):
        if name in there:
            Device(name).remove()


@pytest.fixture
def linear_device(loop_device: Callable[[Sectors], Loop], unique_name: Callable[[], str]) -> Iterator[Device]:
    """A linear device of 4 MiB over a loop device."""
    loop = loop_device(MiB(4))
    device = Device.create(unique_name(), Table.single(MiB(4), Linear(loop.number, Sectors(0))))
    yield device
    if device.exists():
        device.remove()


@pytest.fixture
def slow(
    loop_device: Callable[[Sectors], Loop], unique_name: Callable[..., str], request: pytest.FixtureRequest
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
def pool(loop_device: Callable[[Sectors], Loop], unique_name: Callable[[], str]) -> Iterator[ThinPool]:
    """A pool with 64 KiB blocks on 4 MiB of metadata and 64 MiB of data; checked with thin_check afterwards."""
    metadata, data = loop_device(MiB(4)), loop_device(MiB(64))
    made = ThinPool.create(unique_name(), metadata=metadata, data=data, data_block_size=KiB(64))
    yield made
    if made.device.exists():
        made.deactivate()
    run(f"thin_check {metadata.path}")


@pytest.fixture
def thin(pool: ThinPool) -> ThinDevice:
    """An active thin device of 32 MiB, thin id 0."""
    return pool.create_thin(0, MiB(32))


@pytest.fixture
def backing(pool: ThinPool) -> tuple[Loop, Loop]:
    """The metadata and the data loop of *pool*."""
    loops = []
    for number in (pool.metadata_device, pool.data_device):
        device = LoopDevice(f"/dev/loop{number.minor}")
        loops.append(Loop(device, Path(device.status().backing_file)))
    return loops[0], loops[1]
