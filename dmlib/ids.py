# SPDX-License-Identifier: MIT
r"""
Names, uuids, thin ids and device numbers, checked by the rules of the kernel and of libdevmapper.

libdevmapper stores every byte of a name that udev would not like as ``\xNN`` ("mangling"), and
undoes it when reading. dmlib leaves that to it, but needs the mangled form for two things: the length
limit counts its bytes, and the device node carries it.
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from dmlib.errors import ArgumentError

if TYPE_CHECKING:
    from os import PathLike

NAME_LIMIT: Final = 127
"""Bytes in a mangled name (DM_NAME_LEN less its NUL)."""

UUID_LIMIT: Final = 128
"""Bytes in a mangled uuid (DM_UUID_LEN less its NUL)."""

TARGET_TYPE_LIMIT: Final = 15
"""Bytes in the name of a target type (DM_MAX_TYPE_NAME less its NUL)."""

THIN_ID_LIMIT: Final = (1 << 24) - 1
"""Highest thin id: the metadata keeps 24 bits."""

UUID_PREFIX: Final = "DMLIB-"
"""How the uuid of every device begins that dmlib creates on its own account."""

_UNMANGLED: Final = re.compile(rb"[0-9A-Za-z#+\-.:=@_]")
_MANGLED_BYTE: Final = re.compile(rb"\\x([0-9A-Fa-f]{2})")


def mangle(text: str) -> str:
    r"""
    Return *text* as libdevmapper stores it: bytes outside its list become ``\xNN``.

    >>> mangle("my disk")
    'my\\x20disk'
    """
    raw = os.fsencode(text)
    return "".join(chr(byte) if _UNMANGLED.match(bytes((byte,))) else f"\\x{byte:02x}" for byte in raw)


def unmangle(raw: bytes) -> str:
    """Return a stored name or uuid as people write it; bytes that are not UTF-8 survive as surrogates."""
    return os.fsdecode(_MANGLED_BYTE.sub(lambda match: bytes((int(match[1], 16),)), raw))


def _check_text(text: str, field: str, limit: int) -> str:
    if not isinstance(text, str):
        msg = f"{field} must be a str, not {type(text).__name__}"
        raise TypeError(msg)
    if not text:
        raise ArgumentError(field, text, "must not be empty")
    if "\0" in text:
        raise ArgumentError(field, text, "must not contain NUL")
    if "\\x" in text:
        raise ArgumentError(field, text, r"must not contain \x: libdevmapper would take it for a mangled byte")
    try:
        size = len(mangle(text))
    except UnicodeEncodeError:
        raise ArgumentError(field, text, "must be encodable as UTF-8") from None
    if size > limit:
        raise ArgumentError(
            field, text, rf"must have at most {limit} bytes, has {size} (each unusual byte is stored as \xNN, 4 bytes)"
        )
    return text


def check_name(name: str, field: str = "name") -> str:
    """
    Return *name* if a mapped device can have it.

    Raises:
        ArgumentError: Empty, more than 127 bytes as stored, ``.``, ``..``, ``control``, or with ``/`` or NUL in it.
    """
    _check_text(name, field, NAME_LIMIT)
    if "/" in name:
        raise ArgumentError(field, name, "must not contain '/'")
    if name in (".", "..", "control"):
        raise ArgumentError(field, name, "is taken in the directory of device nodes")
    return name


def check_uuid(uuid: str, field: str = "uuid") -> str:
    """
    Return *uuid* if a mapped device can have it.

    Raises:
        ArgumentError: Empty, more than 128 bytes as stored, or with NUL in it.
    """
    return _check_text(uuid, field, UUID_LIMIT)


def check_thin_id(thin_id: int, field: str = "thin_id") -> int:
    """
    Return *thin_id* if a pool can hold it.

    Raises:
        TypeError: Not a whole number.
        ArgumentError: Outside 0..16777215.
    """
    if type(thin_id) is not int:
        msg = f"{field} must be an int, not {type(thin_id).__name__}"
        raise TypeError(msg)
    if not 0 <= thin_id <= THIN_ID_LIMIT:
        raise ArgumentError(field, thin_id, f"must be 0..{THIN_ID_LIMIT} (24 bits)")
    return thin_id


def check_target_type(target_type: str) -> str:
    """
    Return *target_type* if it can be sent to the kernel.

    Raises:
        ArgumentError: Empty, longer than 15 bytes, or not plain ASCII without white space.
    """
    if not re.fullmatch(r"[!-~]{1,15}", target_type):
        raise ArgumentError(
            "target_type", target_type, f"must be 1..{TARGET_TYPE_LIMIT} ASCII characters without white space"
        )
    return target_type


class DeviceNumber(NamedTuple):
    """
    The kernel's number of a block device.

    >>> str(DeviceNumber(253, 7)), DeviceNumber.parse("253:7").minor
    ('253:7', 7)
    """

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}:{self.minor}"

    @classmethod
    def from_dev(cls, dev: int) -> Self:
        """Return a packed ``dev_t``, as in ``st_rdev`` or a dm ioctl, taken apart."""
        return cls(os.major(dev), os.minor(dev))

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Read ``"major:minor"``.

        Raises:
            ArgumentError: Not of that form.
        """
        match = re.fullmatch(r"(\d{1,4}):(\d{1,7})", text, re.ASCII)
        if match is None:
            raise ArgumentError("device", text, "must be major:minor")
        return cls(int(match[1]), int(match[2]))


def path_text(path: str | PathLike[str], field: str, or_else: str = "") -> str:
    """
    Return a path as text.

    Args:
        path: It, or something that has one.
        field: What to call the value in the error.
        or_else: What else may stand there, for the error.

    Raises:
        TypeError: It is none.
    """
    try:
        return os.fsdecode(os.fspath(path))
    except TypeError:
        kind = type(path).__name__
        raise TypeError(f"{field} must be {or_else}a path or something with a path, not {kind}") from None


def check_prefix(prefix: str, field: str) -> str:
    """
    Return the beginning of a name or uuid.

    Raises:
        TypeError: It is no str.
    """
    if not isinstance(prefix, str):
        raise TypeError(f"{field} must be a str, not {type(prefix).__name__}")
    return prefix


def device_number(device: str | PathLike[str] | DeviceNumber, field: str = "device") -> DeviceNumber:
    """
    Return the number of a block device given by number, by path, or by anything with a path.

    Tables are always written with numbers: libdevmapper doubles backslashes in parameters, so a path with an
    unusual character would reach the kernel changed.

    Args:
        device: A DeviceNumber, the path of a block device or of a link to one, or an object with such a path
            (``Device``, ``LoopDevice``).
        field: What to call the value in the error.

    Raises:
        ArgumentError: Nothing is there, or it is not a block device.
        TypeError: Neither a number nor a path.
    """
    if isinstance(device, DeviceNumber):
        return device
    path = path_text(device, field, "a DeviceNumber, ")
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "NUL in the path"
        raise ArgumentError(field, path, f"must be a block device ({reason})") from error
    if not stat.S_ISBLK(status.st_mode):
        raise ArgumentError(field, path, "must be a block device")
    return DeviceNumber.from_dev(status.st_rdev)
