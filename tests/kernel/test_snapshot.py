# SPDX-License-Identifier: MIT
"""
Snapshots: of inactive and active origins, with a mounted file system under a writer, in pools without room.

What a snapshot holds is judged by checksums and by e2fsck.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from dmlib import (
    Device,
    DeviceExistsError,
    DeviceNotFoundError,
    KiB,
    MiB,
    OutOfDataSpaceError,
    PoolMode,
    StateError,
    SuspendTimeoutError,
)


def write(path, content, offset=0):
    with open(path, "r+b", buffering=0) as device:
        os.pwrite(device.fileno(), content, offset)
        os.fsync(device.fileno())


def digest(path):
    with open(path, "rb", buffering=0) as device:
        os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(device, "sha256").hexdigest()


@pytest.fixture
def mount(tmp_path, sh):
    """Give a function that mounts a file system for the length of a block."""

    @contextmanager
    def mounted(path, options="defaults"):
        place = tmp_path / f"mount-{len(os.listdir(tmp_path))}"
        place.mkdir()
        sh(f"mount -o {options} {path} {place}")
        try:
            yield place
        finally:
            sh(f"umount {place}")

    return mounted


@pytest.fixture
def mounted(thin, mount, sh):
    """A mounted ext4 file system on the thin device; yields where."""
    sh(f"mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 {thin.path}")
    with mount(thin.path) as place:
        yield place


class TestOrigins:
    def test_inactive(self, thin):
        """Of an inactive origin, active or not itself, a snapshot holds what the origin holds."""
        write(thin.path, os.urandom(1 << 20), 65536)
        before = digest(thin.path)
        thin.deactivate()
        snap = thin.snapshot(1)
        assert digest(snap.path) == before
        assert thin.active() is None
        assert thin.snapshot(2, activate=False).active() is None

    def test_active_idle(self, thin, sh):
        """Of an active origin, too; it runs on, not suspended."""
        write(thin.path, os.urandom(1 << 20))
        snap = thin.snapshot(1)
        assert digest(snap.path) == digest(thin.path)
        assert sh(f"dmsetup info -c --noheadings -o suspended {thin.name}").strip() == "Active"
        assert sh(f"dmsetup table {snap.name}").split()[2:] == ["thin", str(thin.pool.number), "1"]

    def test_unwritten_page_cache(self, thin):
        """What was written to the device but still sits in the page cache is in the snapshot."""
        with open(thin.path, "r+b") as device:
            device.write(b"in the cache")
            device.flush()
            snap = thin.snapshot(1)
        with open(snap.path, "rb") as device:
            assert device.read(12) == b"in the cache"

    def test_suspended_stays_suspended(self, thin):
        """An origin that the caller suspended stays suspended, and is the caller's to resume."""
        with thin.device.suspended():
            thin.snapshot(1, activate=False)
            assert thin.device.info().suspended
        assert not thin.device.info().suspended

    def test_isolation(self, thin):
        """A write to either is not seen by the other, nor by a second snapshot."""
        write(thin.path, os.urandom(1 << 20))
        common = digest(thin.path)
        first, second = thin.snapshot(1), thin.snapshot(2)
        write(thin.path, b"origin" * 5000, 100_000 // 512 * 512)
        assert {digest(first.path), digest(second.path)} == {common}
        changed = digest(thin.path)
        write(first.path, b"first" * 5000, 300_000 // 512 * 512)
        assert (digest(thin.path), digest(second.path)) == (changed, common)
        assert digest(first.path) not in {changed, common}

    def test_depth(self, pool):
        """A chain of twenty snapshots, each of the one before and each changed, keeps all its generations."""
        generations = []
        volume = pool.create_thin(0, MiB(2))
        for depth in range(20):
            write(volume.path, bytes([depth]) * 512, depth * 65536)
            generations.append((volume, digest(volume.path)))
            volume = volume.snapshot(depth + 1)
        assert digest(volume.path) == generations[-1][1]
        assert len({checksum for _, checksum in generations}) == 20
        assert [digest(made.path) for made, _ in generations] == [checksum for _, checksum in generations]
        assert pool.status(flush=True).used_data.count == 20

    def test_unknown_origin(self, pool):
        """Of an id that the pool does not have there is no snapshot."""
        with pytest.raises(DeviceNotFoundError, match="origin 8"):
            pool.thin(8, MiB(1)).snapshot(9)

    def test_suspended_pool(self, pool, thin):
        """In a suspended pool an active origin is refused at once: its I/O is held, and the suspend would wait."""
        with pool.device.suspended(flush=False), pytest.raises(StateError, match="is suspended"):
            thin.snapshot(1)
        thin.snapshot(1, activate=False)

    def test_id_taken(self, pool, thin):
        """A message that fails while the origin is suspended leaves it resumed, and what has the id untouched."""
        other = pool.create_thin(1, MiB(1))
        write(other.path, b"other")
        with pytest.raises(DeviceExistsError, match=f"thin 1 of {pool.name}"):
            thin.snapshot(1, name="dmlib-test-other-name")
        assert not thin.device.info().suspended
        write(thin.path, b"runs on")
        with open(other.path, "rb") as device:
            assert device.read(5) == b"other"


class Scribbler(threading.Thread):
    """Writes numbered files, each fsynced, and remembers which are; pauses while a snapshot is looked at."""

    def __init__(self, folder):
        super().__init__(name="scribbler")
        self.folder, self.done, self.stop, self.go = folder, 0, threading.Event(), threading.Event()

    @staticmethod
    def content(number):
        return f"{number:08}".encode() + hashlib.sha256(str(number).encode()).digest() * 200

    def run(self):
        while self.go.wait() and not self.stop.is_set():
            number = self.done
            with open(self.folder / f"{number % 200}.part", "wb") as file:
                file.write(self.content(number))
                file.flush()
                os.fsync(file.fileno())
            os.replace(self.folder / f"{number % 200}.part", self.folder / f"{number % 200}")
            os.fsync(self.directory)
            self.done = number + 1

    def __enter__(self):
        self.directory = os.open(self.folder, os.O_RDONLY)
        self.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.go.set()
        self.join()
        os.close(self.directory)


@pytest.mark.parametrize("rounds", [8, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_under_a_writer(thin, mounted, mount, sh, rounds):
    """Each snapshot of a mounted file system under a writer is clean, and holds what was synced before it."""
    overtaken = 0
    with Scribbler(mounted) as scribbler:
        for thin_id in range(1, rounds + 1):
            scribbler.go.set()
            while scribbler.done < thin_id * 3:
                time.sleep(0.001)
            synced = scribbler.done
            snap = thin.snapshot(thin_id)
            overtaken += scribbler.done > synced
            scribbler.go.clear()
            with mount(snap.path) as place:  # replays the journal
                for number in range(max(0, synced - 20), synced):
                    raw = (place / str(number % 200)).read_bytes()
                    assert int(raw[:8]) >= number
                    assert raw == Scribbler.content(int(raw[:8]))
            sh(f"e2fsck -fn {snap.path}")
            snap.deactivate()
            snap.delete()
    assert overtaken, "the writer did not write while a snapshot was taken"
    assert not thin.device.info().suspended


def test_replaced_file(thin, mounted, mount):
    """A snapshot keeps the file that was replaced on the origin, and the origin does not see the snapshot's."""
    (mounted / "file").write_text("old", encoding="ascii")
    snap = thin.snapshot(1)
    (mounted / "file").write_text("new", encoding="ascii")
    with mount(snap.path) as place:
        assert (place / "file").read_text(encoding="ascii") == "old"
        (place / "file").write_text("other", encoding="ascii")
        assert (mounted / "file").read_text(encoding="ascii") == "new"


class TestNoRoom:
    def test_too_little_room(self, pool, thin):
        """With fewer free blocks than a suspend may need, the snapshot is refused; the origin runs on."""
        filler = pool.create_thin(7, MiB(64))
        blocks = pool.status().free_data.count - 4
        write(filler.path, bytes(blocks * 65536))
        with pytest.raises(OutOfDataSpaceError, match="4 data blocks free and a suspend may need"):
            thin.snapshot(1)
        assert not thin.device.info().suspended
        assert thin.active().inactive_table is False
        with pytest.raises(DeviceNotFoundError):
            pool.delete(1)
        filler.deactivate()
        filler.delete()
        thin.snapshot(1)

    def test_dirty_file_system_in_a_full_pool(self, pool, backing, mount, sh):
        """
        A full pool and a file system with more to write: the snapshot fails within its deadline and suspends nothing.

        Then another thread grows the pool, and the same snapshot succeeds.
        """
        thin = pool.create_thin(0, MiB(160))
        sh(f"mkfs.ext4 -q -b 4096 -E lazy_itable_init=0,lazy_journal_init=0,nodiscard -O ^has_journal {thin.path}")
        content = os.urandom(1 << 20)
        with mount(thin.path) as place:
            for number in range(80):
                (place / str(number)).write_bytes(content)
            rescue = threading.Thread(target=lambda: (backing[1].grow(MiB(160)), pool.grow_data()), name="rescue")
            try:
                begin = time.monotonic()
                with pytest.raises((OutOfDataSpaceError, SuspendTimeoutError)):
                    thin.snapshot(1, timeout=8)
                assert time.monotonic() - begin < 9
                info = thin.device.info()
                assert (info.suspended, info.internal_suspend, info.inactive_table) == (False, False, False)
                assert pool.status().mode is PoolMode.OUT_OF_DATA_SPACE
            finally:  # else the file system could not be unmounted
                rescue.start()
                rescue.join(20)
            snap = thin.snapshot(1)
            assert pool.status().mode is PoolMode.READ_WRITE
        sh(f"e2fsck -fy {snap.path}", check=False)  # it was mounted: the mark is taken off, and nothing else found
        sh(f"e2fsck -fn {snap.path}")
        with mount(snap.path, "ro") as place:
            assert all((place / str(number)).read_bytes() == content for number in range(80))


INTERRUPTED = """
import sys
from dmlib import ThinDevice
origin = ThinDevice.open(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    for thin_id in range(1, 1000):
        origin.snapshot(thin_id)
        print(thin_id, flush=True)
except KeyboardInterrupt as interrupt:
    print("interrupted", thin_id, *getattr(interrupt, "__notes__", ()), flush=True)
"""


@pytest.mark.parametrize("rounds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_interrupted(pool, thin, sh, rounds):
    """After SIGINT at any moment of a snapshot, its id exists with its device or not at all, and the origin runs."""
    for number in range(rounds):
        child = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, thin.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("go\n")
        child.stdin.flush()
        time.sleep(0.02 + number * 0.0037 % 0.05)
        child.send_signal(signal.SIGINT)
        out = child.communicate(timeout=30)[0]
        last = re.search(r"^interrupted (\d+)$", out, re.MULTILINE)
        assert last, out
        assert child.returncode == 0
        assert not thin.device.info().suspended
        write(thin.path, b"runs on")
        interrupted = int(last[1])
        device = pool.active(interrupted)
        for thin_id in range(1, interrupted + (device is not None)):
            active = pool.active(thin_id)
            assert active.live_table
            Device(active.name).remove()
            pool.delete(thin_id)
        with pytest.raises(DeviceNotFoundError):
            pool.delete(interrupted if device is None else interrupted + 1)
    assert sh("dmsetup ls").count(f"{pool.name}-thin-") == 1


@pytest.mark.concurrency
def test_many_at_once(pool, thin):
    """Threads that take snapshots of one origin at once all get theirs, and the origin runs on."""
    failures = []

    def take(thin_id):
        try:
            thin.snapshot(thin_id, activate=False)
        except Exception as error:  # noqa: BLE001 - looked at below
            failures.append(error)

    threads = [threading.Thread(target=take, args=(thin_id,), name=f"take-{thin_id}") for thin_id in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for thin_id in range(1, 7):
        pool.delete(thin_id)
    assert not thin.device.info().suspended
    write(thin.path, bytes(KiB(64).bytes))
