# SPDX-License-Identifier: MIT
"""
The ``log-writes`` target: every write, in the order in which it counts, also into a log on another device.

Parameters: ``<device> <log device>``.
Status: ``<entries> <highest sector of the log> [logging_disabled]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from dmlib.targets._base import Status, Target, TargetDevice, Words, check_device, check_extra
from dmlib.units import Sectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dmlib.ids import DeviceNumber


@dataclass(frozen=True, slots=True, init=False)
class LogWrites(Target):
    """
    A device whose writes are logged as well, so that each state that a power cut could leave can be made again.

    The message ``mark <word>`` puts a mark into the log.

    Args:
        device: The device below.
        log_device: Takes the log; what is on it is lost.
        extra: Words after these that dmlib does not know; for tables read from elsewhere.

    Raises:
        ArgumentError: A device that cannot be.

    Minimum kernel: Linux 4.1.

    Source: kernel admin-guide, log-writes.
    """

    type_name: ClassVar[str] = "log-writes"
    device: TargetDevice
    log_device: TargetDevice
    extra: tuple[str, ...] = ()

    def __init__(self, device: TargetDevice, log_device: TargetDevice, *, extra: Iterable[str] = ()) -> None:
        object.__setattr__(self, "device", check_device(device, "device"))
        object.__setattr__(self, "log_device", check_device(log_device, "log_device"))
        object.__setattr__(self, "extra", check_extra(extra))

    def _to_words(self) -> Iterable[object]:
        return self.device, self.log_device, *self.extra

    def _devices(self) -> tuple[TargetDevice, ...]:
        return self.device, self.log_device

    def _with_devices(self, resolve: Callable[[TargetDevice], DeviceNumber]) -> Self:
        return type(self)(resolve(self.device), resolve(self.log_device), extra=self.extra)

    @classmethod
    def _from_words(cls, words: Words) -> Self:
        return cls(words.device("device"), words.device("log_device"), extra=words.rest())

    @classmethod
    def _status_from_words(cls, words: Words) -> LogWritesStatus:
        entries, highest, rest = words.number("entries"), words.number("highest_sector"), words.rest()
        disabled = rest[:1] == ("logging_disabled",)
        return LogWritesStatus(
            words.line,
            rest[1:] if disabled else rest,
            entries=entries,
            highest_sector=Sectors(highest),
            logging=not disabled,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogWritesStatus(Status):
    """
    How far the log has come.

    Attributes:
        entries: Entries, marks among them.
        highest_sector: The last sector of the log device that is used.
        logging: Whether writes are still logged; not after an error of the log device.
    """

    entries: int
    highest_sector: Sectors
    logging: bool
