# SPDX-License-Identifier: MIT
"""
The ``linear`` target: a range of another device.

Parameters: ``<device> <offset>``. Status: empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Self

from dmlib.targets._base import Target, TargetDevice, Words, check_device, check_extra, check_offset
from dmlib.units import Sectors, Size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dmlib.ids import DeviceNumber

_START: Final = Sectors(0)


@dataclass(frozen=True, slots=True, init=False)
class Linear(Target):
    """
    Map a segment onto a range of another device.

    Args:
        device: The device below.
        offset: Where the range begins there (512-byte sectors).
        extra: Words after these that dmlib does not know; for tables read from elsewhere.

    Raises:
        TypeError: An offset without a unit.
        ArgumentError: A device or an offset that cannot be.

    Source: kernel admin-guide, linear.
    """

    type_name: ClassVar[str] = "linear"
    device: TargetDevice
    offset: Sectors
    extra: tuple[str, ...] = ()

    def __init__(self, device: TargetDevice, offset: Size = _START, *, extra: Iterable[str] = ()) -> None:
        object.__setattr__(self, "device", check_device(device, "device"))
        object.__setattr__(self, "offset", check_offset(offset, "offset"))
        object.__setattr__(self, "extra", check_extra(extra))

    def _to_words(self) -> Iterable[object]:
        return self.device, self.offset.count, *self.extra

    @classmethod
    def _from_words(cls, words: Words) -> Self:
        return cls(words.device("device"), words.sectors("offset"), extra=words.rest())

    def _devices(self) -> tuple[TargetDevice, ...]:
        return (self.device,)

    def _with_devices(self, resolve: Callable[[TargetDevice], DeviceNumber]) -> Self:
        return type(self)(resolve(self.device), self.offset, extra=self.extra)
