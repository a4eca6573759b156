# SPDX-License-Identifier: MIT
"""A running guest: its birth, its output on the way out, its status, its end."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

from dmlib.testing.errors import GuestDiedError, GuestStalledError, GuestTimeoutError, GuestUnavailableError
from dmlib.testing.streams import ControlStream, OutputStream, Tail

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from dmlib.testing.job import Job

# After the status, this long without a byte means that a daemon left behind holds the output open.
_LINGER = 2.0
_CONSOLE_SHOWN = 16
_LAST_WORDS = re.compile(r"Kernel panic|BUG:|Oops|Out of memory")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]{1,60}")


@dataclass(frozen=True, kw_only=True)
class Channels:
    """
    The guest's ends of the pipes into the runner; descriptors that the guest's process inherits.

    Attributes:
        stdout: Takes the command's standard output.
        stderr: Takes its standard error; None where both go the same way.
        control: Takes the words of the status protocol.
    """

    stdout: int
    stderr: int | None
    control: int

    @property
    def all(self) -> list[int]:
        """Every descriptor once."""
        return [number for number in (self.stdout, self.stderr, self.control) if number is not None]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """
    How a kind of guest is started.

    Attributes:
        argv: Program and arguments.
        env: The environment of that program, which is not the command's.
        boot_time: Seconds within which the guest must have said that it is ready.
    """

    argv: list[str]
    env: Mapping[str, str] = field(default_factory=dict)
    boot_time: float = 60.0


class Backend(ABC):
    """A kind of guest."""

    name: ClassVar[str]

    @abstractmethod
    def check(self, job: Job) -> None:
        """
        Find out, cheaply, whether this machine has what *job* takes.

        Raises:
            GuestUnavailableError: It has not; the message says what to install.
        """

    @abstractmethod
    def launch(self, job: Job, folder: str, channels: Channels, token: str) -> Launch:
        """Write what the guest needs into *folder* and say how it is started."""

    def stalled(self) -> bool:
        """Learn from a boot that showed no life; return True if another try may go better."""
        return False


class Guest:
    """
    One guest with one command in it; a context manager that leaves nothing behind.

    Any number can run side by side: each has a folder, pipes and processes of its own.

    Args:
        backend: The kind of guest.
        job: What to run.
        stdout: Descriptor that takes the command's standard output.
        stderr: Descriptor that takes its standard error; where it is the same file as *stdout*, order is kept.
        console: Descriptor that takes what the guest's kernel says; None keeps the last lines for an error.
    """

    def __init__(
        self, backend: Backend, job: Job, *, stdout: int = 1, stderr: int = 2, console: int | None = None
    ) -> None:
        self._backend = backend
        self._job = job
        self._sinks = (stdout, stderr)
        self._merged = stdout == stderr or os.path.sameopenfile(stdout, stderr)
        self._console = Tail(console)
        self._stack = contextlib.ExitStack()
        self._deadline: float | None = None
        self._ready_by = 0.0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        folder = _private_folder()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        token = secrets.token_hex(16)
        self._selector = stack.enter_context(selectors.DefaultSelector())

        def pipe() -> tuple[int, int]:
            reader, writer = os.pipe()
            stack.callback(os.close, reader)
            return reader, writer

        with contextlib.ExitStack() as guests_ends:

            def stream(sink: Tail | OutputStream | ControlStream) -> int:
                reader, writer = pipe()
                guests_ends.callback(os.close, writer)
                self._selector.register(reader, selectors.EVENT_READ, sink)
                return writer

            self._control = ControlStream()
            self._outputs = [OutputStream(self._sinks[0], token)]
            if not self._merged:
                self._outputs.append(OutputStream(self._sinks[1], token))
            writers = [stream(output) for output in self._outputs]
            channels = Channels(
                stdout=writers[0], stderr=None if self._merged else writers[1], control=stream(self._control)
            )
            console = stream(self._console)
            launch = self._backend.launch(self._job, folder, channels, token)
            lifeline, self._lifeline = os.pipe()
            guests_ends.callback(os.close, lifeline)
            stack.callback(os.close, self._lifeline)
            # The warden has a session of its own: Ctrl-C at the terminal reaches the runner alone.
            self._warden = subprocess.Popen(
                [sys.executable, "-I", "-S", _warden_path(), folder, ",".join(map(str, channels.all)), *launch.argv],
                stdin=lifeline,
                stdout=console,
                stderr=console,
                env=dict(launch.env),
                cwd="/",
                pass_fds=channels.all,
                start_new_session=True,
            )
        stack.callback(self._bury)
        now = time.monotonic()
        self._ready_by = now + launch.boot_time
        self._deadline = None if self._job.timeout is None else now + self._job.timeout

    def _bury(self) -> None:
        """Have the warden kill all that is left, and wait until it has."""
        # A word and not only the end: a forked copy of this process may hold the pipe open.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._lifeline, b"q")
        self._warden.wait()

    def wait(self) -> int:
        """
        Pass the command's output through until it ends.

        Returns:
            The command's exit status; 128 and the signal's number if a signal ended it.

        Raises:
            GuestDiedError: The guest ended without reporting a status.
            GuestStalledError: It did not even boot.
            GuestTimeoutError: The job's time limit passed.
        """
        quiet_since = 0.0
        while not (self._control.status is not None and all(output.ended for output in self._outputs)):
            progress = self._step(0.2 if self._control.status is not None else 5.0)
            now = time.monotonic()
            if self._deadline is not None and now >= self._deadline:
                raise GuestTimeoutError(f"The command was killed: it did not end within {self._job.timeout:g} seconds.")
            if not self._selector.get_map():
                break
            if self._control.status is None and not self._control.ready and now >= self._ready_by:
                raise GuestStalledError(self._died("did not boot"), self._console.text())
            if progress or self._control.status is None:
                quiet_since = now
            elif now - quiet_since > _LINGER:
                break
        for output in self._outputs:
            output.flush()
        if self._control.status is None:
            if not self._control.ready:
                raise GuestStalledError(self._died("did not boot"), self._console.text())
            raise GuestDiedError(self._died("died before the command ended"), self._console.text())
        return self._control.status

    def _step(self, at_most: float) -> bool:
        """Move what has come; return whether anything has."""
        limits = [at_most]
        now = time.monotonic()
        if self._deadline is not None:
            limits.append(self._deadline - now)
        if not self._control.ready:
            limits.append(self._ready_by - now)
        events = self._selector.select(max(0.0, min(limits)))
        for key, _ in events:
            sink: Tail | OutputStream | ControlStream = key.data
            data = os.read(key.fd, 65536)
            if not data:
                self._selector.unregister(key.fd)
            else:
                sink.feed(data, self._deadline)
        return bool(events)

    def _died(self, what: str) -> str:
        lines = self._console.text().splitlines()
        # A panic ends in a long trace; what matters is how it begins.
        begin = next((number for number, line in enumerate(lines) if _LAST_WORDS.search(line)), len(lines))
        shown = lines[max(0, min(begin - 1, len(lines) - _CONSOLE_SHOWN)) :][:_CONSOLE_SHOWN]
        said = "".join(f"\n    {line}" for line in shown) or " nothing."
        return f"The guest ({self._backend.name}) {what}. Its kernel said:{said}"


def write_file(folder: str, name: str, text: str, mode: int = 0o600) -> str:
    """Write *text*, which may hold any bytes that a path may hold, to a new file and return its path."""
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
    os.chmod(path, mode)
    return path


def _warden_path() -> str:
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "_warden.py")


def _private_folder() -> str:
    """Make the guest's folder where its path is short and plain enough for sockets and kernel command lines."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):  # noqa: S108 - mkdtemp makes it safe
        if _PLAIN_PATH.fullmatch(parent):
            with contextlib.suppress(OSError):
                return tempfile.mkdtemp(prefix="dmlib-guest-", dir=parent)
    raise GuestUnavailableError("There is no folder for temporary files that can be written; set TMPDIR.")
