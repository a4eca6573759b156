# SPDX-License-Identifier: MIT
"""The small file system that a stock kernel boots from: it loads what finds the host's tree, and moves there."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from dmlib.testing.errors import GuestUnavailableError
from dmlib.testing.kernels import Kernel, module_files

if TYPE_CHECKING:
    from collections.abc import Iterable

_FOLDER = 0o040755
_PROGRAM = 0o100755
_FILE = 0o100644
_LINKED = b"ld-linux"


def find_busybox() -> str:
    """Return the path of a busybox that needs no libraries."""
    path = shutil.which("busybox", path="/bin:/usr/bin:/sbin:/usr/sbin")
    if path is not None:
        with open(path, "rb") as file:
            # A dynamically linked program names its loader at the beginning.
            if _LINKED not in file.read(4096):
                return path
    raise GuestUnavailableError("There is no static busybox here; install busybox-static (Fedora: busybox).")


def initramfs(kernel: Kernel, modules: Iterable[str], options: str, init: str) -> bytes:
    """
    Return an archive that boots *kernel* into the share named ``root``.

    Args:
        kernel: The kernel, for its modules.
        modules: Modules to load first, with what they depend on.
        options: Mount options of the root.
        init: Program to go on with, a path in the root.
    """
    with open(find_busybox(), "rb") as file:
        busybox = file.read()
    files = module_files(kernel, modules)
    script = "".join(
        [
            "#!/bin/busybox sh\n",
            *(f"/bin/busybox insmod /{name}.ko\n" for name, _ in files),
            f"/bin/busybox mount -t 9p -o {options} root /root\n",
            "/bin/busybox mount -t devtmpfs devtmpfs /root/dev\n",
            f"exec /bin/busybox switch_root /root {init}\n",
        ]
    )
    entries = [(name, _FOLDER, b"") for name in ("bin", "root", "dev")]
    entries += [("bin/busybox", _PROGRAM, busybox), ("init", _PROGRAM, script.encode())]
    entries += [(f"{name}.ko", _FILE, data) for name, data in files]
    archive = b"".join(_entry(number, *entry) for number, entry in enumerate(entries, 1))
    return archive + _entry(0, "TRAILER!!!", 0, b"")


def _entry(number: int, name: str, mode: int, data: bytes) -> bytes:
    """Return one member of an archive in cpio's "newc" form: thirteen hexadecimal numbers, name, contents."""
    path = name.encode() + b"\0"
    header = "070701" + "".join(
        f"{value:08X}" for value in (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    )
    head = header.encode() + path
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)
