# SPDX-License-Identifier: MIT
"""Reading what libdevmapper has for a task that was carried out: everything is copied, nothing points into C."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dmlib import _ffi, ids
from dmlib.results import DeviceInfo

if TYPE_CHECKING:
    from dmlib._ffi import Library, TaskPtr

Lines = tuple[tuple[int, int, str, str], ...]
Versions = tuple[tuple[str, tuple[int, int, int]], ...]


def info(lib: Library, ffi: Any, task: TaskPtr) -> tuple[bool, DeviceInfo]:
    """Return whether the device is there, and its state."""
    raw = ffi.new("struct dm_info *")
    there = bool(lib.dm_task_get_info(task, raw) and raw.exists)
    return there, DeviceInfo(
        name=_ffi.decode(ffi, lib.dm_task_get_name(task)),
        uuid=_ffi.decode(ffi, lib.dm_task_get_uuid(task)),
        number=ids.DeviceNumber(raw.major, raw.minor),
        suspended=bool(raw.suspended),
        internal_suspend=bool(raw.internal_suspend),
        live_table=bool(raw.live_table),
        inactive_table=bool(raw.inactive_table),
        open_count=raw.open_count,
        event_nr=raw.event_nr,
        target_count=raw.target_count,
        readonly=bool(raw.read_only),
        deferred_remove=bool(raw.deferred_remove),
    )


def lines(lib: Library, ffi: Any, task: TaskPtr) -> Lines:
    """Return table or status, a tuple for each segment."""
    start, length = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    target_type, params = ffi.new("char **"), ffi.new("char **")
    found = []
    following = ffi.NULL
    while True:
        following = lib.dm_get_next_target(task, following, start, length, target_type, params)
        if target_type[0]:
            found.append((start[0], length[0], _ffi.decode(ffi, target_type[0]), _ffi.decode(ffi, params[0])))
        if not following:
            return tuple(found)


def deps(lib: Library, task: TaskPtr) -> tuple[ids.DeviceNumber, ...]:
    """Return the devices that the table stands on."""
    below = lib.dm_task_get_deps(task)
    return tuple(ids.DeviceNumber.from_dev(below.device[i]) for i in range(below.count))


def response(lib: Library, ffi: Any, task: TaskPtr) -> str | None:
    """Return a target's answer, if it gave one."""
    pointer = lib.dm_task_get_message_response(task)
    return _ffi.decode(ffi, pointer) if pointer else None


def driver_version(lib: Library, ffi: Any, task: TaskPtr) -> Versions:
    """Return the driver's version under the name ``driver``."""
    buffer = ffi.new("char[64]")
    if not lib.dm_task_get_driver_version(task, buffer, 64):
        return ()
    major, minor, patch = (int(part) for part in _ffi.decode(ffi, buffer).split("."))
    return (("driver", (major, minor, patch)),)


def target_versions(lib: Library, ffi: Any, task: TaskPtr) -> Versions:
    """Return names and versions of targets."""
    entry = lib.dm_task_get_versions(task)
    found = []
    while True:
        name = _ffi.decode(ffi, ffi.cast("char *", entry.name))
        found.append((name, (entry.version[0], entry.version[1], entry.version[2])))
        if not entry.next:
            return tuple(found)
        entry = ffi.cast("struct dm_versions *", ffi.cast("char *", entry) + entry.next)
