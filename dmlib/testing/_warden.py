# SPDX-License-Identifier: MIT
"""
The process between a runner and its guest: whatever becomes of the runner, the guest and its files go too.

A runner can be killed with no chance to clean up, and a guest is more than one process (User-Mode Linux has one for
each address space inside, QEMU comes with helpers). So a small process of its own starts the guest, adopts all that the
guest leaves behind, and watches a pipe: when the runner closes it, on purpose or by dying, everything is killed, reaped
and deleted. It is run as a plain file, by path, and imports nothing of dmlib.

    python _warden.py FOLDER 5,6,7 COMMAND...

FOLDER is deleted at the end, 5,6,7 are open descriptors for the guest alone, standard input is the pipe to watch;
standard output and standard error are the guest's, where its kernel talks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIFELINE = 0
_POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def _children(parent: int) -> list[int]:
    """Return the processes whose parent is *parent*, zombies included."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                # The second field is the program's name, which may hold spaces and brackets of its own.
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue  # gone meanwhile
        if fields and int(fields[1]) == parent:
            found.append(int(entry))
    return found


def _kill_all(group: int) -> None:
    """Kill the guest's process group and every child, own or adopted, until none is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    while True:
        for child in _children(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def main(folder: str, inherited: list[int], command: list[str]) -> None:
    """Run *command* until it ends or the lifeline closes, then leave nothing of it."""
    # Ctrl-C goes to the runner, which closes the lifeline.
    for polite in _POLITE:
        signal.signal(polite, signal.SIG_IGN)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # A guest that panics aborts: no core file of its whole memory.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def die_with_warden() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for polite in _POLITE:
            signal.signal(polite, signal.SIG_DFL)

    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    group = 0
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=inherited,
            process_group=0,
            preexec_fn=die_with_warden,  # noqa: PLW1509 - no threads here
        ) as guest:
            group = guest.pid
            for number in (1, 2, *inherited):
                os.close(number)  # the runner must see the end of the guest's output
            while guest.poll() is None:
                readable, _, _ = select.select([_LIFELINE, woken], [], [])
                if woken in readable:
                    os.read(woken, 4096)
                if _LIFELINE in readable:  # a word or the end: both mean stop
                    guest.kill()
                    guest.wait()
    finally:
        if group:
            _kill_all(group)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], [int(word) for word in sys.argv[2].split(",") if word], sys.argv[3:])
