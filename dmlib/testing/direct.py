# SPDX-License-Identifier: MIT
"""No guest at all: the command runs here, where root may use the driver."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import TYPE_CHECKING

from dmlib.testing.errors import GuestTimeoutError, GuestUnavailableError

if TYPE_CHECKING:
    from dmlib.testing.job import Job

CONTROL_NODE = "/dev/mapper/control"
_UDEV_SOCKET = "/run/udev/control"


def check(job: Job) -> None:
    """
    Find out whether this process may use the driver of the running kernel.

    Raises:
        GuestUnavailableError: It may not; the message says why.
    """
    if job.disks:
        raise GuestUnavailableError("Disks are for guests; on this machine's own kernel, use loop devices.")
    if os.geteuid() != 0:
        raise GuestUnavailableError("Running directly takes root.")
    try:
        # A node without a driver behind it exists on many machines: only opening it tells.
        os.close(os.open(CONTROL_NODE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise GuestUnavailableError(f"The running kernel has no device-mapper driver ({error}).") from error
    if job.udev and not os.path.exists(_UDEV_SOCKET):
        raise GuestUnavailableError("No udevd runs here.")


def run(job: Job, *, stdout: int, stderr: int) -> int:
    """Run the job's command here and return its status as a guest would."""
    env = dict(os.environ if job.env is None else job.env) | dict(job.extra_env)
    try:
        process = subprocess.Popen(
            list(job.command), cwd=job.cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            process_group=0,
        )  # fmt: skip
    except FileNotFoundError as error:
        os.write(stderr, f"{job.command[0]}: {error.strerror}\n".encode())
        return 127
    except PermissionError as error:
        os.write(stderr, f"{job.command[0]}: {error.strerror}\n".encode())
        return 126
    with process:
        try:
            status = process.wait(job.timeout)
        except subprocess.TimeoutExpired as error:
            raise GuestTimeoutError(
                f"The command was killed: it did not end within {job.timeout:g} seconds."
            ) from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return status if status >= 0 else 128 - status
