# SPDX-License-Identifier: MIT
"""
A thin pool on two files: made, written, snapshotted, filled, grown and taken down again.

``make demo`` runs this on a real kernel. As root on a machine whose kernel has the device mapper, so does

    .venv/bin/python examples/quickstart.py

Every figure that it prints is measured on the pool. Where theory says what it has to be, that is checked, and
the exit status is 1 if one is off.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmlib import (
    DataBlocks,
    DmError,
    GiB,
    KiB,
    LoopDevice,
    MiB,
    PoolMode,
    ThinDevice,
    ThinPool,
    create_sparse_file,
    driver_version,
    grow_sparse_file,
    list_devices,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from dmlib import ThinPoolStatus

BLOCK = KiB(64)
UNIT = BLOCK.bytes
EXT4_BLOCK = 4096
METADATA = MiB(8)
DATA = MiB(96)
UDEV_COOKIE = 0x0D4D  # what the keys of libdevmapper's semaphores begin with
FIBMAP = 1  # linux/fs.h: which block of the device holds a block of a file
FEW = 16  # blocks, that is 1 MiB
NOT_COPIED = ("__pycache__", "test", "tests", "idlelib", "site-packages", "dist-packages", "config-*")


# ---- Reporting and checking


class WrongFigureError(Exception):
    """Something measured is not what it has to be."""


@dataclass
class Step:
    """What one step did to the pool."""

    blocks: int = 0


class Report:
    """Prints what each step does to a pool, and compares it with what it has to be."""

    def __init__(self, pool: ThinPool) -> None:
        self.pool = pool
        self.checked = 0

    def used(self) -> int:
        """Return how many blocks of the pool are in use, after what was written has been committed."""
        return self.pool.status(flush=True).used_data.count

    @contextmanager
    def step(self, what: str, takes: int | None = None) -> Iterator[Step]:
        """Measure the pool before and after the ``with`` block; it has to take exactly *takes* blocks, if given."""
        step = Step()
        before = self.used()
        yield step
        after = self.used()
        step.blocks = after - before
        print(f"  {what:<58}{before:>5} -> {after:>4} {step.blocks:+6d}", flush=True)
        if takes is not None:
            self.check(f"{what}: blocks taken", step.blocks, takes)

    def check(self, what: str, found: object, wanted: object) -> None:
        """Compare a figure with what it has to be."""
        if found != wanted:
            raise WrongFigureError(f"{what}: {found}, which should be {wanted}")
        self.checked += 1


# ---- Reading and writing


def write(device: ThinDevice, offset: int, content: bytes) -> None:
    """Write to a device at an offset in bytes, and wait until it is there."""
    descriptor = os.open(device.path, os.O_WRONLY)
    try:
        done = 0
        while done < len(content):
            done += os.pwrite(descriptor, content[done:], offset + done)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(device: ThinDevice, offset: int, length: int) -> bytes:
    """Read a range of a device."""
    with open(device.path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def noise(length: int) -> bytes:
    """Return bytes that cannot be told from chance, but are the same each time."""
    return random.Random(length).randbytes(length)  # noqa: S311 - no secret


@contextmanager
def mounted(device: ThinDevice, folder: str, *options: str) -> Iterator[str]:
    """Mount a device for the length of a ``with`` block; unmounting writes back all that is dirty."""
    # ext4 would write inode tables in the background, whenever it has the time; no figure would be certain then.
    words = ",".join(("noatime", "noinit_itable", *options))
    subprocess.run(["mount", "-o", words, device.path, folder], check=True)
    try:
        yield folder
    finally:
        unmount(folder)


def unmount(folder: str) -> None:
    """Unmount what is mounted on a folder, if anything is."""
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


def files_below(folder: str) -> list[Path]:
    """Return the files below a folder, without links."""
    return [path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink()]


def largest(folder: str) -> str:
    """Return the name of the largest file below a folder."""
    return str(max(files_below(folder), key=lambda path: path.stat().st_size).relative_to(folder))


def checksums(folder: str) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files_below(folder)
    }


def differences(one: dict[str, str], other: dict[str, str]) -> set[str]:
    """Return the files that are not the same on both sides."""
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


# ---- The acts of the play


def what_a_write_takes(report: Report) -> None:
    """Writes to a thin device, and to its snapshot, take whole blocks of the pool: as many as they touch."""
    print(f"\nOne thin device of 1 GiB, in blocks of {BLOCK}")
    pool = report.pool
    disk = pool.create_thin(0, GiB(1))
    with report.step("write 1 byte", takes=1):
        write(disk, MiB(512).bytes, b"!")
    with report.step("write 56 KiB at an aligned offset", takes=1):
        write(disk, MiB(8).bytes, noise(KiB(56).bytes))
    with report.step("write 64 KiB at offset 4 KiB, across a boundary", takes=2):
        write(disk, KiB(4).bytes, noise(UNIT))
    original = noise(4 * UNIT)
    at = MiB(16).bytes
    with report.step("write 256 KiB at an aligned offset", takes=4):
        write(disk, at, original)

    with report.step("take a snapshot", takes=0):
        snap = disk.snapshot(1)
    change = noise(KiB(32).bytes)
    with report.step("write 32 KiB to the snapshot at an aligned offset", takes=1):
        write(snap, at, change)
    straddling = 2 * UNIT - KiB(16).bytes
    with report.step("write 32 KiB to the snapshot across a boundary", takes=2):
        write(snap, at + straddling, change)
    report.check("the device is untouched", read(disk, at, len(original)) == original, wanted=True)
    expected = bytearray(original)
    expected[: len(change)] = change
    expected[straddling : straddling + len(change)] = change
    report.check("the snapshot has both changes", read(snap, at, len(expected)) == expected, wanted=True)

    with report.step("delete both", takes=-11):
        for thin in (snap, disk):
            thin.deactivate()
            thin.delete()


def copy_python(folder: str) -> None:
    """Copy Python's own standard library, without what is large and dull."""
    source = sysconfig.get_path("stdlib")
    shutil.copytree(source, folder, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED), dirs_exist_ok=True)


def find_in_file(path: Path, misplaced: int) -> int:
    """Return an offset into a file whose place on the device lies *misplaced* bytes behind a block boundary."""
    with path.open("rb") as file:

        def place(number: int) -> int:
            (block,) = struct.unpack("i", fcntl.ioctl(file, FIBMAP, struct.pack("i", number)))
            return int(block)

        span = KiB(32).bytes // EXT4_BLOCK
        for number in range(path.stat().st_size // EXT4_BLOCK - span):
            first = place(number)
            if first * EXT4_BLOCK % UNIT == misplaced and place(number + span - 1) == first + span - 1:
                return number * EXT4_BLOCK
    raise WrongFigureError(f"{path} has no 32 KiB in one piece, {misplaced} bytes behind a boundary")


def change_file(report: Report, snap: ThinDevice, folder: str, what: str, *, misplaced: int, data: int) -> Step:
    """Overwrite 32 KiB in the middle of the largest file of a snapshot, and show what ext4 puts on top."""
    with report.step(f"change 32 KiB of a file in snapshot {what}") as step, mounted(snap, folder):
        path = Path(folder, largest(folder))
        offset = find_in_file(path, misplaced)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(noise(KiB(32).bytes))
    own = step.blocks - data
    print(f"    = {data} for the 32 KiB + {own} of ext4's own: superblock, journal, inode")
    report.check(f"{what}: ext4 has blocks of its own on top, and few", 1 <= own <= FEW, wanted=True)
    return step


def snapshots_of_files(report: Report, folder: str) -> None:
    """A file system with real files and two snapshots: each is written, none sees what happens to the others."""
    print("\nA file system with Python's standard library on it, and two snapshots")
    base = report.pool.create_thin(10, GiB(1))
    with report.step("mkfs.ext4 on a thin device of 1 GiB"):
        options = ["-q", "-b", str(EXT4_BLOCK), "-E", "lazy_itable_init=1,lazy_journal_init=1"]
        subprocess.run(["mkfs.ext4", *options, base.path], check=True)
    with ExitStack() as stack:
        with report.step("copy the library into it"):
            stack.enter_context(mounted(base, folder))
            copy_python(folder)
            os.sync()
        original = checksums(folder)
        changed = largest(folder)
        with report.step("take a snapshot while it is mounted") as taken:
            golden = base.snapshot(11)
        report.check("few blocks for a snapshot of a mounted ext4", 0 <= taken.blocks <= FEW, wanted=True)
        with report.step("take two snapshots of that one, A and B", takes=0):
            snap_a = golden.snapshot(12)
            snap_b = golden.snapshot(13)
    change_a = change_file(report, snap_a, folder, "A, at an aligned place", misplaced=0, data=1)
    change_file(report, snap_b, folder, "B, across a boundary", misplaced=UNIT - KiB(16).bytes, data=2)

    sums = {}
    for device in (base, golden, snap_a, snap_b):
        with mounted(device, folder, "ro"):
            sums[device] = checksums(folder)
    report.check("files that differ: base, now and before", differences(sums[base], original), set())
    report.check("files that differ: first snapshot and base", differences(sums[golden], original), set())
    report.check("files that differ: A and base", differences(sums[snap_a], original), {changed})
    report.check("files that differ: B and base", differences(sums[snap_b], original), {changed})
    report.check("files that differ: A and B", differences(sums[snap_a], sums[snap_b]), {changed})
    print(f"    SHA-256 of {len(original)} files: the first two are as they were; A and B differ,")
    print(f"    from them and each other, in {os.path.basename(changed)} alone")

    snap_a.deactivate()
    with report.step("delete snapshot A: what it alone had comes back", takes=-change_a.blocks):
        snap_a.delete()


def grow_under_a_writer(report: Report, data: LoopDevice) -> None:
    """A pool runs full; the write that finds no block waits, and completes when the pool has grown."""
    print("\nThe pool runs full under a writer, and grows")
    pool = report.pool
    disk = pool.create_thin(20, GiB(1))
    before = pool.status(flush=True)
    beyond = MiB(16) // BLOCK
    blocks = before.free_data.count + beyond
    content = noise(blocks * UNIT)
    with ExitStack() as stack:
        stack.enter_context(report.step(f"write {blocks} blocks, {beyond} more than are free", takes=blocks))
        executor = stack.enter_context(ThreadPoolExecutor(1))
        writer = executor.submit(write, disk, 0, content)
        # If anything fails below, let the queued writes fail too: nothing else would end the writer.
        stack.callback(release, pool, writer)
        full = wait_until_full(pool, writer)
        report.check("blocks left in the full pool", full.free_data.count, 0)
        report.check("the write is done", writer.done(), wanted=False)
        since = time.monotonic()
        time.sleep(0.5)
        report.check("the write is done half a second later", writer.done(), wanted=False)
        grow_sparse_file(data.status().backing_file, data.size + MiB(32))
        data.refresh_size()
        pool.grow_data()
        writer.result(timeout=120)
        waited = time.monotonic() - since
    after = pool.status()
    print(f"    full at {full.total_data.count} blocks the pool was {full.mode.value} and the write waited;")
    print(
        f"    grown to {after.total_data.count} it is {after.mode.value} again, and the write done after {waited:.1f} s"
    )
    report.check("mode after growing", after.mode, PoolMode.READ_WRITE)
    report.check("blocks after growing", after.total_data - before.total_data, DataBlocks(MiB(32) // BLOCK))
    report.check("all that was written is there", read(disk, 0, len(content)) == content, wanted=True)


def release(pool: ThinPool, writer: Future[None]) -> None:
    """Let the writes that wait for space fail, if there are any."""
    if not writer.done():
        pool.reconfigure(error_if_no_space=True)


def wait_until_full(pool: ThinPool, writer: Future[None]) -> ThinPoolStatus:
    """Wait until the pool has no block for a write; return its status then."""
    deadline = time.monotonic() + 120
    while (status := pool.status()).mode is not PoolMode.OUT_OF_DATA_SPACE:
        if writer.done() or time.monotonic() > deadline:
            raise WrongFigureError("the pool did not run full")
        time.sleep(0.05)
    return status


# ---- Before and after


@dataclass
class Traces:
    """What a run like this one could leave on a machine."""

    devices: set[str]
    nodes: set[str]
    loops: set[str]
    semaphores: set[str]

    @classmethod
    def now(cls) -> Traces:
        """Look at the machine."""
        with open("/proc/sysvipc/sem", encoding="ascii") as table:
            keys = [int(line.split()[0]) & 0xFFFFFFFF for line in list(table)[1:]]
        return cls(
            devices={device.name for device in list_devices()},
            nodes=set(os.listdir("/dev/mapper")),
            loops={path.parent.parent.name for path in Path("/sys/block").glob("loop*/loop/backing_file")},
            semaphores={hex(key) for key in keys if key >> 16 == UDEV_COOKIE},
        )

    def beyond(self, other: Traces) -> list[str]:
        """Return what is here and was not there."""
        more = [self.devices - other.devices, self.nodes - other.nodes]
        more += [self.loops - other.loops, self.semaphores - other.semaphores]
        return sorted(set().union(*more))


def check_nothing_left(before: Traces, folder: str) -> None:
    """See that the machine is as it was."""
    deadline = time.monotonic() + 5
    while (left := Traces.now().beyond(before)) and time.monotonic() < deadline:
        time.sleep(0.05)  # udev may be on its way still
    if os.path.exists(folder):
        left.append(folder)
    if left:
        raise WrongFigureError(f"left behind: {', '.join(left)}")


def play(folder: str) -> int:
    """Build everything in a folder, show it, and take it down; return how many figures were checked."""
    files = os.path.join(folder, "metadata"), os.path.join(folder, "data")
    mount_point = os.path.join(folder, "mount")
    os.mkdir(mount_point)
    with ExitStack() as stack:
        for file, size in zip(files, (METADATA, DATA), strict=True):
            create_sparse_file(file, size)
        metadata, data = (stack.enter_context(LoopDevice.temporary(file)) for file in files)
        pool = stack.enter_context(ThinPool.temporary(metadata=metadata, data=data, data_block_size=BLOCK))
        status = pool.status()
        print(f"{pool.name}: {status.total_data.count} blocks of {BLOCK} on {data.path}, mappings on {metadata.path}")
        print(f"{'blocks in use, change':>80}")
        report = Report(pool)
        what_a_write_takes(report)
        stack.callback(unmount, mount_point)  # in case that Ctrl-C hits while something is being (un)mounted
        snapshots_of_files(report, mount_point)
        grow_under_a_writer(report, data)
    return report.checked


def main() -> int:
    """Run the demonstration and return the exit status."""
    began = time.monotonic()
    try:
        before = Traces.now()
        driver = ".".join(map(str, driver_version()))
        print(f"A thin pool from Python, on Linux {os.uname().release} with device mapper {driver}\n")
        with tempfile.TemporaryDirectory(prefix="dmlib-quickstart-") as folder:
            checked = play(folder)
        check_nothing_left(before, folder)
    except (DmError, OSError, WrongFigureError, subprocess.CalledProcessError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted; everything was taken down", file=sys.stderr)
        return 130
    print(f"\nAll {checked} figures are as they have to be; it took {time.monotonic() - began:.0f} s.")
    print("Everything is taken down: no device, loop device, semaphore or file is left.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
