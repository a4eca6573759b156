# SPDX-License-Identifier: MIT
"""
Whose device it is, by how its uuid begins; and LVM's way of packing three names into one.

Programs that keep mapped devices mark them so, and libdevmapper calls the part before the first ``-`` the subsystem.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from dmlib.errors import ArgumentError
from dmlib.ids import UUID_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable

OWN: Final = UUID_PREFIX.rstrip("-")

# Programs by prefix. Only who is known to keep its own record of its devices counts as an owner: a uuid of any other
# form is a name that somebody gave.
_OTHERS: Final = {
    "LVM": "LVM",
    "CRYPT": "cryptsetup",
    "mpath": "multipath",
    "DMRAID": "dmraid",
    "stratis": "Stratis",
    "VDO": "VDO",
}
_PARTITION: Final = re.compile(r"part[0-9]+-")
_HYPHENS: Final = re.compile(r"(?<!-)((?:--)*)-(?!-)")
_PART_COUNTS: Final = (2, 3)


class Owner(NamedTuple):
    """
    Who keeps a device.

    Attributes:
        program: Its name, for people.
        prefix: How the uuid begins, without the hyphen; in a partition's uuid, ``part`` and its number.
        foreign: Whether it is another program than dmlib.
    """

    program: str
    prefix: str
    foreign: bool

    def __str__(self) -> str:
        return self.program


def owner_of(uuid: str) -> Owner | None:
    """
    Return who keeps the device that has a uuid; ``None`` if it does not say, or there is none.

    >>> str(owner_of("LVM-Yfz3MsxMtCkA9Gl4pDkMp2jxVqUhHr4o"))
    'LVM'
    >>> owner_of("my own")

    Args:
        uuid: The uuid; ``""`` for a device without.
    """
    if _PARTITION.match(uuid):
        return Owner("kpartx", uuid.partition("-")[0], foreign=True)
    prefix, hyphen, _ = uuid.partition("-")
    if not hyphen:
        return None
    if prefix == OWN:
        return Owner("dmlib", prefix, foreign=False)
    program = _OTHERS.get(prefix)
    return None if program is None else Owner(program, prefix, foreign=True)


class LvmName(NamedTuple):
    """
    The parts of the name of one of LVM's devices.

    Attributes:
        group: Name of the volume group.
        volume: Name of the logical volume.
        layer: What part of the volume it is, such as ``tpool``, ``tdata``, ``real``; ``""`` for the volume itself.
    """

    group: str
    volume: str
    layer: str = ""


def split_lvm_name(name: str) -> LvmName:
    """
    Return the parts of a name that LVM gave; a hyphen inside of a part is doubled there.

    >>> split_lvm_name("vg--docker-data")
    LvmName(group='vg-docker', volume='data', layer='')

    Args:
        name: Name of a mapped device.

    Raises:
        ArgumentError: LVM gives no such name.

    Source: lvm(8), dmsetup(8) ``splitname``.
    """
    parts = [part.replace("--", "-") for part in _HYPHENS.sub(r"\1\0", name).split("\0")]
    if len(parts) not in _PART_COUNTS or not all(parts):
        raise ArgumentError("name", name, "must be group-volume or group-volume-layer, with hyphens inside doubled")
    return LvmName(*parts)


def join_lvm_name(group: str, volume: str, layer: str = "") -> str:
    """
    Return the name of the mapped device that LVM makes for a volume.

    >>> join_lvm_name("vg-docker", "data")
    'vg--docker-data'

    Args:
        group: Name of the volume group.
        volume: Name of the logical volume.
        layer: Part of the volume, if it is one.

    Raises:
        ArgumentError: An empty group or volume, or a part that begins with a hyphen, which LVM does not allow.
    """
    parts: Iterable[tuple[str, str]] = (("group", group), ("volume", volume), ("layer", layer))
    for field, part in parts:
        if (not part and field != "layer") or part.startswith("-"):
            raise ArgumentError(field, part, "must be a name that does not begin with '-'")
    return "-".join(part.replace("-", "--") for _, part in parts if part)
