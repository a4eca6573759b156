# SPDX-License-Identifier: MIT
"""User-Mode Linux: a kernel as an ordinary process. No root, no KVM, two seconds; one processor."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, ClassVar

from dmlib.testing.errors import GuestUnavailableError
from dmlib.testing.guest import Backend, Channels, Launch
from dmlib.testing.job import (
    MODPROBE_HOME,
    Job,
    Lines,
    command_script,
    covers,
    mount_table,
    show_script,
    udev_script,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_MODULES = "/usr/lib/uml/modules"
_BOOT_TIME = 60.0


class UserModeLinux(Backend):
    """Guests made by Debian's package user-mode-linux, with the host's tree as root through hostfs."""

    name: ClassVar[str] = "uml"

    def check(self, job: Job) -> None:
        """See Backend."""
        if shutil.which("linux.uml") is None or not os.path.isdir(_MODULES):
            raise GuestUnavailableError(
                "There is no User-Mode Linux here; install the package user-mode-linux (Debian, Ubuntu; Fedora has none:"
                " use --on qemu there)."
            )
        if job.cpus > 1:
            raise GuestUnavailableError("User-Mode Linux has one processor; use --on qemu for more.")
        udev_script(job)

    def launch(self, job: Job, folder: str, channels: Channels, token: str) -> Launch:
        """See Backend."""
        table = os.path.join(folder, "fstab")
        with open(table, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(mount_table(self._mounts(job)))
        script = os.path.join(folder, "init")
        with open(script, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(self._script(job, table, channels, token))
        os.chmod(script, 0o700)
        argv = [
            shutil.which("linux.uml") or "linux.uml",
            f"mem={job.memory}",
            "root=/dev/root",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            f"init={script}",
            f"uml_dir={folder}/",
            "quiet",
            "con=null",
            "con0=null,fd:1",
            "ssl=null",
            f"ssl0=null,fd:{channels.control}",
            f"ssl1=null,fd:{channels.stdout}",
        ]
        if channels.stderr is not None:
            argv.append(f"ssl2=null,fd:{channels.stderr}")
        # No TMPDIR: the guest's memory is a deleted file, on /dev/shm if it may choose and not on a disk.
        return Launch(argv=argv, env={"HOME": folder, "PATH": os.environ.get("PATH", os.defpath)}, boot_time=_BOOT_TIME)

    @staticmethod
    def _mounts(job: Job) -> Iterator[tuple[str, str, str, str]]:
        yield "sysfs", "/sys", "sysfs", "nosuid,nodev,noexec"
        yield from covers(job)
        for path in job.writable_folders:
            yield "none", path, "hostfs", f"X-mount.mkdir,{path}"
        if os.path.isdir("/lib/modules"):
            yield "tmpfs", "/lib/modules", "tmpfs", "mode=755"

    @staticmethod
    def _script(job: Job, table: str, channels: Channels, token: str) -> str:
        lines = Lines(
            control="/dev/ttyS0",
            stdout="/dev/ttyS1",
            stderr=None if channels.stderr is None else "/dev/ttyS2",
            token=token,
            terminals=True,
        )
        path = job.environment()["PATH"]
        return (
            "#!/bin/sh\n"
            f"export PATH='{path}'\n"
            "mount -t proc proc /proc\n"
            f"mount --all --fstab {table}\n"
            f"{_modules_script()}"
            "modprobe -a loop dm-mod\n"
            f"{show_script(job)}{udev_script(job)}{command_script(job, lines)}"
        )


def _modules_script() -> str:
    """
    Return lines that let modprobe and the kernel find the guest's modules.

    Where the host has no /lib/modules to mount on, and the root is read-only, a modprobe in the guest's own folder
    stands in; the kernel is told of it as well.
    """
    if os.path.isdir("/lib/modules"):
        return f"read -r _ _ version _ </proc/version\nln -s {_MODULES}/$version /lib/modules/$version\n"
    real = shutil.which("modprobe", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if real is None:
        raise GuestUnavailableError("There is no modprobe here; install the package kmod.")
    place = MODPROBE_HOME
    return (
        "read -r _ _ version _ </proc/version\n"
        f"mkdir -p {place}/lib/modules {place}/bin\n"
        f"ln -s {_MODULES}/$version {place}/lib/modules/$version\n"
        f"printf '#!/bin/sh\\nexec {real} -d {place} \"$@\"\\n' >{place}/bin/modprobe\n"
        f"chmod 755 {place}/bin/modprobe\n"
        f"echo {place}/bin/modprobe >/proc/sys/kernel/modprobe\n"
    )
