# SPDX-License-Identifier: MIT
"""
The ``thin-pool`` target.

Parameters: ``<metadata device> <data device> <data block size> <low water mark> [<count> <feature>...]``.

Status; older kernels leave off words at the end, and dmlib then reports what was true for them::

    <transaction id> <used>/<total metadata> <used>/<total data> <held metadata root>|-
        <mode> <discard> <no space> needs_check|- <metadata low water>
    Fail
    Error
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Final, Self

from dmlib.errors import ArgumentError
from dmlib.targets._base import (
    U64_LIMIT,
    Status,
    StatusUnavailable,
    Target,
    TargetDevice,
    Words,
    check_device,
    check_extra,
)
from dmlib.targets.thin import check_data_block_size
from dmlib.units import DataBlocks, MetaBlocks, Sectors, Size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dmlib.ids import DeviceNumber

FEATURES_MAX: Final = 4
"""Most feature words that the kernel takes in a pool's parameters."""

_FEATURES: Final = frozenset(
    {"skip_block_zeroing", "ignore_discard", "no_discard_passdown", "read_only", "error_if_no_space"}
)
_NO_MARK: Final = DataBlocks(0)


class PoolMode(Enum):
    """What a pool can do."""

    READ_WRITE = "rw"
    """Everything."""

    OUT_OF_DATA_SPACE = "out_of_data_space"
    """Metadata changes, also deleting, but no block is left to give; growing the data device heals it."""

    READ_ONLY = "ro"
    """No change of metadata: because it was asked for, because metadata space ran out, or after an error."""


class DiscardMode(Enum):
    """What becomes of discards; the kernel turns passing down off by itself where the data device cannot."""

    IGNORE = "ignore_discard"
    NO_PASSDOWN = "no_discard_passdown"
    PASSDOWN = "discard_passdown"


_MODES: Final = {mode.value: mode for mode in PoolMode}
_DISCARDS: Final = {mode.value: mode for mode in DiscardMode}


@dataclass(frozen=True, slots=True, init=False)
class ThinPoolTarget(Target):
    """
    A pool of data blocks that thin devices share. It is alone in its table, and always writeable as a device.

    Args:
        metadata_device: Holds the mappings.
        data_device: Holds the blocks.
        data_block_size: 64 KiB..1 GiB, a multiple of 64 KiB. It is fixed when the pool is formatted.
        low_water_mark: With so many free blocks left (or fewer) the kernel raises an event; 0: only with none left.
        zero_new_blocks: Zero a block before a thin device sees it. Without, it may see what others deleted.
        discard: Take discards, which give blocks back to the pool.
        discard_passdown: Hand discards on to the data device. Moot, and kept as False, without *discard*.
        read_only: Let nobody change the metadata.
        error_if_no_space: With no block left, fail writes at once. (Otherwise they are queued, and fail after the
            time-out of the kernel module, 60 s by default.) Minimum thin-pool: 1.10.
        extra_features: Further feature words; for tables read from elsewhere.
        extra: Words after the features; for tables read from elsewhere.

    Raises:
        TypeError: A size without a unit, a mark that is not DataBlocks.
        ArgumentError: The block size breaks the rule, the two devices are one, or there are more than 4 features.

    Source: kernel admin-guide, thin-provisioning.
    """

    type_name: ClassVar[str] = "thin-pool"
    singleton: ClassVar[bool] = True
    metadata_device: TargetDevice
    data_device: TargetDevice
    data_block_size: Sectors
    low_water_mark: DataBlocks
    zero_new_blocks: bool = True
    discard: bool = True
    discard_passdown: bool = True
    read_only: bool = False
    error_if_no_space: bool = False
    extra_features: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    def __init__(
        self,
        metadata_device: TargetDevice,
        data_device: TargetDevice,
        data_block_size: Size,
        low_water_mark: DataBlocks = _NO_MARK,
        *,
        zero_new_blocks: bool = True,
        discard: bool = True,
        discard_passdown: bool = True,
        read_only: bool = False,
        error_if_no_space: bool = False,
        extra_features: Iterable[str] = (),
        extra: Iterable[str] = (),
    ) -> None:
        put = object.__setattr__
        put(self, "metadata_device", check_device(metadata_device, "metadata_device"))
        put(self, "data_device", check_device(data_device, "data_device"))
        if self.metadata_device == self.data_device:
            raise ArgumentError("data_device", str(data_device), "must not be the metadata device")
        put(self, "data_block_size", check_data_block_size(data_block_size))
        put(self, "low_water_mark", _check_mark(low_water_mark))
        put(self, "zero_new_blocks", bool(zero_new_blocks))
        put(self, "discard", bool(discard))
        put(self, "discard_passdown", bool(discard and discard_passdown))
        put(self, "read_only", bool(read_only))
        put(self, "error_if_no_space", bool(error_if_no_space))
        put(self, "extra_features", check_extra(extra_features, "extra_features"))
        put(self, "extra", check_extra(extra))
        known = _FEATURES.intersection(word.lower() for word in self.extra_features)
        if known:
            raise ArgumentError("extra_features", tuple(sorted(known)), "have arguments of their own")
        if len(self.features) > FEATURES_MAX:
            raise ArgumentError("extra_features", self.extra_features, "the kernel takes at most 4 features in all")

    @property
    def features(self) -> tuple[str, ...]:
        """The feature words in the kernel's order; never two that contradict or repeat each other."""
        words = (
            (not self.zero_new_blocks, "skip_block_zeroing"),
            (not self.discard, "ignore_discard"),
            (self.discard and not self.discard_passdown, "no_discard_passdown"),
            (self.read_only, "read_only"),
            (self.error_if_no_space, "error_if_no_space"),
        )
        return (*(word for wanted, word in words if wanted), *self.extra_features)

    def _to_words(self) -> Iterable[object]:
        features = self.features
        return (
            self.metadata_device,
            self.data_device,
            self.data_block_size.count,
            self.low_water_mark.count,
            len(features),
            *features,
            *self.extra,
        )

    def _devices(self) -> tuple[TargetDevice, ...]:
        return self.metadata_device, self.data_device

    def _with_devices(self, resolve: Callable[[TargetDevice], DeviceNumber]) -> Self:
        return replace(self, metadata_device=resolve(self.metadata_device), data_device=resolve(self.data_device))

    @classmethod
    def _from_words(cls, words: Words) -> Self:
        metadata_device = words.device("metadata_device")
        data_device = words.device("data_device")
        data_block_size = words.sectors("data_block_size")
        low_water_mark = DataBlocks(words.number("low_water_mark"))
        count = words.number("feature_count") if words else 0
        if count > len(words):
            raise words.bad("feature_count", f"is {count}, but {len(words)} words follow")
        features = [words.word(f"features[{number}]") for number in range(count)]
        lowered = {word.lower() for word in features}
        return cls(
            metadata_device,
            data_device,
            data_block_size,
            low_water_mark,
            zero_new_blocks="skip_block_zeroing" not in lowered,
            discard="ignore_discard" not in lowered,
            discard_passdown="no_discard_passdown" not in lowered,
            read_only="read_only" in lowered,
            error_if_no_space="error_if_no_space" in lowered,
            extra_features=[word for word in features if word.lower() not in _FEATURES],
            extra=words.rest(),
        )

    @classmethod
    def _status_from_words(cls, words: Words) -> ThinPoolStatus | ThinPoolFailed | StatusUnavailable:
        first = words.word("transaction_id")
        if first == "Fail":
            return ThinPoolFailed(words.line, words.rest())
        if first == "Error":
            return StatusUnavailable(words.line, words.rest())
        transaction_id = words.as_number(first, "transaction_id")
        used_metadata, total_metadata = words.pair("metadata")
        used_data, total_data = words.pair("data")
        held_metadata_root = words.number_or_dash("held_metadata_root") if words else None
        mode = words.one_of("mode", _MODES) if words else "rw"
        discard = words.one_of("discard", _DISCARDS) if words else None
        no_space = words.one_of("no_space", ("queue_if_no_space", "error_if_no_space")) if words else ""
        needs_check = words.one_of("needs_check", ("-", "needs_check")) == "needs_check" if words else None
        metadata_low_water = MetaBlocks(words.number("metadata_low_water")) if words else None
        return ThinPoolStatus(
            words.line,
            words.rest(),
            transaction_id=transaction_id,
            used_metadata=MetaBlocks(used_metadata),
            total_metadata=MetaBlocks(total_metadata),
            used_data=DataBlocks(used_data),
            total_data=DataBlocks(total_data),
            held_metadata_root=held_metadata_root,
            mode=_MODES[mode],
            discard=_DISCARDS[discard] if discard else None,
            error_if_no_space=no_space == "error_if_no_space",
            needs_check=needs_check,
            metadata_low_water=metadata_low_water,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinPoolStatus(Status):
    """
    A pool at work.

    Attributes:
        transaction_id: A number that belongs to user space; see ``set_transaction_id``.
        used_metadata: 4 KiB blocks. About a tenth of the device counts as used from the start: it is in reserve.
        total_metadata: 4 KiB blocks.
        used_data: Blocks of the pool's data block size.
        total_data: Blocks of the pool's data block size.
        held_metadata_root: Metadata block of the metadata snapshot, if one is held.
        mode: What the pool can do now.
        discard: What becomes of discards in effect; ``None``: the kernel does not tell (thin-pool before 1.5).
        error_if_no_space: Whether writes fail at once when no block is left. It turns on by itself when the kernel's
            time-out ends, and off again later.
        needs_check: The metadata has to be checked off-line; ``None``: the kernel does not tell (before 1.16).
        metadata_low_water: 4 KiB blocks: with so few free the kernel raises an event; ``None``: the kernel does not
            tell (before 1.20).
    """

    transaction_id: int
    used_metadata: MetaBlocks
    total_metadata: MetaBlocks
    used_data: DataBlocks
    total_data: DataBlocks
    held_metadata_root: int | None = None
    mode: PoolMode = PoolMode.READ_WRITE
    discard: DiscardMode | None = None
    error_if_no_space: bool = False
    needs_check: bool | None = None
    metadata_low_water: MetaBlocks | None = None

    @property
    def free_data(self) -> DataBlocks:
        """Data blocks that are left."""
        return DataBlocks(max(0, self.total_data.count - self.used_data.count))

    @property
    def free_metadata(self) -> MetaBlocks:
        """Metadata blocks that are left, without the kernel's reserve."""
        return MetaBlocks(max(0, self.total_metadata.count - self.used_metadata.count))

    @property
    def data_fraction(self) -> float:
        """How full the data device is, 0.0..1.0."""
        return self.used_data.count / self.total_data.count if self.total_data else 1.0

    @property
    def metadata_fraction(self) -> float:
        """How full the metadata device is, 0.0..1.0."""
        return self.used_metadata.count / self.total_metadata.count if self.total_metadata else 1.0

    @property
    def metadata_is_low(self) -> bool:
        """Whether metadata is down to the kernel's low-water mark; False where the kernel does not tell it."""
        return self.metadata_low_water is not None and self.free_metadata <= self.metadata_low_water


class ThinPoolFailed(Status):
    """``Fail``: all I/O to the pool fails until it is deactivated and repaired off-line."""

    __slots__ = ()


def _check_mark(mark: DataBlocks) -> DataBlocks:
    if not isinstance(mark, DataBlocks):
        msg = f"low_water_mark={mark!r} has no unit: write DataBlocks(1024)"
        raise TypeError(msg)
    if mark.count > U64_LIMIT:
        raise ArgumentError("low_water_mark", mark, "must fit 64 bits")
    return mark
