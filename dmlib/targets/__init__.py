# SPDX-License-Identifier: MIT
"""
Targets: their parameters and their status, typed, one module for each family.

This module is the registry. It knows which family a target type belongs to, and imports it when the type
is first met: classes cost time to make, and most programs use few of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dmlib._lazy import importer
from dmlib.errors import ParseError

if TYPE_CHECKING:
    from dmlib.targets._base import EmptyStatus as EmptyStatus
    from dmlib.targets._base import RawStatus as RawStatus
    from dmlib.targets._base import RawTarget as RawTarget
    from dmlib.targets._base import Status as Status
    from dmlib.targets._base import StatusUnavailable as StatusUnavailable
    from dmlib.targets._base import Target as Target
    from dmlib.targets._base import TargetDevice as TargetDevice
    from dmlib.targets.delay import Delay as Delay
    from dmlib.targets.delay import DelayedPath as DelayedPath
    from dmlib.targets.delay import DelayStatus as DelayStatus
    from dmlib.targets.dust import Dust as Dust
    from dmlib.targets.dust import DustStatus as DustStatus
    from dmlib.targets.flakey import CorruptByte as CorruptByte
    from dmlib.targets.flakey import Flakey as Flakey
    from dmlib.targets.linear import Linear as Linear
    from dmlib.targets.log_writes import LogWrites as LogWrites
    from dmlib.targets.log_writes import LogWritesStatus as LogWritesStatus
    from dmlib.targets.simple import Error as Error
    from dmlib.targets.simple import Zero as Zero
    from dmlib.targets.striped import Stripe as Stripe
    from dmlib.targets.striped import Striped as Striped
    from dmlib.targets.striped import StripedStatus as StripedStatus
    from dmlib.targets.thin import ThinFailed as ThinFailed
    from dmlib.targets.thin import ThinStatus as ThinStatus
    from dmlib.targets.thin import ThinTarget as ThinTarget
    from dmlib.targets.thin import ThinUnbound as ThinUnbound
    from dmlib.targets.thin_pool import DiscardMode as DiscardMode
    from dmlib.targets.thin_pool import PoolMode as PoolMode
    from dmlib.targets.thin_pool import ThinPoolFailed as ThinPoolFailed
    from dmlib.targets.thin_pool import ThinPoolStatus as ThinPoolStatus
    from dmlib.targets.thin_pool import ThinPoolTarget as ThinPoolTarget

_TYPES: Final = {
    "linear": "Linear",
    "striped": "Striped",
    "zero": "Zero",
    "error": "Error",
    "delay": "Delay",
    "flakey": "Flakey",
    "dust": "Dust",
    "log-writes": "LogWrites",
    "thin-pool": "ThinPoolTarget",
    "thin": "ThinTarget",
}

_NAMES: Final = {
    "_base": ("EmptyStatus", "RawStatus", "RawTarget", "Status", "StatusUnavailable", "Target", "TargetDevice"),
    "linear": ("Linear",),
    "striped": ("Stripe", "Striped", "StripedStatus"),
    "simple": ("Error", "Zero"),
    "delay": ("Delay", "DelayStatus", "DelayedPath"),
    "flakey": ("CorruptByte", "Flakey"),
    "dust": ("Dust", "DustStatus"),
    "log_writes": ("LogWrites", "LogWritesStatus"),
    "thin": ("ThinFailed", "ThinStatus", "ThinTarget", "ThinUnbound"),
    "thin_pool": ("DiscardMode", "PoolMode", "ThinPoolFailed", "ThinPoolStatus", "ThinPoolTarget"),
}

_HOMES: Final = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["parse_status", "parse_target", "target_class", *_HOMES]  # noqa: PLE0604 - they are strings


__getattr__ = importer(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _class(name: str) -> Any:
    return globals().get(name) or __getattr__(name)


def target_class(type_name: str) -> type[Target] | None:
    """Return the class for the target type that the kernel calls *type_name*; ``None`` if dmlib has none."""
    name = _TYPES.get(type_name)
    cls: type[Target] | None = None if name is None else _class(name)
    return cls


def _read(type_name: str, reader: str, params: str, *, strict: bool) -> tuple[Any, str | None]:
    """Let the target's class read a line; without a class ``(None, None)``, with a broken line what is wrong."""
    cls = target_class(type_name)
    if cls is None:
        return None, None
    try:
        return getattr(cls, reader)(params), None
    except ParseError as error:
        if strict:
            raise
        return None, str(error)


def parse_target(type_name: str, params: str, *, strict: bool = False) -> Target:
    """
    Read the parameters of a target, as the kernel or :meth:`Target.params` prints them.

    Args:
        type_name: The kernel's name of the target type.
        params: The rest of the table line.
        strict: Raise for parameters that break the grammar.

    Returns:
        The target. A type that dmlib does not know gives a RawTarget; so do, unless *strict*, parameters that
        cannot be read, and then its ``problem`` says why.

    Raises:
        ParseError: In strict mode: a known type, but not its grammar.
    """
    target, problem = _read(type_name, "from_params", params, strict=strict)
    return target or _class("RawTarget")(type_name, params, problem)  # type: ignore[no-any-return]


def parse_status(type_name: str, params: str, *, strict: bool = False) -> Status:
    """
    Read what a target reports about itself.

    Args:
        type_name: The kernel's name of the target type.
        params: The rest of the status line.
        strict: Raise for a status that breaks the grammar.

    Returns:
        One of the target's status classes. A type that dmlib does not know gives a RawStatus; so does, unless
        *strict*, a status that cannot be read, and then its ``problem`` says why.

    Raises:
        ParseError: In strict mode: a known type, but not its grammar.
    """
    status, problem = _read(type_name, "parse_status", params, strict=strict)
    return status or _class("RawStatus")(params, type_name=type_name, problem=problem)  # type: ignore[no-any-return]
