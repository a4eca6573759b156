# SPDX-License-Identifier: MIT
"""
What could make a flushing suspend of a thin device hang, done or checked before it starts.

A suspend that waits for a write which waits for space in a full pool blocks the pool's own suspend as well, and so
the growing of the pool that would free it; with a file system mounted not even SIGKILL ends it. So dirty data is
written back first, while nothing is suspended and the pool can still be grown; then the pool must have room for
whatever may have become dirty again.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from dmlib import _ffi, blockdev, ids
from dmlib._undo import Latch, start_thread
from dmlib.errors import OutOfDataSpaceError, SuspendTimeoutError, from_task
from dmlib.targets.thin_pool import PoolMode
from dmlib.units import DataBlocks, Sectors
from dmlib.usage import mount_points, stacked_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dmlib.targets.thin_pool import ThinPoolStatus

MARGIN: Final = DataBlocks(8)
"""Blocks that must be free beyond what is dirty: a freeze writes a journal and a superblock of its own."""

_LOOK_EVERY: Final = 1.0


class _Turns:
    """A lock for each device that is to be suspended, for as long as somebody has it or waits for it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def lock_of(self, uuid: str) -> threading.Lock:
        with self._guard:
            lock = self._locks.get(uuid)
            if lock is None:
                lock = self._locks[uuid] = threading.Lock()
            return lock


_turns = _Turns()


def _after_fork() -> None:
    global _turns  # noqa: PLW0603 - threads that had their turn do not exist in the child
    _turns = _Turns()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def turn(uuid: str, label: str, timeout: float | None) -> Iterator[None]:
    """
    Let the threads of this process suspend a device one after the other.

    A second one would take the first one's suspend for the caller's own, or be refused by the kernel.

    Raises:
        SuspendTimeoutError: The turn did not come; nothing was done.
    """
    lock = _turns.lock_of(uuid)
    if not lock.acquire(timeout=-1 if timeout is None else timeout):
        raise SuspendTimeoutError(label, timeout or 0.0)
    try:
        yield
    finally:
        lock.release()


def write_back(device: ids.DeviceNumber, *, label: str, timeout: float | None, look: Callable[[], object]) -> None:
    """
    Write back what is dirty above *device*: file systems on it or on devices stacked on it, and its own page cache.

    Args:
        device: The device that is to be suspended.
        label: What to call it.
        timeout: Seconds; ``None`` waits for ever.
        look: Called every second of a longer wait; raises if waiting makes no sense.

    Raises:
        SuspendTimeoutError: It took longer. Nothing was suspended; the write-back goes on by itself.
        TaskError: A file system or the device could not be synced.
    """
    failures: list[BaseException] = []
    done = Latch()

    def sync() -> None:
        try:
            _sync_all(device)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            failures.append(error)
        finally:
            done.set()

    # Nothing depends on the end of this thread, which may sit in the kernel for as long as the pool is full.
    start_thread(sync, ())
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        rest = _LOOK_EVERY if deadline is None else min(_LOOK_EVERY, deadline - time.monotonic())
        if done.wait(max(0.0, rest)):
            break
        look()
        if deadline is not None and time.monotonic() >= deadline:
            raise SuspendTimeoutError(label, timeout or 0.0, "sync")
    if failures:
        raise failures[0]


def _sync_all(device: ids.DeviceNumber) -> None:
    for number in (device, *stacked_on(device)):
        _sync_file_system(number)
    node = blockdev.node_of(device)
    descriptor = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise from_task("fsync", node, error.errno) from error
    finally:
        os.close(descriptor)


def _sync_file_system(device: ids.DeviceNumber) -> None:
    lib, _ = _ffi.load()
    for mount in mount_points(device):  # any of them will do
        try:
            descriptor = os.open(mount.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # unmounted meanwhile, or the process is gone through which it was seen
            continue
        try:
            failed = lib.dmlib_syncfs(descriptor)
        finally:
            os.close(descriptor)
        if failed:
            raise from_task("syncfs", mount.path, failed)
        return


def check_room(pool: str, status: ThinPoolStatus, data_block_size: Sectors, origin_size: Sectors) -> None:
    """
    Refuse a suspend for which the pool may not have the room.

    Dirty pages of one device cannot be told from the rest of the system's, so all of them count, but never more
    than the device can hold.

    Raises:
        OutOfDataSpaceError: Too few free blocks, or none and writes are queued already. Grow the pool first.
    """
    if status.mode is PoolMode.OUT_OF_DATA_SPACE:
        raise OutOfDataSpaceError(pool, status, "is out of data space, and a suspend would wait for it; grow it first")
    dirty = _dirty_bytes()
    at_most = origin_size.bytes if dirty is None else min(dirty, origin_size.bytes)
    needed = DataBlocks(-(-at_most // data_block_size.bytes)) + MARGIN
    if status.free_data < needed:
        raise OutOfDataSpaceError(
            pool, status, f"has {status.free_data} free and a suspend may need {needed.count}; grow it first"
        )


def _dirty_bytes() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            fields = dict(line.split(":", 1) for line in meminfo)
        return sum(int(fields[name].split()[0]) for name in ("Dirty", "Writeback")) * 1024
    except (OSError, KeyError, ValueError):
        return None
