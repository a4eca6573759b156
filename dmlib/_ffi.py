# SPDX-License-Identifier: MIT
"""
The one door to C: the loaded library, its lock, its log, text in and out, versions.

Nothing is loaded, opened or created before the first use. ``lib`` is typed by a Protocol, so that ``Any`` stops
here; a test holds the Protocol against the compiled extension in both directions.

The lock. libdevmapper's state is global and unlocked, and cffi releases the GIL in every call, so all calls happen
under ``lock``, except three kinds: an ioctl that can block and touches none of that state, a wait for udev, and
the pauses between attempts to remove a device. It is re-entrant: a signal handler that uses dmlib runs between two
C calls of the thread that holds it, never inside one.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NewType, Protocol, cast

import dmlib
from dmlib import _control, _kmsg
from dmlib.errors import ArgumentError, DriverUnavailableError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TaskPtr = NewType("TaskPtr", object)
IntPtr = NewType("IntPtr", object)
CookiePtr = NewType("CookiePtr", object)
CString = NewType("CString", object)
Text = bytes | CString
Struct = Any  # a C struct, whose fields mypy cannot know


class Library(Protocol):
    """The compiled extension, as :mod:`dmlib` uses it."""

    DM_DEVICE_CREATE: int
    DM_DEVICE_RELOAD: int
    DM_DEVICE_REMOVE: int
    DM_DEVICE_SUSPEND: int
    DM_DEVICE_RESUME: int
    DM_DEVICE_INFO: int
    DM_DEVICE_DEPS: int
    DM_DEVICE_RENAME: int
    DM_DEVICE_VERSION: int
    DM_DEVICE_STATUS: int
    DM_DEVICE_TABLE: int
    DM_DEVICE_CLEAR: int
    DM_DEVICE_MKNODES: int
    DM_DEVICE_LIST_VERSIONS: int
    DM_DEVICE_TARGET_MSG: int
    DM_DEVICE_REMOVE_ALL: int
    DM_DEVICE_SET_GEOMETRY: int
    DM_DEVICE_GET_TARGET_VERSION: int
    DM_STRING_MANGLING_AUTO: int
    DM_ADD_NODE_ON_RESUME: int
    DM_ADD_NODE_ON_CREATE: int
    DM_UDEV_DISABLE_DM_RULES_FLAG: int
    DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG: int
    DM_UDEV_DISABLE_DISK_RULES_FLAG: int
    DM_UDEV_DISABLE_OTHER_RULES_FLAG: int
    DM_UDEV_LOW_PRIORITY_FLAG: int
    DM_UDEV_DISABLE_LIBRARY_FALLBACK: int

    def dm_task_create(self, type_: int, /) -> TaskPtr: ...
    def dm_task_destroy(self, task: TaskPtr, /) -> None: ...
    def dm_task_set_name(self, task: TaskPtr, name: bytes, /) -> int: ...
    def dm_task_set_uuid(self, task: TaskPtr, uuid: bytes, /) -> int: ...
    def dm_task_set_major_minor(self, task: TaskPtr, major: int, minor: int, fallback: int, /) -> int: ...
    def dm_task_set_newname(self, task: TaskPtr, name: bytes, /) -> int: ...
    def dm_task_set_newuuid(self, task: TaskPtr, uuid: bytes, /) -> int: ...
    def dm_task_set_message(self, task: TaskPtr, message: Text, /) -> int: ...
    def dm_task_set_sector(self, task: TaskPtr, sector: int, /) -> int: ...
    def dm_task_set_ro(self, task: TaskPtr, /) -> int: ...
    def dm_task_no_flush(self, task: TaskPtr, /) -> int: ...
    def dm_task_skip_lockfs(self, task: TaskPtr, /) -> int: ...
    def dm_task_query_inactive_table(self, task: TaskPtr, /) -> int: ...
    def dm_task_deferred_remove(self, task: TaskPtr, /) -> int: ...
    def dm_task_secure_data(self, task: TaskPtr, /) -> int: ...
    def dm_task_set_geometry(
        self, task: TaskPtr, cylinders: bytes, heads: bytes, sectors: bytes, start: bytes, /
    ) -> int: ...
    def dm_task_set_minor(self, task: TaskPtr, minor: int, /) -> int: ...
    def dm_task_set_uid(self, task: TaskPtr, uid: int, /) -> int: ...
    def dm_task_set_gid(self, task: TaskPtr, gid: int, /) -> int: ...
    def dm_task_set_mode(self, task: TaskPtr, mode: int, /) -> int: ...
    def dm_task_set_add_node(self, task: TaskPtr, when: int, /) -> int: ...
    def dm_task_add_target(self, task: TaskPtr, start: int, size: int, type_: bytes, params: Text, /) -> int: ...
    def dm_task_get_driver_version(self, task: TaskPtr, version: CString, size: int, /) -> int: ...
    def dm_task_get_info(self, task: TaskPtr, info: Struct, /) -> int: ...
    def dm_task_get_name(self, task: TaskPtr, /) -> CString: ...
    def dm_task_get_uuid(self, task: TaskPtr, /) -> CString: ...
    def dm_task_get_deps(self, task: TaskPtr, /) -> Struct: ...
    def dm_task_get_versions(self, task: TaskPtr, /) -> Struct: ...
    def dm_task_get_message_response(self, task: TaskPtr, /) -> CString: ...
    def dm_get_next_target(  # the C function's own arity
        self, task: TaskPtr, following: object, start: Struct, length: Struct, type_: Struct, params: Struct, /
    ) -> object: ...
    def dm_get_library_version(self, version: CString, size: int, /) -> int: ...
    def dm_set_name_mangling_mode(self, mode: int, /) -> int: ...
    def dm_dir(self) -> CString: ...
    def dm_set_dev_dir(self, directory: bytes, /) -> int: ...
    def dm_hold_control_dev(self, hold: int, /) -> None: ...
    def dm_lib_release(self) -> None: ...
    def dm_task_update_nodes(self) -> None: ...
    def dm_task_set_cookie(self, task: TaskPtr, cookie: CookiePtr, flags: int, /) -> int: ...
    def dm_udev_wait_immediate(self, cookie: int, ready: IntPtr, /) -> int: ...
    def dm_udev_set_sync_support(self, sync: int, /) -> None: ...
    def dm_udev_get_sync_support(self) -> int: ...
    def dmlib_version(self) -> CString: ...
    def dmlib_log_install(self) -> None: ...
    def dmlib_log_threshold(self, level: int, /) -> None: ...
    def dmlib_log_count(self) -> int: ...
    def dmlib_log_level(self, index: int, /) -> int: ...
    def dmlib_log_text(self, index: int, /) -> CString: ...
    def dmlib_log_clear(self) -> None: ...
    def dmlib_run(self, task: TaskPtr, outcome: IntPtr, /) -> None: ...
    def dmlib_section(
        self,
        hold: Struct,
        holds: int,
        message: Struct,
        sent: Struct,
        messages: int,
        keep_suspended: int,
        gate: IntPtr,
        held_ns: Struct,
        /,
    ) -> None: ...
    def dmlib_gate_abandon(self, gate: IntPtr, /) -> int: ...
    def dmlib_cookie_discard(self, cookie: int, /) -> None: ...
    def dmlib_syncfs(self, descriptor: int, /) -> int: ...
    def dmlib_ima_measurement(self, task: TaskPtr, /) -> int: ...
    def dmlib_wipe(self, text: CString, size: int, /) -> None: ...


lock: Final = threading.RLock()
library_log: Final = logging.getLogger("dmlib.libdm")

_ERROR: Final = 3
_WARNING: Final = 4
_DEBUG: Final = 7
_PYTHON_LEVELS: Final = {2: logging.CRITICAL, 3: logging.ERROR, 4: logging.WARNING, 5: logging.INFO, 6: logging.DEBUG}

_LIBRARY: Final = "libdevmapper.so.1.02.1 (Debian/Ubuntu: libdevmapper1.02.1; Fedora: device-mapper-libs)"
_HOW_TO_BUILD: Final = "build it by installing dmlib again, or in a checkout with: python _build_dm.py"

_loaded: tuple[Library, Any] | None = None
_ready = False


def load() -> tuple[Library, Any]:
    """
    Return the library and cffi's ``ffi``, loaded and set up on first use; the driver is not asked for.

    Raises:
        UnsupportedError: The extension or libdevmapper is missing, or the extension is of another dmlib.
    """
    global _loaded  # noqa: PLW0603 - the library is one per process
    if _loaded is None:
        with lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def _load() -> tuple[Library, Any]:
    try:
        from dmlib import _dm  # type: ignore[attr-defined] # noqa: PLC0415 - compiled, and loaded on first use only
    except ImportError as error:
        need = f"{_LIBRARY} and the compiled extension dmlib._dm ({_HOW_TO_BUILD})"
        raise UnsupportedError("dmlib", need, str(error)) from error
    lib, ffi = cast("Library", _dm.lib), _dm.ffi
    version = ffi.string(_dm.lib.dmlib_version()).decode() if hasattr(_dm.lib, "dmlib_version") else "unknown"
    if version != dmlib.__version__:
        need = f"its own compiled extension ({_HOW_TO_BUILD})"
        raise UnsupportedError(f"dmlib {dmlib.__version__}", need, f"that of dmlib {version}")
    lib.dmlib_log_install()
    lib.dm_hold_control_dev(1)  # a library that closes it would pull it from under a blocked thread
    # dmlib.ids checks names by this rule; DM_DEFAULT_NAME_MANGLING_MODE in the environment could set another one.
    lib.dm_set_name_mangling_mode(lib.DM_STRING_MANGLING_AUTO)
    atexit.register(lib.dmlib_log_threshold, 0)
    lib.dmlib_log_clear()
    return lib, ffi


def _after_fork() -> None:
    """Give the child a control descriptor of its own; what the parent has in hand stays untouched."""
    global _ready  # noqa: PLW0603
    if _loaded is not None:
        lib = _loaded[0]
        lib.dm_hold_control_dev(0)
        lib.dm_lib_release()
        lib.dm_hold_control_dev(1)
        lib.dmlib_log_clear()
    _ready = False
    _kmsg.forget()
    lock.release()


# Here and not in _load: another thread may be in there, with the lock, as the process forks.
os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=_after_fork)


def connect() -> tuple[Library, Any]:
    """
    Return the library and ``ffi``, with the driver known to answer.

    Raises:
        DriverUnavailableError: There is no driver or no permission; asked again each time, never latched.
        UnsupportedError: See :func:`load`.
    """
    loaded = load()
    if not _ready:
        with lock:
            _connect(*loaded)
    return loaded


def _connect(lib: Library, ffi: Any) -> None:
    global _ready  # noqa: PLW0603
    if _ready:
        return
    _control.probe()
    outcome = ffi.new("int *")
    task = lib.dm_task_create(lib.DM_DEVICE_VERSION)
    try:
        if task:
            lib.dmlib_run(task, outcome)
        if outcome[0] != 1:
            said = take_log()[1]
            reason = f"libdevmapper cannot use it{': ' if said else ''}{''.join(said[:1])}"
            raise DriverUnavailableError(None, reason, said)
    finally:
        if task:
            lib.dm_task_destroy(task)
    _close_control_on_exec()
    _ready = True


def _close_control_on_exec() -> None:
    """Find the descriptor that libdevmapper opened without O_CLOEXEC and does not tell, and mend that."""
    control = os.stat(_control.CONTROL_NODE).st_rdev
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        try:
            if os.fstat(descriptor).st_rdev == control:
                os.set_inheritable(descriptor, False)
        except OSError:  # the descriptor of the listing itself, closed by now
            continue


def follow_log_level() -> None:
    """Let the library deliver its debug lines only while someone listens to them."""
    lib, _ = load()
    lib.dmlib_log_threshold(_DEBUG if library_log.isEnabledFor(logging.DEBUG) else _WARNING)


def take_log(*, keep_quiet: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """
    Take the lines that libdevmapper logged on this thread, and pass them on to ``logging``.

    Errors of a call that is about to raise belong to the exception, so they are logged at debug level only.

    Args:
        keep_quiet: Drop all that is less than a warning: it may quote what was sent.

    Returns:
        All lines, and those that are warnings or errors.
    """
    lib, ffi = load()
    count = lib.dmlib_log_count()
    if not count:
        return (), ()
    taken = [(lib.dmlib_log_level(i), ffi.string(lib.dmlib_log_text(i)).decode(errors="replace")) for i in range(count)]
    lib.dmlib_log_clear()
    if keep_quiet:
        taken = [(level, text) for level, text in taken if level <= _WARNING]
    for level, text in taken:
        library_log.log(logging.DEBUG if level <= _ERROR else _PYTHON_LEVELS.get(level, logging.DEBUG), "%s", text)
    return tuple(text for _, text in taken), tuple(text for level, text in taken if level <= _WARNING)


def encode(text: str) -> bytes:
    """Return *text* for C; checked by :mod:`dmlib.ids` before, so it holds no NUL."""
    return os.fsencode(text)


@contextmanager
def text(value: str | bytes | bytearray | memoryview) -> Iterator[Text]:
    """
    Yield text for C. What is given as bytes may be a secret: it is copied to C, and the copy is wiped at the end.

    Raises:
        ArgumentError: Bytes with NUL in them.
    """
    if isinstance(value, str):
        yield encode(value)
        return
    lib, ffi = load()
    size = len(value)
    copy = ffi.new("char[]", size + 1)
    try:
        ffi.memmove(copy, value, size)
        if b"\0" in ffi.buffer(copy, size):
            raise ArgumentError("text", "(secret)", "must not contain NUL")
        yield copy
    finally:
        lib.dmlib_wipe(copy, size + 1)


def decode(ffi: Any, pointer: CString) -> str:
    """Return a C string; bytes that are not UTF-8 survive as surrogates."""
    return os.fsdecode(ffi.string(pointer)) if pointer else ""


def _version(get: Callable[[CString, int], int], ffi: Any) -> str:
    buffer = ffi.new("char[64]")
    get(buffer, 64)
    return decode(ffi, buffer)


def library_version() -> str:
    """
    Return libdevmapper's own version text, such as ``"1.02.185 (2022-05-18)"``; needs no driver.

    Raises:
        UnsupportedError: The library cannot be loaded.
    """
    lib, ffi = load()
    return _version(lib.dm_get_library_version, ffi)
