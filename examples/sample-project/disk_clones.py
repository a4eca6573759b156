# SPDX-License-Identifier: MIT
"""Writable clones of a disk image, each of which takes only the room of what was changed in it."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from dmlib import Sectors

if TYPE_CHECKING:
    from dmlib import ThinDevice, ThinPool

BLOCK = 1 << 20


class Clones:
    """
    An image in a pool, and the clones of it.

    Args:
        pool: A pool that holds nothing else.
    """

    def __init__(self, pool: ThinPool) -> None:
        self.pool = pool
        self.base: ThinDevice | None = None
        self.clones: dict[str, ThinDevice] = {}

    def import_image(self, path: str | os.PathLike[str]) -> None:
        """Copy an image file, whose size must be a multiple of 512, into the pool."""
        self.base = self.pool.create_thin(0, Sectors.from_bytes(os.path.getsize(path)))
        with open(path, "rb") as image, open(self.base.path, "r+b") as device:
            shutil.copyfileobj(image, device, BLOCK)
            device.flush()
            os.fsync(device.fileno())

    def clone(self, name: str) -> str:
        """Make a clone and return the path of its device."""
        if self.base is None:
            raise LookupError("there is no image yet")
        self.clones[name] = self.base.snapshot(free_id(self.clones), name=f"{self.pool.name}-{name}")
        return self.clones[name].path

    def discard(self, name: str) -> None:
        """Throw a clone away; the room it took is free again."""
        clone = self.clones.pop(name)
        clone.deactivate()
        clone.delete()


def free_id(clones: dict[str, ThinDevice]) -> int:
    """Return the lowest thin id that no clone has; 0 is the image's."""
    used = {clone.thin_id for clone in clones.values()}
    return next(number for number in range(1, len(used) + 2) if number not in used)
