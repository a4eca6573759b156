# SPDX-License-Identifier: MIT
"""Command line of the real-kernel runner; see ``python -m dmlib.testing run --help``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from dmlib.testing.errors import EXIT_GUEST_DIED, EXIT_TIMEOUT, EXIT_UNAVAILABLE, GuestError
from dmlib.testing.kernels import get_kernel
from dmlib.testing.runner import WAYS, run

if TYPE_CHECKING:
    from types import FrameType

_EPILOG = f"""\
Exits with the command's own status (128 and the signal's number if a signal ended it), or with {EXIT_TIMEOUT} after
the time limit, {EXIT_GUEST_DIED} if the guest died, {EXIT_UNAVAILABLE} if this machine lacks something, 130 after
Ctrl-C."""


class _Stopped(BaseException):
    """A signal asked the runner to go; raised from its handler so that everything is cleaned up on the way."""


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    raise _Stopped(number)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _parser() -> argparse.ArgumentParser:
    name = os.path.basename(sys.argv[0])
    parser = argparse.ArgumentParser(prog="python -m dmlib.testing" if name == "__main__.py" else name)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser(
        "kernel",
        help="get the kernel for guests in QEMU",
        description="Print the path of the kernel that guests in QEMU boot, downloading the distribution's if need be.",
    )
    verb = verbs.add_parser(
        "run",
        help="run a command as root on a real kernel",
        description="Run COMMAND as root on a kernel with a device mapper; the host's files are there, read-only.",
        epilog=_EPILOG,
    )
    verb.add_argument("--on", choices=WAYS, default="auto", help="where (auto: the first that works here)")
    verb.add_argument("--udev", action="store_true", help="run udevd in the guest (otherwise DM_DISABLE_UDEV=1)")
    verb.add_argument("--cpus", type=int, default=1, metavar="N", help="processors (more than one: qemu)")
    verb.add_argument("--memory", default="1G", metavar="SIZE", help="the guest's memory (default 1G)")
    verb.add_argument("--timeout", type=float, metavar="SECONDS", help="kill guest and command after this time")
    verb.add_argument("--writable", action="append", default=[], metavar="DIR", help="folder that may be changed")
    verb.add_argument(
        "--disk", action="append", default=[], type=_variable, metavar="NAME=SIZE", help="a disk, as /dev/dmlib/NAME"
    )
    verb.add_argument("--env", action="append", default=[], type=_variable, metavar="NAME=VALUE", help="set a variable")
    verb.add_argument("--console", action="store_true", help="show what the guest's kernel says, on standard error")
    verb.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND...", help="what to run")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        return _run(parser, options) if options.verb == "run" else _kernel()
    except GuestError as error:
        print(f"dmlib.testing: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except _Stopped as stopped:
        return 128 + int(stopped.args[0])
    except BrokenPipeError:
        # Whoever read the output has gone, as in "... | head"; nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE


def _kernel() -> int:
    print(get_kernel().image)
    return 0


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    command: list[str] = options.command
    if command and command[0] == "--":
        command = command[1:]
    if not command:
        parser.error("there is no command to run; put it after --")
    try:
        return run(
            command,
            on=options.on,
            extra_env=dict(options.env),
            udev=options.udev,
            cpus=options.cpus,
            memory=options.memory,
            writable=options.writable,
            disks=dict(options.disk),
            timeout=options.timeout,
            console=2 if options.console else None,
            announce=True,
        )
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
