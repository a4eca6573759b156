# SPDX-License-Identifier: MIT
"""User-Mode Linux: a kernel as an ordinary process. No root, no KVM, two seconds; one processor."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, ClassVar

from dmlib.testing.errors import GuestUnavailableError
from dmlib.testing.guest import Backend, Channels, Launch, write_file
from dmlib.testing.script import Lines, find_udevd, guest_script, mount_table, mounts

if TYPE_CHECKING:
    from dmlib.testing.job import Job

_MODULES = "/usr/lib/uml/modules"


class UserModeLinux(Backend):
    """Guests made by Debian's package user-mode-linux, with the host's tree as root through hostfs."""

    name: ClassVar[str] = "uml"

    def check(self, job: Job) -> None:
        """See Backend."""
        if shutil.which("linux.uml") is None or not os.path.isdir(_MODULES):
            raise GuestUnavailableError(
                "There is no User-Mode Linux here; install the package user-mode-linux (Debian, Ubuntu;"
                " Fedora has none: use --on qemu there)."
            )
        if job.cpus > 1:
            raise GuestUnavailableError("User-Mode Linux has one processor; use --on qemu for more.")
        find_udevd(job)

    def launch(self, job: Job, folder: str, channels: Channels, token: str) -> Launch:
        """See Backend."""
        writable = [("none", path, "hostfs", f"X-mount.mkdir,{path}") for path in job.writable_folders]
        table = write_file(folder, "fstab", mount_table(mounts(job, writable)))
        lines = Lines(
            control="/dev/ttyS0",
            stdout="/dev/ttyS1",
            stderr=None if channels.stderr is None else "/dev/ttyS2",
            terminals=True,
        )
        script = guest_script(
            job, table=table, modules=_MODULES, find_lines="", disk_stem="/dev/ubd", lines=lines, token=token
        )
        serials = [channels.control, channels.stdout, channels.stderr]
        argv = [
            shutil.which("linux.uml") or "linux.uml",
            f"mem={job.memory}",
            "root=/dev/root",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            f"init={write_file(folder, 'init', script, mode=0o700)}",
            f"uml_dir={folder}/",
            "quiet",
            "con=null",
            "con0=null,fd:1",
            "ssl=null",
            *(f"ubd{number}={path}" for number, path in enumerate(job.make_disks(folder))),
            *(f"ssl{number}=null,fd:{fd}" for number, fd in enumerate(serials) if fd is not None),
        ]
        # No TMPDIR: the guest's memory is a deleted file, on /dev/shm if it may choose and not on a disk.
        return Launch(argv=argv, env={"HOME": folder, "PATH": os.environ.get("PATH", os.defpath)}, boot_time=120)
