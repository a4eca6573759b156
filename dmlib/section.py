# SPDX-License-Identifier: MIT
"""
The moments in which devices are suspended: one call of C over prepared tasks, with a deadline.

No Python runs while a device is suspended, so no exception, signal or thread can leave it so. A thread of its own
makes the call and owns the memory that C works on; the caller waits for it. A suspend that the kernel holds
beyond the deadline cannot be cancelled, so the caller gets its error and the thread stays behind: the moment the
kernel lets go, it drops what was to be swapped in, and resumes. The process does not exit before that, since nothing
else would ever resume the device.
"""

from __future__ import annotations

import atexit
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dmlib import _ffi
from dmlib._undo import Latch, outlast, start_thread
from dmlib.errors import CleanupError, SuspendTimeoutError, TaskError
from dmlib.task import Prepared, Task

if TYPE_CHECKING:
    from collections.abc import Sequence

_GATE_ABANDONED: Final = 2

_running: Final[set[_Worker]] = set()
_late: Final[dict[str, _Worker]] = {}
"""By device, the last section that was given up: what it suspends late, it clears and resumes."""


@atexit.register
def _outlast_all() -> None:
    for worker in tuple(_running):
        outlast(worker.ended)


def _forget() -> None:
    _running.clear()
    _late.clear()


os.register_at_fork(after_in_child=_forget)  # threads stay behind in the parent


@dataclass(frozen=True, slots=True)
class Hold:
    """
    The tasks for one device that is to be suspended and resumed.

    Attributes:
        suspend: Suspends it.
        resume: Resumes it, and so makes an inactive table live.
        clear: Drops the inactive table if nothing is to be swapped in after all.
        restore: Loads the old table when the kernel will not resume with the new one.
        resume_restored: Resumes with that.
    """

    suspend: Task
    resume: Task
    clear: Task | None = None
    restore: Task | None = None
    resume_restored: Task | None = None


def wait_for_late(device: str, timeout: float | None) -> float | None:
    """
    Wait until a section on *device* that was given up is through; else it would undo what is begun here.

    Args:
        device: The device, as its tasks label it.
        timeout: Seconds; ``None`` waits for ever.

    Returns:
        What is left of *timeout*.

    Raises:
        SuspendTimeoutError: The kernel still has not finished that suspend.
    """
    worker = _late.get(device)
    if worker is None:
        return timeout
    begin = time.monotonic()
    if not worker.called.wait(timeout):
        raise SuspendTimeoutError(device, timeout or 0.0)
    if _late.get(device) is worker:
        _late.pop(device, None)
    return None if timeout is None else max(0.0, timeout - (time.monotonic() - begin))


def run_section(
    holds: Sequence[Hold], messages: Sequence[Task] = (), *, timeout: float | None, keep_suspended: bool = False
) -> float:
    """
    Suspend in order, send *messages*, resume in reverse; every device that was suspended is resumed.

    Args:
        holds: The devices.
        messages: Sent in order while all are suspended; after a failure the rest is left out.
        timeout: Seconds that the suspends may take; ``None`` waits for ever.
        keep_suspended: Leave the devices suspended when all went well.

    Returns:
        Seconds from the first suspend to the last resume.

    Raises:
        SuspendTimeoutError: The deadline passed; nothing was sent, and a thread resumes what the kernel lets go.
        TaskError: A step failed and the devices are as they were; if the kernel refused to resume with a new table,
            the old one is live again.
        CleanupError: A device could not be resumed, not with its old table either: it is still suspended.
    """
    rest = timeout
    for hold in holds:
        rest = wait_for_late(hold.suspend.label, rest)
    worker = _Worker(holds, messages, keep_suspended=keep_suspended)
    try:
        worker.start()
        given_up = not worker.called.wait(rest) and worker.abandon()
        if not given_up:
            worker.ended.wait()
    except BaseException:
        if not worker.abandon():
            outlast(worker.called)  # messages and resumes are short
        raise
    if given_up:
        raise SuspendTimeoutError(holds[0].suspend.label, timeout or 0.0)
    if worker.error is not None:
        raise worker.error
    return worker.held


class _Worker:
    """A section in its thread; ``called`` is set when C is through with the devices, ``ended`` at the very end."""

    def __init__(self, holds: Sequence[Hold], messages: Sequence[Task], *, keep_suspended: bool) -> None:
        self._lib, self._ffi = _ffi.connect()
        self._holds = holds
        self._messages = messages
        self._keep_suspended = keep_suspended
        self._gate: Any = self._ffi.new("int *")
        self.called = Latch()
        self.ended = Latch()
        self.error: BaseException | None = None
        self.held = 0.0

    def start(self) -> None:
        start_thread(self._run, ())

    def abandon(self) -> bool:
        """Give up waiting; False if the last suspend is through, so that the end is near and must be awaited."""
        self._lib.dmlib_gate_abandon(self._gate)
        if self in _running:  # else it has not begun, and will do nothing
            _late.update((hold.suspend.label, self) for hold in self._holds)
        return bool(self._gate[0] == _GATE_ABANDONED)

    def _run(self) -> None:
        _running.add(self)
        try:
            with ExitStack() as stack:
                self._call(stack)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self.error = error
        finally:
            if not self.called.is_set:
                self.called.set()
            for hold in self._holds:
                if _late.get(hold.suspend.label) is self:
                    del _late[hold.suspend.label]
            _running.discard(self)
            self.ended.set()

    def _call(self, stack: ExitStack) -> None:
        def prepare(task: Task | None) -> Prepared | None:
            return None if task is None else stack.enter_context(Prepared(task))

        def pointer(prepared: Prepared | None) -> Any:
            return self._ffi.NULL if prepared is None else prepared.pointer

        steps = [
            {
                field: prepare(getattr(hold, field))
                for field in ("suspend", "resume", "clear", "restore", "resume_restored")
            }
            for hold in self._holds
        ]
        sending = [stack.enter_context(Prepared(task)) for task in self._messages]
        plan = self._ffi.new("struct dmlib_hold[]", [{k: pointer(p) for k, p in step.items()} for step in steps])
        queue = self._ffi.new("struct dm_task *[]", [prepared.pointer for prepared in sending])
        sent = self._ffi.new("int[]", len(sending))
        held_ns = self._ffi.new("uint64_t *")
        self._lib.dmlib_section(
            plan, len(steps), queue, sent, len(sending), int(self._keep_suspended), self._gate, held_ns
        )
        for i, step in enumerate(steps):
            _report(step, plan[i])
        for i, prepared in enumerate(sending):
            prepared.outcome[0] = sent[i]
        self.called.set()
        self.held = held_ns[0] / 1e9
        _check(steps, sending)


def _report(step: dict[str, Prepared | None], outcome: Any) -> None:
    """Tell the tasks of one device what C did with them."""
    results = {
        "suspend": outcome.suspended,
        "resume": outcome.resumed,
        "clear": outcome.cleared,
        "restore": outcome.restored,
        "resume_restored": outcome.resumed_restored,
    }
    for field, prepared in step.items():
        if prepared is not None:
            prepared.outcome[0] = results[field]


def _failure(prepared: Prepared | None) -> TaskError | None:
    if prepared is None or not prepared.was_sent or prepared.task.succeeded:
        return None
    return prepared.error()


def _check(steps: Sequence[dict[str, Prepared | None]], sending: Sequence[Prepared]) -> None:
    failures = [_failure(step["suspend"]) for step in steps] + [_failure(prepared) for prepared in sending]
    first = next((failure for failure in failures if failure is not None), None)
    stuck: list[TaskError] = []
    for step in steps:
        refused = _failure(step["resume"])
        if refused is None:
            continue
        back = step["resume_restored"]
        if back is not None and back.task.succeeded:
            first = first or refused
        else:
            last = _failure(back) or _failure(step["restore"]) or refused
            stuck += [refused] if last is refused else [refused, last]
    if stuck:
        raise CleanupError(f"{stuck[0].device} could not be resumed and is still suspended", stuck) from first
    if first is not None:
        raise first
    for prepared in sending:
        prepared.result()
