# SPDX-License-Identifier: MIT
"""QEMU with the distribution's own kernel: more than one processor, one that people run; no root, KVM if it works."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, ClassVar

from dmlib.testing.errors import GuestUnavailableError
from dmlib.testing.guest import Backend, Channels, Launch, write_file
from dmlib.testing.initramfs import find_busybox, initramfs
from dmlib.testing.kernels import cache_folder, get_kernel
from dmlib.testing.script import Lines, find_udevd, guest_script, mount_table, mounts

if TYPE_CHECKING:
    from dmlib.testing.job import Job

_QEMU = "qemu-system-x86_64"
_KVM = "/dev/kvm"
# A kernel that takes longer under KVM does not run at all: seen where KVM is itself inside a virtual machine.
_KVM_BOOT_TIME = 20.0
_EMULATED_BOOT_TIME = 180.0
# Read by the initial file system, which has to find the root before anything else is there.
_BOOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "virtio_console")
_9P = "trans=virtio,version=9p2000.L,msize=512000,access=any"
# The ports are named; the kernel's numbers for them depend on the order in which devices were found.
_FIND_PORTS = """\
for port in /sys/class/virtio-ports/*; do
    read -r name <$port/name
    eval "$name=/dev/${port##*/}"
done
"""


class Qemu(Backend):
    """Guests with the host's tree as root through 9p, served by QEMU itself."""

    name: ClassVar[str] = "qemu"

    def __init__(self) -> None:
        self._emulate = False

    def check(self, job: Job) -> None:
        """See Backend."""
        if os.uname().machine != "x86_64":
            raise GuestUnavailableError(f"Guests in QEMU are made for x86_64 only, and this is {os.uname().machine}.")
        if shutil.which(_QEMU) is None:
            raise GuestUnavailableError(
                f"There is no {_QEMU} here; install the package qemu-system-x86 (Debian, Ubuntu, Fedora)."
            )
        find_busybox()
        find_udevd(job)

    def launch(self, job: Job, folder: str, channels: Channels, token: str) -> Launch:
        """See Backend."""
        kernel = get_kernel()
        writable = [
            (f"rw{number}", path, "9p", f"X-mount.mkdir,{_9P},cache=mmap")
            for number, path in enumerate(job.writable_folders)
        ]
        table = write_file(folder, "fstab", mount_table(mounts(job, writable)))
        lines = Lines(control="$control", stdout="$stdout", stderr=None if channels.stderr is None else "$stderr")
        script = guest_script(
            job,
            table=table,
            modules=kernel.modules,
            find_lines=("modprobe virtio_blk\n" if job.disks else "") + _FIND_PORTS,
            disk_stem="/dev/vd",
            lines=lines,
            token=token,
        )
        init = write_file(folder, "init", script, mode=0o700)
        ram_disk = os.path.join(folder, "initramfs")
        with open(ram_disk, "wb") as file:
            file.write(initramfs(kernel, _BOOT_MODULES, f"ro,{_9P},cache=loose", init))
        append = "console=ttyS0 quiet panic=-1 random.trust_cpu=on net.ifnames=0 tsc=nowatchdog nowatchdog"
        argv = [
            shutil.which(_QEMU) or _QEMU,
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "q35"),
            *(("-accel", "kvm", "-cpu", "host") if self._kvm() else ("-accel", "tcg,thread=multi", "-cpu", "max")),
            *("-smp", str(job.cpus), "-m", job.memory),
            *("-kernel", kernel.image, "-initrd", ram_disk, "-append", append),
            *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
            *_share("root", "/", readonly=True),
            *(word for number, path in enumerate(job.writable_folders) for word in _share(f"rw{number}", path)),
            *(word for number, path in enumerate(job.make_disks(folder)) for word in _disk(number, path)),
            *("-device", "virtio-serial-pci"),
            *_port("control", channels.control),
            *_port("stdout", channels.stdout),
            *([] if channels.stderr is None else _port("stderr", channels.stderr)),
        ]
        boot_time = _KVM_BOOT_TIME if self._kvm() else _EMULATED_BOOT_TIME
        return Launch(argv=argv, env={"HOME": folder, "PATH": os.environ.get("PATH", os.defpath)}, boot_time=boot_time)

    def stalled(self) -> bool:
        """See Backend: KVM may be there and useless, which only trying can tell; remembered until the next boot."""
        if not self._kvm():
            return False
        self._emulate = True
        with open(_useless_kvm_mark(), "w", encoding="ascii") as file:
            file.write("KVM did not boot a kernel within its time.\n")
        return True

    def _kvm(self) -> bool:
        return not self._emulate and os.access(_KVM, os.R_OK | os.W_OK) and not os.path.exists(_useless_kvm_mark())


def _useless_kvm_mark() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return os.path.join(cache_folder(), f"useless-kvm-{file.read().strip()}")


def _share(tag: str, path: str, *, readonly: bool = False) -> list[str]:
    """Return options that offer a folder of the host; multidevs keeps its file systems' inode numbers apart."""
    mode = "on" if readonly else "off"
    return [
        *("-fsdev", f"local,id={tag},path={path},security_model=none,readonly={mode},multidevs=remap"),
        *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
    ]


def _disk(number: int, path: str) -> list[str]:
    """Return options for a disk that need not survive the guest."""
    return [
        *("-drive", f"file={path},format=raw,if=none,id=disk{number},cache=unsafe,discard=unmap"),
        *("-device", f"virtio-blk-pci,drive=disk{number}"),
    ]


def _port(name: str, descriptor: int) -> list[str]:
    """Return options that connect a named port of the guest to a descriptor that QEMU inherits."""
    return [
        *("-add-fd", f"fd={descriptor},set={descriptor}"),
        *("-chardev", f"file,id={name},path=/dev/fdset/{descriptor},append=on"),
        *("-device", f"virtserialport,chardev={name},name={name}"),
    ]
