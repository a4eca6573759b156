# SPDX-License-Identifier: MIT
"""The shell script that is a guest's first process, whatever kind of guest it is."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmlib.testing.errors import GuestUnavailableError
from dmlib.testing.job import DISKS, HOST_TREE, MODPROBE_HOME, Job

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Mount = tuple[str, str, str, str]


@dataclass(frozen=True, kw_only=True)
class Lines:
    """
    The character devices of a guest that carry its answers, as words of the shell.

    Attributes:
        stdout: Takes standard output.
        stderr: Takes standard error; None where both are the same file outside too.
        control: Takes the few words of the status protocol: ``ready`` and ``status N``.
        terminals: Whether these are terminals, which have to be told to leave the bytes alone.
    """

    stdout: str
    stderr: str | None
    control: str
    terminals: bool = False


def guest_script(
    job: Job, *, table: str, modules: str, find_lines: str, disk_stem: str, lines: Lines, token: str
) -> str:
    """
    Return the script: mounts, modules, udevd, the command, its status.

    Args:
        job: What to run.
        table: Path of the mount table, as `mount_table` makes it.
        modules: Folder of the host with one folder of modules for each kernel version.
        find_lines: Shell lines that set what *lines* refers to.
        disk_stem: How the nodes of the guest's disks begin, before their letters.
        lines: Where the answers go.
        token: What the guest writes last on both outputs; all before it belongs to the command.
    """
    path = shlex.quote(job.environment()["PATH"])
    return "".join(
        [
            f"#!/bin/sh\nexport PATH={path}\n",
            "mount -t proc proc /proc\n",
            # One mount for all: starting a program takes a guest up to a tenth of a second.
            f"mount --all --fstab {table}\n",
            _modules(modules),
            "modprobe -a loop dm-mod\n",
            find_lines,
            _disks(job, disk_stem),
            _show_files(job),
            _udev(job),
            _command(job, lines, token),
        ]
    )


def mounts(job: Job, writable: Iterable[Mount]) -> Iterator[Mount]:
    """Yield the (source, target, type, options) mounts of a guest; *writable* come after what they lie in."""
    make = "X-mount.mkdir"
    yield "sysfs", "/sys", "sysfs", "nosuid,nodev,noexec"
    yield "tmpfs", "/dev/shm", "tmpfs", f"{make},mode=1777,nosuid,nodev"  # noqa: S108 - a mount point
    yield "devpts", "/dev/pts", "devpts", f"{make},mode=620,ptmxmode=666"
    yield "tmpfs", "/run", "tmpfs", "mode=755,nosuid,nodev"
    yield "/", HOST_TREE, "none", f"{make},bind"
    yield "tmpfs", "/tmp", "tmpfs", "mode=1777,nosuid,nodev"  # noqa: S108
    for path in filter(os.path.isdir, job.shown()):
        yield HOST_TREE + path, path, "none", f"{make},bind"
    yield from writable
    if os.path.isdir("/lib/modules"):
        yield "tmpfs", "/lib/modules", "tmpfs", "mode=755"


def mount_table(lines: Iterable[Mount]) -> str:
    """Return mounts as a table for ``mount --all --fstab``."""

    def escape(text: str) -> str:
        return re.sub(r"[ \t\n\\]", lambda match: f"\\{ord(match[0]):03o}", text)

    return "".join(" ".join(escape(word) for word in line) + " 0 0\n" for line in lines)


def _modules(modules: str) -> str:
    """
    Return lines that let modprobe and the kernel find the guest's modules.

    Where the host has no /lib/modules to mount on, and the root is read-only, a modprobe in the guest's own folder
    stands in; the kernel is told of it as well.
    """
    version = "read -r _ _ version _ </proc/version\n"
    source = shlex.quote(HOST_TREE + modules)
    if os.path.isdir("/lib/modules"):
        return f"{version}ln -s {source}/$version /lib/modules/$version\n"
    real = shutil.which("modprobe", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if real is None:
        raise GuestUnavailableError("There is no modprobe here; install the package kmod.")
    place = MODPROBE_HOME
    return (
        f"{version}"
        f"mkdir -p {place}/lib/modules {place}/bin\n"
        f"ln -s {source}/$version {place}/lib/modules/$version\n"
        f"printf '#!/bin/sh\\nexec {real} -d {place} \"$@\"\\n' >{place}/bin/modprobe\n"
        f"chmod 755 {place}/bin/modprobe\n"
        f"echo {place}/bin/modprobe >/proc/sys/kernel/modprobe\n"
    )


def _disks(job: Job, stem: str) -> str:
    """Return lines that give the disks their names."""
    lines = f"mkdir -p {DISKS}\n" if job.disks else ""
    for letter, name in zip("abcdefgh", job.disks, strict=False):
        lines += f"while ! [ -b {stem}{letter} ]; do sleep 0.1; done\nln -s {stem}{letter} {DISKS}/{name}\n"
    return lines


def _show_files(job: Job) -> str:
    """Return lines that show single files below covered folders, as links: a file cannot be mounted on nothing."""
    lines = ""
    for path in job.shown():
        if not os.path.isdir(path):
            lines += f"mkdir -p {shlex.quote(os.path.dirname(path))}\n"
            lines += f"ln -s {shlex.quote(HOST_TREE + path)} {shlex.quote(path)}\n"
    return lines


def find_udevd(job: Job) -> str | None:
    """Return the path of the host's udevd for the guest to run, None if the job wants none."""
    if not job.udev:
        return None
    for folder in ("/usr/lib/systemd", "/lib/systemd"):
        if os.access(f"{folder}/systemd-udevd", os.X_OK):
            if shutil.which("udevadm", path=job.environment()["PATH"]):
                return f"{folder}/systemd-udevd"
            break
    raise GuestUnavailableError("There is no udevd here; install the package udev (Fedora: systemd-udev).")


def _udev(job: Job) -> str:
    udevd = find_udevd(job)
    if udevd is None:
        return ""
    # Only what concerns us: a guest has dozens of terminals that nobody here asks about.
    return (
        f"{udevd} --daemon >/dev/null 2>&1\n"
        "udevadm trigger --action=add --subsystem-match=block --subsystem-match=misc\n"
        "udevadm settle --timeout=120\n"
    )


def _command(job: Job, lines: Lines, token: str) -> str:
    """Return the part that runs the command and reports; it never comes back."""
    # setsid: a command that signals its own group must not hit the script.
    words = ["exec", "setsid", "env", "-i", "--"]
    words += [f"{name}={value}" for name, value in job.environment().items()]
    words += job.command
    run = f"cd {shlex.quote(job.folder)} && {' '.join(map(shlex.quote, words))}"
    # What the command has written to the host's folders must be there when the guest is killed. Only those are
    # synchronised: a suspended device would hold up a sync of everything for ever.
    sync = f"sync -f {' '.join(map(shlex.quote, job.writable_folders))}; " if job.writable else ""
    report = f"code=$?; {sync}echo status $code >{lines.control};"
    outputs = [line for line in (lines.stdout, lines.stderr) if line is not None]
    setup = "".join(f"stty raw -echo <{line}\n" for line in outputs) if lines.terminals else ""
    # cat keeps the command from seeing a terminal where the caller may have none, and ends when the last byte is out.
    # A daemon which the command leaves behind may hold the pipe: the status goes out before.
    if lines.stderr is None:
        piped = f"{{ ( {run} ) 2>&1; {report} }} </dev/null | cat >{lines.stdout}\n"
    else:
        piped = (
            f"{{ {{ ( {run} ) 3>&-; {report} }} 2>&3 </dev/null | cat >{lines.stdout}; }} 3>&1 | cat >{lines.stderr}\n"
        )
    ends = "".join(f"printf %s {token} >{line}\n" for line in outputs)
    # Whoever started the guest ends it; a script that returned would make the kernel panic.
    return f"{setup}echo ready >{lines.control}\n{piped}{ends}while :; do sleep 3600; done\n"
