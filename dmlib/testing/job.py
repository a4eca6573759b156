# SPDX-License-Identifier: MIT
"""What a guest is to do."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Folders of the host that the guest covers with its own; what the command needs below them is shown again.
COVERED = ("/tmp", "/run", "/dev", "/proc", "/sys")  # noqa: S108 - the guest's own /tmp
# Private to the guest: the host's whole tree as it is below the covers, and what the runner puts there.
GUEST_HOME = "/run/dmlib"
HOST_TREE = GUEST_HOME + "/host"
# Where a modprobe of the guest's own stands in if the host has no /lib/modules to mount on.
MODPROBE_HOME = GUEST_HOME + "/modprobe"

# These name folders which the guest does not have or must not write to.
_DROPPED_VARIABLES = ("TMPDIR", "TMP", "TEMP", "XDG_RUNTIME_DIR")
_ROOTS_PATH = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin")
_MEMORY = re.compile(r"[1-9][0-9]*[MG]")
_DISK_NAME = re.compile(r"[a-z][a-z0-9-]{0,15}")
_DISK_SIZE = re.compile(r"([1-9][0-9]*)([MGT])")
_DISKS_LIMIT = 8
# Where a guest has its disks by name.
DISKS = "/dev/dmlib"


@dataclass(frozen=True, kw_only=True)
class Job:
    """
    One command for one guest.

    Attributes:
        command: Program and arguments, run as root.
        cwd: Folder to run it in; None is the caller's.
        env: The whole environment; None is the caller's.
        extra_env: Variables on top of it.
        udev: Whether udevd runs in the guest. Without it libdevmapper makes the nodes itself.
        cpus: Number of processors.
        memory: Size of the guest's memory, such as ``"1G"`` or ``"512M"``.
        writable: Folders of the host that the command may change; all else is read-only.
        disks: Sizes of empty disks by name, such as ``{"data": "16G"}``; the guest has them as ``/dev/dmlib/<name>``.
        timeout: Seconds until the guest is killed, boot included; None waits for ever.
    """

    command: Sequence[str]
    cwd: str | None = None
    env: Mapping[str, str] | None = None
    extra_env: Mapping[str, str] = field(default_factory=dict)
    udev: bool = False
    cpus: int = 1
    memory: str = "1G"
    writable: Sequence[str] = ()
    disks: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.command, str) or not self.command:
            raise ValueError("command must be a list with at least the program's name")
        if _MEMORY.fullmatch(self.memory) is None:
            raise ValueError(f"memory must be a number with M or G, such as 1G, not {self.memory!r}")
        if self.cpus < 1:
            raise ValueError(f"cpus must be at least 1, not {self.cpus}")
        if self.timeout is not None and self.timeout <= 0:
            raise ValueError(f"timeout must be positive, not {self.timeout}")
        for folder in self.writable:
            if not os.path.isdir(folder):
                raise ValueError(f"writable folder {folder!r} does not exist")
            if re.search(r"[,\s\\]", os.path.abspath(folder)):
                # Mount options and kernel command lines have no quoting that all kinds of guest understand.
                raise ValueError(f"writable folder {folder!r} has a comma, a backslash or a space in its path")
        self._check_disks()
        for name, value in self.extra_env.items():
            if not name or "=" in name or "\0" in name + value:
                raise ValueError(f"{name!r} cannot be the name of an environment variable")

    def _check_disks(self) -> None:
        if len(self.disks) > _DISKS_LIMIT:
            raise ValueError(f"a guest has at most {_DISKS_LIMIT} disks, not {len(self.disks)}")
        for name, size in self.disks.items():
            if _DISK_NAME.fullmatch(name) is None:
                raise ValueError(f"the name of a disk must be a short word of a-z, 0-9 and -, not {name!r}")
            if _DISK_SIZE.fullmatch(size) is None:
                raise ValueError(f"disk {name} must have a size with M, G or T, such as 16G, not {size!r}")

    @property
    def folder(self) -> str:
        """Absolute path of the folder that the command runs in."""
        return os.path.abspath(self.cwd) if self.cwd is not None else os.getcwd()

    @property
    def writable_folders(self) -> list[str]:
        """Absolute paths of the writable folders."""
        return [os.path.abspath(folder) for folder in self.writable]

    def make_disks(self, folder: str) -> list[str]:
        """Make the files of the disks, which take no room until they are written, and return their paths."""
        paths = []
        for name, size in self.disks.items():
            number, unit = size[:-1], size[-1]
            paths.append(os.path.join(folder, f"disk-{name}"))
            with open(paths[-1], "xb") as file:
                file.truncate(int(number) << {"M": 20, "G": 30, "T": 40}[unit])
        return paths

    def environment(self) -> dict[str, str]:
        """Return the command's environment inside a guest."""
        env = dict(os.environ if self.env is None else self.env)
        for name in _DROPPED_VARIABLES:
            env.pop(name, None)
        # An ordinary user's PATH often lacks the folders that hold dmsetup and its like.
        path = [entry for entry in env.get("PATH", "").split(":") if entry]
        own = [] if os.path.isdir("/lib/modules") else [MODPROBE_HOME + "/bin"]
        env["PATH"] = ":".join([*own, *path, *(entry for entry in _ROOTS_PATH if entry not in path)])
        if not self.udev:
            env["DM_DISABLE_UDEV"] = "1"
        env.update(self.extra_env)
        return env

    def shown(self) -> list[str]:
        """Return what the command names below covered folders: it must find these in the guest as well."""
        named = [self.folder, sys.prefix, sys.base_prefix, *self.command]
        named += os.environ.get("PYTHONPATH", "").split(os.pathsep)
        wanted = {os.path.abspath(path) for path in named if os.path.isabs(path) and os.path.exists(path)}
        kept = [path for path in wanted if _below(path, COVERED[:2]) and not _below(path, self.writable_folders)]
        # A folder that is shown shows all below it.
        return sorted(path for path in kept if not any(_below(path, [other]) for other in kept if other != path))


def _below(path: str, folders: Iterable[str]) -> bool:
    return any(path.startswith(folder.rstrip("/") + "/") for folder in folders)
