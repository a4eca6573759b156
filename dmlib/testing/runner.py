# SPDX-License-Identifier: MIT
"""Which kind of guest a job gets, and the one call that runs it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from dmlib.testing import direct
from dmlib.testing.errors import GuestStalledError, GuestUnavailableError
from dmlib.testing.guest import Backend, Guest
from dmlib.testing.job import Job
from dmlib.testing.qemu import Qemu
from dmlib.testing.uml import UserModeLinux

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WAYS = ("auto", "direct", "uml", "qemu")


class Choice(NamedTuple):
    """
    Where a job runs.

    Attributes:
        backend: The kind of guest; None means directly on this machine.
        reason: Why, in words that go on after a colon.
    """

    backend: Backend | None
    reason: str


def choose(job: Job, on: str = "auto") -> Choice:
    """
    Decide where *job* runs.

    Args:
        job: What is to run.
        on: ``direct``, ``uml``, ``qemu``, or ``auto`` for the first of these that works here.

    Raises:
        GuestUnavailableError: The way asked for, or every way, lacks something; the message says what to install.
    """
    backends: dict[str, type[Backend]] = {"uml": UserModeLinux, "qemu": Qemu}
    if on == "direct":
        direct.check(job)
        return Choice(None, "as asked.")
    if on in backends:
        backend = backends[on]()
        backend.check(job)
        return Choice(backend, "as asked.")
    if on != "auto":
        raise ValueError(f"on must be one of {', '.join(WAYS)}, not {on!r}")
    reasons = []
    try:
        direct.check(job)
    except GuestUnavailableError as error:
        reasons.append(str(error))
    else:
        return Choice(None, "root may use this kernel's driver.")
    for kind in backends.values():
        backend = kind()
        try:
            backend.check(job)
        except GuestUnavailableError as error:
            reasons.append(str(error))
        else:
            return Choice(backend, reasons[-1][0].lower() + reasons[-1][1:])
    raise GuestUnavailableError(" ".join(reasons[1:]))


def run(
    command: Sequence[str],
    *,
    on: str = "auto",
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    extra_env: Mapping[str, str] | None = None,
    udev: bool = False,
    cpus: int = 1,
    memory: str = "1G",
    writable: Sequence[str] = (),
    disks: Mapping[str, str] | None = None,
    timeout: float | None = None,
    stdout: int = 1,
    stderr: int = 2,
    console: int | None = None,
    announce: bool = False,
) -> int:
    """
    Run *command* as root on a real kernel with a device mapper.

    Args:
        command: Program and arguments.
        on: ``auto``, ``direct``, ``uml`` or ``qemu``.
        cwd: Folder to run it in; by default the caller's.
        env: The whole environment; by default the caller's.
        extra_env: Variables on top of it.
        udev: Run udevd in the guest. Without it ``DM_DISABLE_UDEV=1`` is set.
        cpus: Number of processors; User-Mode Linux has one.
        memory: The guest's memory, such as ``"1G"``.
        writable: Folders of the host that the command may change; in a guest all else of the host is read-only.
        disks: Sizes of empty disks by name, such as ``{"data": "16G"}``, which a guest has as ``/dev/dmlib/<name>``.
        timeout: Seconds until guest and command are killed, boot included.
        stdout: Descriptor that takes the command's output.
        stderr: Descriptor that takes its errors.
        console: Descriptor that takes what the guest's kernel says.
        announce: Say on standard error which way was taken and why.

    Returns:
        The command's exit status; 128 and the signal's number if a signal ended it.

    Raises:
        GuestUnavailableError: This machine lacks something; the message names the package.
        GuestDiedError: The guest panicked or did not boot.
        GuestTimeoutError: The time limit passed.
    """
    job = Job(
        command=tuple(command), cwd=cwd, env=env, extra_env=extra_env or {}, udev=udev, cpus=cpus, memory=memory,
        writable=tuple(writable), disks=disks or {}, timeout=timeout,
    )  # fmt: skip
    backend, reason = choose(job, on)
    if announce:
        where = "directly on this kernel" if backend is None else f"in a guest ({backend.name})"
        print(f"dmlib.testing: running {where}: {reason}", file=sys.stderr, flush=True)
    if backend is None:
        return direct.run(job, stdout=stdout, stderr=stderr)
    try:
        with Guest(backend, job, stdout=stdout, stderr=stderr, console=console) as guest:
            return guest.wait()
    except GuestStalledError:
        if not backend.stalled():
            raise
    with Guest(backend, job, stdout=stdout, stderr=stderr, console=console) as guest:
        return guest.wait()
