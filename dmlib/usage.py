# SPDX-License-Identifier: MIT
"""
Who uses a block device, as far as it can be seen from here: devices on top, mounts, swap, open descriptors.

All of it is read from ``/sys`` and ``/proc``, and where these are not mounted the answer is "nobody". It is a look
at a moving scene, for people and for error messages: what ends while it is read is left out, and so is what this
process may not read (the descriptors of other users' processes, without root). Not to be seen at all are mounts in
a namespace that no process lives in, threads with descriptors of their own, and mappings of a closed descriptor.
"""

from __future__ import annotations

import os
import re
import stat
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from dmlib.errors import ArgumentError
from dmlib.ids import DeviceNumber, path_text, unmangle
from dmlib.sysfs import entries, node_number, number_in, read

if TYPE_CHECKING:
    from collections.abc import Iterator

_ESCAPED: Final = re.compile(rb"\\([0-7]{3})")
# Looking at a file of one of these can wait for a server, or for the very process that is being examined.
_MAY_HANG: Final = ("nfs", "cifs", "smb", "fuse", "9p", "ceph", "afs", "autofs", "gfs", "ocfs", "lustre", "virtiofs")


@dataclass(frozen=True, slots=True)
class User:
    """
    One user of a block device; ``str(user)`` is half a sentence for an error message.

    Attributes:
        kind: ``"holder"``: a device on top of it. ``"mount"``: a file system on it, mounted. ``"swap"``: the kernel
            swaps to it. ``"opener"``: a process has it open.
        name: The holder's name, the mount point as its own namespace sees it, the swap's path, the process's command.
        number: The device that is used: the one asked about or a partition of it. For a holder, the holder itself.
        pid: The opener; for a mount in another mount namespace, a process that lives there.
        command: The command of that process.
    """

    kind: Literal["holder", "mount", "swap", "opener"]
    name: str
    number: DeviceNumber
    pid: int | None = None
    command: str = ""

    def __str__(self) -> str:
        name = self.name if self.name.isprintable() else ascii(self.name)
        if self.kind == "holder":
            return f"held by device {name} ({self.number})"
        if self.kind == "swap":
            return f"used as swap ({name})"
        if self.kind == "opener":
            return f"open in pid {self.pid} ({name})"
        where = "" if self.pid is None else f" in the mount namespace of pid {self.pid} ({self.command})"
        return f"mounted on {name}{where}"


@dataclass(frozen=True, slots=True)
class MountPoint:
    """
    A place where a file system can be reached from this process, whatever mount namespace it is mounted in.

    Attributes:
        path: Path for this process. In another namespace it leads through ``/proc/<pid>/root`` and is gone once that
            process is.
        root: What of the file system is mounted there; ``/`` unless it is a bind mount or a subvolume.
        pid: For a mount in another mount namespace, the process it is reached through.
    """

    path: str
    root: str
    pid: int | None


class _Mount(NamedTuple):
    """A line of ``/proc/<pid>/mountinfo``."""

    mount_id: int
    number: DeviceNumber
    root: str
    point: str
    fs_type: str
    source: str


class _View(NamedTuple):
    """The mounts that one process sees, and others with the same mount namespace and root directory."""

    pid: int | None  # None for this process's own
    root: str
    mounts: list[_Mount]


def users_of(number: DeviceNumber) -> list[User]:
    """
    Return who uses a block device or one of its partitions: what keeps it from being removed or claimed.

    Args:
        number: The device.

    Returns:
        Devices on top, then mounts in every mount namespace (one for each namespace), swap, and processes that have
        it open, this one included. A process is listed once, however often it has it open.

    Cost: no ioctl and no fork; some calls for each process of the system and each of its descriptors.

    Source: sysfs, ``holders``; proc(5), ``mountinfo``, ``swaps``, ``fd``.
    """
    targets = {number, *_partitions(number)}
    users = [User("holder", name, above) for target in sorted(targets) for above, name in _holders(target)]
    views = _views()
    aliases = targets.union(*map(_same_btrfs, targets))
    seen: set[int] = set()
    for view in views.values():
        for mount in view.mounts:
            used = _used_by(mount, view, targets, aliases)
            if used is not None and mount.mount_id not in seen:
                seen.add(mount.mount_id)
                command = _command(view.pid) if view.pid is not None else ""
                users.append(User("mount", mount.point, used, view.pid, command))
    users += [User("swap", name, used) for name, used in _swaps() if used in targets]
    for pid in _pids():
        seen_by = views.get(_view_key(pid))
        used = _opened_by(pid, seen_by.mounts if seen_by else [], targets)
        if used is not None:
            users.append(User("opener", _command(pid), used, pid, _command(pid)))
    return users


def stacked_on(number: DeviceNumber) -> list[DeviceNumber]:
    """
    Return the devices that stand on a block device, directly or on top of one another.

    They are mapped devices, RAID arrays and whatever else registers as a holder, partitions, and loop devices over
    the device's node. A loop device over a *file* on it is not among them.

    Args:
        number: The device, which is not among them either.

    Returns:
        Them, nearer ones first; each once. Empty without sysfs, or if there is no such device.

    Source: sysfs, ``holders``, ``partition``, ``loop/backing_file``.
    """
    found: dict[DeviceNumber, None] = {}
    todo = deque([number])
    while todo:
        below = todo.popleft()
        for above in (*_partitions(below), *(holder for holder, _name in _holders(below))):
            if above not in found and above != number:
                found[above] = None
                todo.append(above)
    return list(found)


def mount_points(number: DeviceNumber) -> list[MountPoint]:
    """
    Return where the file system on a block device can be reached, in this and in other mount namespaces.

    All of them are one and the same file system, so for ``syncfs`` the first will do. What another mount hides is
    left out, and so is what is no directory or regular file, which could not be opened without side effects.

    Args:
        number: The device itself; for what is stacked on it, ask :func:`stacked_on` first.

    Returns:
        This process's own namespace first, and in it whole file systems before bind mounts. Empty if nothing is
        mounted, or without ``/proc``.

    Source: proc(5), ``mountinfo``, ``fdinfo``.
    """
    aliases = _same_btrfs(number)
    found = []
    seen = set()
    for view in _views().values():
        for mount in view.mounts:
            if _used_by(mount, view, {number}, aliases) is None or mount.mount_id in seen:
                continue
            path = mount.point if view.pid is None else f"/proc/{view.pid}/root{mount.point}"
            if _leads_to(path, mount.mount_id):
                seen.add(mount.mount_id)
                found.append(MountPoint(path, mount.root, view.pid))
    return sorted(found, key=lambda place: (place.pid is not None, place.root != "/"))


def device_under(path: str | os.PathLike[str]) -> DeviceNumber:
    """
    Return the block device of the file system that a path lies in.

    Args:
        path: A file or directory.

    Raises:
        ArgumentError: Nothing is there, or its file system is not on one block device that can be told (tmpfs, NFS,
            overlay).

    Source: stat(2); for file systems with numbers of their own (btrfs), proc(5), ``mountinfo``.
    """
    name = path_text(path, "path")
    try:
        descriptor = os.open(name, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "NUL in the path"
        raise ArgumentError("path", name, f"must lead to a file or directory ({reason})") from error
    try:
        number = DeviceNumber.from_dev(os.fstat(descriptor).st_dev)
        mount_id = _mount_id(descriptor)
    finally:
        os.close(descriptor)
    if number.major:
        return number
    mount = next((one for one in _mounts("self") or () if one.mount_id == mount_id), None)
    source = None if mount is None else node_number(mount.source)
    if source is None:
        kind = "unknown" if mount is None else mount.fs_type
        raise ArgumentError("path", name, f"must lie in a file system on a block device, and this is {kind}")
    return source


def _mount_id(descriptor: int) -> int | None:
    info = read(f"/proc/self/fdinfo/{descriptor}") or ""
    return next((int(line.split()[1]) for line in info.splitlines() if line.startswith("mnt_id:")), None)


# -- devices on top


def _partitions(number: DeviceNumber) -> list[DeviceNumber]:
    directory = f"/sys/dev/block/{number}"
    inside = [f"{directory}/{name}" for name in entries(directory)]
    numbers = [number_in(f"{one}/dev") for one in inside if os.path.exists(f"{one}/partition")]
    return [number for number in numbers if number is not None]


def _holders(number: DeviceNumber) -> list[tuple[DeviceNumber, str]]:
    found = []
    directory = f"/sys/dev/block/{number}/holders"
    for kernel_name in entries(directory):
        above = number_in(f"{directory}/{kernel_name}/dev")
        mapped = read(f"{directory}/{kernel_name}/dm/name")
        if above is not None:
            found.append((above, kernel_name if mapped is None else unmangle(os.fsencode(mapped))))
    for kernel_name in entries("/sys/block"):
        backing = read(f"/sys/block/{kernel_name}/loop/backing_file") if kernel_name.startswith("loop") else None
        if backing is not None and node_number(backing) == number:
            above = number_in(f"/sys/block/{kernel_name}/dev")
            if above is not None:
                found.append((above, kernel_name))
    return sorted(found)


def _same_btrfs(number: DeviceNumber) -> set[DeviceNumber]:
    """Return all devices of the btrfs that a device is part of: its mounts show but one of them."""
    for file_system in entries("/sys/fs/btrfs"):
        devices = f"/sys/fs/btrfs/{file_system}/devices"
        members = {number_in(f"{devices}/{name}/dev") for name in entries(devices)}
        if number in members:
            return {member for member in members if member is not None}
    return {number}


# -- mounts


def _unescape(text: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda match: bytes((int(match[1], 8),)), text))


def _mounts(pid: int | str) -> list[_Mount] | None:
    try:
        with open(f"/proc/{pid}/mountinfo", "rb") as file:
            lines = file.read().splitlines()
    except OSError:  # the process is gone, or not ours to look at
        return None
    mounts = []
    for line in lines:
        left, _separator, right = line.partition(b" - ")
        mount_id, _parent, number, root, point, *_options = left.split(b" ")
        fs_type, source, *_super_options = right.split(b" ")
        mounts.append(
            _Mount(
                int(mount_id),
                DeviceNumber.parse(number.decode("ascii")),
                _unescape(root),
                _unescape(point),
                _unescape(fs_type),
                _unescape(source),
            )
        )
    return mounts


def _view_key(pid: int | str) -> tuple[str, str] | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt"), os.readlink(f"/proc/{pid}/root")
    except OSError:
        return None


def _views() -> dict[tuple[str, str] | None, _View]:
    """Return what can be seen of the mounts of all processes, this one's first."""
    views: dict[tuple[str, str] | None, _View] = {}
    everybody: list[int | str] = ["self", *_pids()]
    for pid in everybody:
        key = _view_key(pid)
        if key is None or key in views:
            continue
        mounts = _mounts(pid)
        if mounts is not None:
            views[key] = _View(pid if isinstance(pid, int) else None, f"/proc/{pid}/root", mounts)
    return views


def _used_by(mount: _Mount, view: _View, targets: set[DeviceNumber], aliases: set[DeviceNumber]) -> DeviceNumber | None:
    """Return which of *targets* a mount uses; a file system with a number of its own is known by its source."""
    if mount.number in targets:
        return mount.number
    if mount.number.major == 0:
        source = node_number(mount.source, view.root) or node_number(mount.source)
        if source in aliases:
            return source if source in targets else min(targets & _same_btrfs(source), default=None)
    return None


def _leads_to(path: str, mount_id: int) -> bool:
    """Return whether a path ends on that mount, and can be opened as a file; O_PATH does not open it yet."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        mode = os.fstat(descriptor).st_mode
        reached = _mount_id(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return reached == mount_id and (stat.S_ISDIR(mode) or stat.S_ISREG(mode))


# -- swap and processes


def _swaps() -> Iterator[tuple[str, DeviceNumber]]:
    for line in (read("/proc/swaps") or "").splitlines()[1:]:
        name = _unescape(os.fsencode(line.split()[0]))
        number = node_number(name)
        if number is not None:
            yield name, number


def _pids() -> list[int]:
    return sorted(int(name) for name in entries("/proc") if name.isdecimal())


def _command(pid: int) -> str:
    command = read(f"/proc/{pid}/comm") or "gone"
    return command if command.isprintable() else ascii(command)


def _may_hang(path: str, mounts: list[_Mount]) -> bool:
    holding = [mount for mount in mounts if path.startswith(mount.point.rstrip("/") + "/")]
    return max(holding, key=lambda mount: len(mount.point)).fs_type.startswith(_MAY_HANG) if holding else False


def _opened_by(pid: int, mounts: list[_Mount], targets: set[DeviceNumber]) -> DeviceNumber | None:
    for name in entries(f"/proc/{pid}/fd"):
        link = f"/proc/{pid}/fd/{name}"
        try:
            target = os.readlink(link)
            if not target.startswith("/") or _may_hang(target, mounts):
                continue
            status = os.stat(link)
        except OSError:  # closed, or the process is gone
            continue
        if stat.S_ISBLK(status.st_mode) and DeviceNumber.from_dev(status.st_rdev) in targets:
            return DeviceNumber.from_dev(status.st_rdev)
    return None
