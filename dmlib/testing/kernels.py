# SPDX-License-Identifier: MIT
"""A distribution's own kernel with its modules, unpacked into a cache folder and not installed."""

from __future__ import annotations

import contextlib
import fcntl
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from dmlib.testing.errors import GuestUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Packages that depend on the newest kernel: Debian's, then Ubuntu's.
_NEWEST = ("linux-image-amd64", "linux-image-generic")


class Kernel(NamedTuple):
    """
    A kernel for a guest.

    Attributes:
        image: Path of its bootable image.
        modules: Folder with one folder of modules, named after the version.
        version: The version.
    """

    image: str
    modules: str
    version: str


def cache_folder() -> str:
    """Return the folder that keeps what takes long to get, making it if need be."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(os.path.abspath(base), "dmlib")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise GuestUnavailableError(f"{folder} cannot be made ({error.strerror}); set XDG_CACHE_HOME.") from error
    return folder


def find_kernel() -> Kernel | None:
    """Return the newest kernel in the cache, None if there is none."""
    base = os.path.join(cache_folder(), "kernels")
    if not os.path.isdir(base):
        return None

    def age(name: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", name)]

    for name in sorted((name for name in os.listdir(base) if not name.startswith(".")), key=age, reverse=True):
        modules = os.path.join(base, name, "lib/modules")
        for version in os.listdir(modules):
            image = os.path.join(base, name, "boot", f"vmlinuz-{version}")
            if os.path.exists(image):
                return Kernel(image, modules, version)
    return None


def get_kernel() -> Kernel:
    """Return the newest kernel in the cache; without one, download the distribution's, which takes no root."""
    kernel = find_kernel()
    if kernel is None:
        with _locked(os.path.join(cache_folder(), "lock")):
            kernel = find_kernel() or _download()
    return kernel


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold the lock at *path*: of two guests that need a kernel at once, one downloads it."""
    with open(path, "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download() -> Kernel:
    for tool in ("apt-get", "apt-cache", "dpkg-deb", "depmod"):
        if shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
            raise GuestUnavailableError(
                f"A kernel for QEMU is downloaded with apt, and there is no {tool} here (package"
                f" {'kmod' if tool == 'depmod' else 'apt or dpkg'})."
            )
    packages = _packages()
    base = os.path.join(cache_folder(), "kernels")
    os.makedirs(base, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=base) as work:
        _run(["apt-get", "-q", "download", *packages], work)
        tree = os.path.join(work, "tree")
        for archive in [name for name in os.listdir(work) if name.endswith(".deb")]:
            _run(["dpkg-deb", "--extract", archive, tree], work)
        if os.path.isdir(os.path.join(tree, "usr/lib/modules")) and not os.path.isdir(os.path.join(tree, "lib")):
            os.symlink("usr/lib", os.path.join(tree, "lib"))  # newer packages know only the merged place
        version = os.listdir(os.path.join(tree, "lib/modules"))[0]
        depmod = shutil.which("depmod", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") or "depmod"
        _run([depmod, "-b", tree, version], work)
        os.chmod(os.path.join(tree, "boot", f"vmlinuz-{version}"), stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP)
        os.rename(tree, os.path.join(base, packages[0]))
    kernel = find_kernel()
    if kernel is None:
        raise GuestUnavailableError(f"The package {packages[0]} holds no kernel where one was expected.")
    return kernel


def _packages() -> list[str]:
    """Return the packages that hold the distribution's newest kernel and its modules, the kernel's first."""
    for newest in _NEWEST:
        answer = subprocess.run(["apt-cache", "depends", newest], capture_output=True, text=True, check=False)
        found = re.search(r"Depends: (linux-image-\d\S*)", answer.stdout)
        if found is None:
            continue
        image = found[1]
        modules = [image.replace("linux-image", kind) for kind in ("linux-modules", "linux-modules-extra")]
        known = subprocess.run(["apt-cache", "pkgnames", "linux-modules"], capture_output=True, text=True, check=False)
        return [image, *(name for name in modules if name in known.stdout.split())]
    raise GuestUnavailableError("apt knows no kernel package (linux-image-amd64); run 'apt-get update' as root first.")


def _run(command: list[str], folder: str) -> None:
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        raise GuestUnavailableError(f"'{' '.join(command)}' failed: {done.stderr.strip()}")


def module_files(kernel: Kernel, names: Iterable[str]) -> list[tuple[str, bytes]]:
    """Return name and contents of each module in *names* that is not built in, after the modules it depends on."""
    folder = os.path.join(kernel.modules, kernel.version)
    depends: dict[str, list[str]] = {}
    by_name: dict[str, str] = {}
    with open(os.path.join(folder, "modules.dep"), encoding="utf-8") as file:
        for line in file:
            path, _, needed = line.partition(":")
            depends[path] = needed.split()
            by_name[_module_name(path)] = path
    order: list[str] = []
    for name in names:
        found = by_name.get(_module_name(name))
        if found is not None:
            # modules.dep lists the dependencies of dependencies too, the deepest last.
            order += [entry for entry in [*reversed(depends[found]), found] if entry not in order]
    return [(_module_name(path), _contents(os.path.join(folder, path))) for path in order]


def _module_name(path: str) -> str:
    return os.path.basename(path).partition(".")[0].replace("-", "_")


def _contents(path: str) -> bytes:
    if path.endswith(".zst"):
        if shutil.which("zstd") is None:
            raise GuestUnavailableError("This kernel's modules are compressed with zstd; install the package zstd.")
        return subprocess.run(["zstd", "-dcq", path], stdout=subprocess.PIPE, check=True).stdout
    with open(path, "rb") as file:
        data = file.read()
    return lzma.decompress(data) if path.endswith(".xz") else data
