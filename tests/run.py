# SPDX-License-Identifier: MIT
# ruff: noqa: T201 - it talks to a terminal
"""
The tests, tier by tier: what needs no kernel on this machine, the rest as root in guests with a real one.

    python tests/run.py                      all tiers but the harsh one
    TIER=unit K='pool and not grow' python tests/run.py

Guests run side by side as far as there are processors; what they print comes out one tier after the other, whole. The
exit status is 0 only if every tier ran and passed: a tier that collected nothing or whose guest died has failed.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

TREE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NO_TESTS = 5  # pytest's exit status for "nothing collected"
TEST_LIMIT = 240  # seconds for one test in a guest; generous, since a busy machine makes guests slow
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, kw_only=True)
class Tier:
    """
    One run of pytest.

    Attributes:
        name: What the summary calls it.
        group: What TIER= selects it by.
        paths: What pytest collects from.
        marks: Expression for ``-m``.
        guest: Options of dmlib's pytest plugin that choose the guest; empty runs on this machine.
        limit: Seconds after which it has failed.
    """

    name: str
    group: str
    paths: tuple[str, ...]
    marks: str = "not slow"
    guest: tuple[str, ...] = ()
    limit: int = 1200

    def command(self, expression: str) -> list[str]:
        """Return the command line of this tier, tests narrowed down to *expression*."""
        pytest = [sys.executable, "-m", "pytest", *self.paths, "-m", self.marks]
        if expression:
            pytest += ["-k", expression]
        if sys.stdout.isatty():
            pytest += ["--color=yes"]
        if self.guest:
            # A test that hangs must not take the results of all others along.
            limits = [f"--dm-timeout={self.limit}", f"--timeout={TEST_LIMIT}"]
            pytest += [*self.guest, "--dm-strict", *limits, "-p", "no:cacheprovider"]
        return pytest


UML = ("--dm-run=uml", "--dm-memory=2G")
QEMU = ("--dm-run=qemu", "--dm-udev", "--dm-cpus=2", "--dm-memory=2G")
KERNEL = ("tests/kernel",)
TIERS = (
    Tier(name="unit", group="unit", paths=("tests/unit", "tests/typing")),
    Tier(name="library", group="library", paths=("tests/library",)),
    Tier(name="kernel, without udev", group="kernel", paths=KERNEL, guest=UML),
    Tier(name="kernel, with udev", group="kernel", paths=KERNEL, guest=(*UML, "--dm-udev")),
    Tier(
        name="kernel, stock kernel with udev and two processors",
        group="kernel",
        paths=KERNEL,
        marks="concurrency and not slow",
        guest=QEMU,  # its two processors, emulated, keep about one of ours busy
    ),
    Tier(name="runner", group="runner", paths=("tests/testing/test_runner.py",)),
    Tier(
        name="plugin",
        group="runner",
        paths=("tests/testing/test_plugin.py", "tests/testing/test_sample_project.py"),
    ),
    Tier(name="harsh, without udev", group="harsh", paths=KERNEL, marks="slow", guest=UML, limit=3600),
    Tier(name="harsh, with udev", group="harsh", paths=KERNEL, marks="slow", guest=(*UML, "--dm-udev"), limit=3600),
    Tier(
        name="harsh, stock kernel with udev and two processors",
        group="harsh",
        paths=KERNEL,
        marks="slow and concurrency",
        guest=QEMU,
        limit=3600,
    ),
)


@dataclass
class Run:
    """A tier on its way."""

    tier: Tier
    output: int = -1
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    shown: int = 0
    status: int | None = None
    seconds: float = 0.0
    tail: bytes = field(default=b"", repr=False)

    def start(self, expression: str) -> None:
        """Start with output into a file that has no name."""
        with tempfile.TemporaryFile() as file:
            self.output = os.dup(file.fileno())
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            self.tier.command(expression),
            cwd=TREE,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - no threads here
        )

    def poll(self) -> None:
        """Take note of the end; a host tier has no other time limit than this one."""
        if self.process is None or self.status is not None:
            return
        self.seconds = time.monotonic() - self.began
        self.status = self.process.poll()
        if self.status is None and self.seconds > self.tier.limit + 30:
            self.process.kill()
            self.process.wait()
            self.status = 124

    def show(self) -> None:
        """Print what is new."""
        if self.process is None:
            return
        while data := os.pread(self.output, 65536, self.shown):
            self.shown += len(data)
            self.tail = (self.tail + data)[-4096:]
            sys.stdout.buffer.write(data)
        sys.stdout.flush()

    def verdict(self) -> str:
        """Say what became of it, in the words of pytest's last line if there is one."""
        words = {0: "passed", 1: "FAILED", NO_TESTS: "FAILED: no tests were collected"}
        words |= {124: "FAILED: time limit", 2: "FAILED: interrupted or not collected"}
        status = -1 if self.status is None else self.status
        word = words.get(status, f"FAILED with status {status}")
        lines = [line.strip(b"= ").decode(errors="replace") for line in self.tail.splitlines()]
        last = next((line for line in reversed(lines) if " in " in line and line.partition(" ")[0].isdigit()), "")
        return f"{word} ({last})" if last else word


def die_with_parent() -> None:
    """Have this child told when the parent dies in a way that it cannot tell itself."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def heading(text: str) -> None:
    """Print a line that is found again in long output."""
    print(f"\n######## {text} {'#' * max(0, 109 - len(text))}", flush=True)


def run_all(tiers: list[Tier], expression: str) -> list[Run]:
    """Run the tiers, as many at once as there are processors, and print them in order."""
    runs = [Run(tier) for tier in tiers]
    processors = len(os.sched_getaffinity(0))
    try:
        for current in runs:
            heading(current.tier.name)
            while current.status is None:
                busy = sum(run.process is not None and run.status is None for run in runs)
                for run in [run for run in runs if run.process is None][: processors - busy]:
                    run.start(expression)
                time.sleep(0.1)
                for run in runs:
                    run.poll()
                current.show()
            current.show()
    finally:
        for run in runs:
            if run.process is not None and run.process.poll() is None:
                run.process.terminate()
        for run in runs:
            if run.process is not None:
                run.process.wait()
    return runs


def main() -> int:
    """Run what TIER and K ask for and return the exit status."""
    group, expression = os.environ.get("TIER", ""), os.environ.get("K", "")
    groups = list(dict.fromkeys(tier.group for tier in TIERS))
    if group and group not in groups:
        print(f"TIER must be one of {', '.join(groups)}, not {group!r}", file=sys.stderr)
        return 2
    tiers = [tier for tier in TIERS if tier.group == group or (not group and tier.group != "harsh")]
    began = time.monotonic()
    try:
        runs = run_all(tiers, expression)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    # With K, what it names may live in one tier alone.
    matched = any(run.status == 0 for run in runs)
    failed = [run for run in runs if run.status != 0 and not (expression and matched and run.status == NO_TESTS)]
    heading(f"summary{f' for {shlex.quote(expression)}' if expression else ''}")
    for run in runs:
        word = "nothing matched" if run.status == NO_TESTS and run not in failed else run.verdict()
        print(f"{run.tier.name:52}{run.seconds:6.0f} s  {word}")
    print(f"{'FAILED' if failed else 'passed'} in {time.monotonic() - began:.0f} s", flush=True)
    return 1 if failed else 0


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
