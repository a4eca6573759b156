# SPDX-License-Identifier: MIT
"""
The control node, spoken to directly: is the driver there, which devices are there, and has something happened.

Three things that libdevmapper cannot do for us. Its first failure is latched for the life of the process,
so the driver is probed before it is asked anything; its list fails as a whole when one foreign device
has a name that it cannot unmangle, and has no event numbers before 1.02.213; and waiting by poll takes a descriptor
that it does not give away.

Layout of the request: ``struct dm_ioctl`` of ``linux/dm-ioctl.h``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from typing import Any, Final

from dmlib import ids
from dmlib.errors import DriverUnavailableError, PermissionDeniedError, TaskError, from_task

CONTROL_NODE: Final = "/dev/mapper/control"

_HEADER: Final = struct.Struct("=3I3IiII4xQ128s129s7x")
_DM_VERSION: Final = 0xC138FD00
_DM_LIST_DEVICES: Final = 0xC138FD02
_DM_DEV_ARM_POLL: Final = 0xC138FD10
_BUFFER_FULL: Final = 1 << 8
_WANT_UUID: Final = 1 << 14
_ENTRY: Final = struct.Struct("=QI")
_ENTRY_TAIL: Final = struct.Struct("=II")
_ENTRY_HAS_UUID: Final = 1
_ENTRY_HAS_NO_UUID: Final = 2
EVENT_NR_SINCE: Final = (4, 37, 0)
"""The driver's version from which a list has event numbers, and poll can wait for the next event."""

_DESCRIPTORS_OF_LIBDEVMAPPER: Final = 3  # at the most at once, as it starts

_first_buffer = 1 << 16  # grows with the system and stays grown, so that listing settles at one ioctl


@dataclass(frozen=True, slots=True)
class ListedDevice:
    """
    A device as the driver lists it.

    Attributes:
        name: Its name.
        number: Its number.
        event_nr: Its event counter; ``None`` from drivers before 4.37.
        uuid: Its uuid, ``""`` if it has none; ``None`` where the driver does not list uuids (before 4.45).
    """

    name: str
    number: ids.DeviceNumber
    event_nr: int | None
    uuid: str | None


def _unavailable(code: int | None, reason: str) -> DriverUnavailableError:
    return DriverUnavailableError(code, reason)


def _driver_in_kernel() -> bool:
    try:
        with open("/proc/misc", encoding="ascii") as misc:
            return any(line.split()[1:] == ["device-mapper"] for line in misc)
    except OSError:
        return False


def open_control() -> int:
    """
    Return a new descriptor of the control node.

    Raises:
        DriverUnavailableError: There is none, or this process may not open it.
    """
    try:
        return os.open(CONTROL_NODE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise _unavailable(error.errno, f"there is no {CONTROL_NODE}; load the driver with: modprobe dm-mod") from error
    except PermissionError as error:
        raise _unavailable(error.errno, f"{CONTROL_NODE} may not be opened by this process; root is needed") from error
    except OSError as error:
        missing = error.errno in (errno.ENXIO, errno.ENODEV)
        hint = "the kernel has no device-mapper driver" if missing else error.strerror
        raise _unavailable(error.errno, f"{CONTROL_NODE} cannot be opened: {hint}") from error


def _fill(buffer: bytearray, flags: int = 0, name: bytes = b"", uuid: bytes = b"") -> None:
    _HEADER.pack_into(buffer, 0, 4, 0, 0, len(buffer), _HEADER.size, 0, 0, flags, 0, 0, name, uuid)


def probe() -> tuple[int, int, int]:
    """
    Return the driver's interface version.

    Raises:
        DriverUnavailableError: There is no driver, or this process may not use it.

    Source: DM_VERSION.
    """
    if not os.path.exists(CONTROL_NODE) and os.geteuid() == 0 and _driver_in_kernel():
        return (4, 0, 0)  # libdevmapper makes the node; where the driver is there, that is what is wanted
    descriptor = open_control()
    opened = [descriptor]
    try:
        # Out of descriptors on its first try, libdevmapper would refuse for the rest of the process.
        for _ in range(_DESCRIPTORS_OF_LIBDEVMAPPER):
            opened.append(os.dup(descriptor))  # noqa: PERF401 - each is closed, whichever fails
        if not stat.S_ISCHR(os.fstat(descriptor).st_mode):
            raise _unavailable(None, f"{CONTROL_NODE} is not a device node")
        buffer = bytearray(_HEADER.size)
        _fill(buffer)
        fcntl.ioctl(descriptor, _DM_VERSION, buffer)
    except OSError as error:
        if isinstance(error, DriverUnavailableError):
            raise
        raise _unavailable(error.errno, f"the driver cannot be asked: {error.strerror}") from error
    finally:
        for one in opened:
            os.close(one)
    return struct.unpack_from("=3I", buffer)


def list_devices(name_prefix: str = "", uuid_prefix: str = "") -> list[ListedDevice]:
    """Return mapped devices; see :func:`dmlib.list_devices`."""
    global _first_buffer  # noqa: PLW0603 - a hint for the next call; a lost update costs one more ioctl
    descriptor = open_control()
    try:
        listing = Listing(descriptor, _first_buffer, name_prefix, uuid_prefix)
        devices = listing.read()
        _first_buffer = max(_first_buffer, len(listing.buffer))
        return devices
    finally:
        os.close(descriptor)


class Listing:
    """
    A list that can be taken again and again, and the waiting in between.

    Args:
        descriptor: Of the control node. What poll says of it is of its own, not of the process.
        size: Bytes to begin with; doubled until the list fits.
        name_prefix: List only devices whose name begins so.
        uuid_prefix: List only devices whose uuid begins so.

    Attributes:
        buffer: What the driver writes into.
    """

    def __init__(self, descriptor: int, size: int, name_prefix: str = "", uuid_prefix: str = "") -> None:
        self.descriptor = descriptor
        self.buffer = bytearray(size)
        self._prefixes = ids.check_prefix(name_prefix, "name_prefix"), ids.check_prefix(uuid_prefix, "uuid_prefix")
        # The driver filters from 4.45 on (Linux 5.13) and ignores this before, so the answer is looked through as well.
        self._filter = tuple(ids.mangle(prefix).encode("ascii") for prefix in self._prefixes)

    def arm(self) -> None:
        """Make poll say that the descriptor is readable once something happens from now on."""
        self._call("arm", _DM_DEV_ARM_POLL, bytearray(_HEADER.size))

    def read(self) -> list[ListedDevice]:
        """Return the devices that are there now."""
        while True:
            # The end of an empty list is not copied out, and the buffer may hold the last one.
            _ENTRY.pack_into(self.buffer, _HEADER.size, 0, 0)
            self._call("list", _DM_LIST_DEVICES, self.buffer, _WANT_UUID, *self._filter)
            header = _HEADER.unpack_from(self.buffer)
            if not header[7] & _BUFFER_FULL:
                name, uuid = self._prefixes
                devices = _parse(self.buffer, header[:3], start=header[4])
                return [one for one in devices if one.name.startswith(name) and (one.uuid or "").startswith(uuid)]
            self.buffer = bytearray(2 * len(self.buffer))

    def _call(self, verb: str, request: int, buffer: bytearray, *content: Any) -> None:
        _fill(buffer, *content)
        try:
            fcntl.ioctl(self.descriptor, request, buffer)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise TaskError(verb, "devices", error.errno) from error
            refused = from_task(verb, "devices", error.errno)
            raise refused from (None if isinstance(refused, PermissionDeniedError) else error)


def _aligned(offset: int) -> int:
    return (offset + 7) & ~7


def _text(buffer: bytearray, offset: int) -> tuple[bytes, int]:
    end = buffer.index(0, offset)
    return bytes(buffer[offset:end]), end + 1


def _parse(buffer: bytearray, version: tuple[int, ...], start: int) -> list[ListedDevice]:
    devices: list[ListedDevice] = []
    offset = start
    while True:
        dev, following = _ENTRY.unpack_from(buffer, offset)
        if not dev:  # the driver's way of saying that there are none
            return devices
        name, end = _text(buffer, offset + _ENTRY.size)
        event_nr = uuid = None
        if version >= EVENT_NR_SINCE:
            tail = _aligned(end)
            event_nr, flags = _ENTRY_TAIL.unpack_from(buffer, tail)
            if flags & _ENTRY_HAS_UUID:
                uuid = ids.unmangle(_text(buffer, _aligned(tail + _ENTRY_TAIL.size))[0])
            elif flags & _ENTRY_HAS_NO_UUID:
                uuid = ""
        devices.append(ListedDevice(ids.unmangle(name), ids.DeviceNumber.from_dev(dev), event_nr, uuid))
        if not following:
            return devices
        offset += following
