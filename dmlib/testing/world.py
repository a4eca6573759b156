# SPDX-License-Identifier: MIT
"""The kernel and the system that a test meets: what they lack, and what a test has left behind in them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dmlib

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def udev_runs() -> bool:
    """Return whether a udevd runs that libdevmapper would work with."""
    return os.path.exists("/run/udev/control") and "DM_DISABLE_UDEV" not in os.environ


def missing(*, targets: Sequence[str] = (), driver: Sequence[int] = (), udev: bool | None = None) -> str:
    """
    Return what is not here of what a test needs, in a sentence; ``""`` if all is.

    Args:
        targets: Target types; the module of one that is not there yet is loaded.
        driver: Least version of the driver's interface.
        udev: Whether a udevd must run, or must not.
    """
    try:
        version = dmlib.driver_version()
    except dmlib.DmError as error:
        return str(error)
    if tuple(driver) > version:
        return f"driver {_dotted(driver)} is needed, and this is {_dotted(version)}"
    if udev is not None and udev is not udev_runs():
        return "udevd is needed, and none runs here" if udev else "udevd runs here, and must not"
    absent = [target for target in targets if not _has_target(target)]
    return f"the kernel has no target {' and no target '.join(absent)}" if absent else ""


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _has_target(name: str) -> bool:
    if name in dmlib.target_versions():
        return True
    with contextlib.suppress(FileNotFoundError):  # without modprobe the kernel loads nothing either
        subprocess.run(["modprobe", "--quiet", f"dm-{name}"], check=False)
    return name in dmlib.target_versions()


@dataclass(frozen=True)
class Leftovers:
    """
    What a test could leave behind.

    Attributes:
        devices: Names of mapped devices.
        nodes: Entries of ``/dev/mapper``.
        loops: Loop devices in use.
        semaphores: The kernel's semaphores, udev cookies among them.
        mounts: Lines of this process's mount table.
        descriptors: Open descriptors of this process, but for the two that dmlib keeps.
        threads: Threads of this process.
    """

    devices: frozenset[str]
    nodes: frozenset[str]
    loops: frozenset[str]
    semaphores: frozenset[str]
    mounts: frozenset[str]
    descriptors: frozenset[str]
    threads: frozenset[str]

    @classmethod
    def now(cls) -> Leftovers:
        """Return what is there now."""
        # A dummy is Python's note of a thread started in C that once logged; before 3.12 it outlives it.
        dummy: Any = getattr(threading, "_DummyThread", ())
        return cls(
            devices=frozenset(device.name for device in dmlib.list_devices()),
            nodes=frozenset(os.listdir("/dev/mapper")),
            loops=frozenset(name for name in os.listdir("/sys/block") if os.path.exists(f"/sys/block/{name}/loop")),
            semaphores=frozenset(_lines("/proc/sysvipc/sem")[1:]),
            mounts=frozenset(_lines("/proc/self/mountinfo")),
            descriptors=frozenset(_descriptors()),
            threads=frozenset(one.name for one in threading.enumerate() if not isinstance(one, dummy)),
        )

    def beyond(self, before: Leftovers) -> dict[str, list[str]]:
        """Return what is there that was not there *before*, by kind."""
        more = {kind: getattr(self, kind) - getattr(before, kind) for kind in self.__dataclass_fields__}
        return {kind: sorted(names) for kind, names in more.items() if names}

    @staticmethod
    def remove(left: dict[str, list[str]]) -> None:
        """Remove the devices of :meth:`beyond`, as far as they can be, so that later tests fare well."""
        for name in reversed(left.get("devices", ())):
            with contextlib.suppress(dmlib.DmError):
                dmlib.Device(name).remove()
        for name in left.get("loops", ()):
            with contextlib.suppress(dmlib.DmError):
                dmlib.LoopDevice(f"/dev/{name}").detach(lazy=True)


def _lines(path: str) -> list[str]:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read().splitlines()


def _descriptors() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one of this listing
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.endswith(("/mapper/control", "/dev/kmsg", "/fd")):
                yield f"{name} {target}"
