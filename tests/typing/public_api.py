# SPDX-License-Identifier: MIT
"""What the public API looks like to a type checker. Checked by mypy, never run."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_type

import dmlib
from dmlib import (
    DataBlocks,
    Device,
    DeviceBusyError,
    DeviceInfo,
    DeviceNumber,
    DiscardMode,
    GiB,
    KiB,
    Linear,
    ListedDevice,
    LoopDevice,
    MetaBlocks,
    MiB,
    Operation,
    PoolError,
    PoolMode,
    Result,
    Sectors,
    Segment,
    StatusSegment,
    Striped,
    Table,
    Task,
    TaskError,
    ThinDevice,
    ThinPool,
    ThinPoolStatus,
    ThinPoolTarget,
    ThinStatus,
    UdevFlags,
    User,
    Zero,
    create_sparse_file,
    driver_version,
    grow_sparse_file,
    library_version,
    list_devices,
    set_udev,
    target_versions,
    users_of,
)
from dmlib.targets import Status, Target, TargetDevice

if TYPE_CHECKING:
    from pathlib import Path


def sizes() -> None:
    """Sizes keep their kind, and mix with nothing else."""
    assert_type(KiB(64), Sectors)
    assert_type(MiB(1) + KiB(512), Sectors)
    assert_type(GiB(1) // KiB(64), int)
    assert_type(GiB(1) * 2, Sectors)
    assert_type(2 * GiB(1), Sectors)
    assert_type(GiB(1).bytes, int)
    assert_type(Sectors.parse("10GiB"), Sectors)
    assert_type(DataBlocks(8).to_sectors(KiB(64)), Sectors)
    assert_type(MetaBlocks(8).to_sectors(), Sectors)
    assert_type(DataBlocks(8) - DataBlocks(2), DataBlocks)
    DataBlocks(8) + MetaBlocks(2)  # type: ignore[operator]
    KiB(64) + DataBlocks(8)  # type: ignore[operator]
    KiB(64) + 128  # type: ignore[operator]
    assert_type(KiB(64) < GiB(1), bool)


def tables() -> None:
    """Tables are made of typed targets, and read back as such."""
    table = Table.concat([(MiB(1), Linear("/dev/loop0", MiB(4))), ("1MiB", Zero())])
    assert_type(table, Table)
    assert_type(table[0], Segment)
    assert_type(table[0].target, Target)
    assert_type(table.devices, tuple[TargetDevice, ...])
    assert_type([segment.length for segment in table], list[Sectors])
    assert_type(Table.parse("0 8 zero"), Table)
    Striped(KiB(64), [("/dev/loop0", MiB(0)), (DeviceNumber(7, 1), "1MiB")])
    Linear("/dev/loop0", 2048)  # type: ignore[arg-type]
    Table.single(2048, Zero())  # type: ignore[arg-type]


def devices() -> None:
    """A device is a name; what it tells is typed."""
    device = Device.create("disk", Table.single(MiB(1), Zero()), uuid="MINE-1", udev=UdevFlags.PRIVATE)
    assert_type(device, Device)
    assert_type(device.info(), DeviceInfo)
    assert_type(device.info().number, DeviceNumber)
    assert_type(device.table(), Table | None)
    assert_type(device.status(), tuple[StatusSegment, ...])
    assert_type(device.status()[0].status, Status)
    assert_type(device.deps(), tuple[DeviceNumber, ...])
    assert_type(device.message("text"), str | None)
    assert_type(device.rename("other"), Device)
    assert_type(device.path, str)
    with device.suspended(flush=False) as same:
        assert_type(same, Device)
    with Device.temporary(Table.single(MiB(1), Zero())) as temporary, open(temporary, "rb") as file:
        assert_type(file.read(1), bytes)
    assert_type(Task(Operation.INFO, name="disk").run(), Result)


def loops(folder: Path) -> None:
    """Files and loop devices are paths like any other."""
    create_sparse_file(folder / "data", "10GiB")
    grow_sparse_file(str(folder / "data"), GiB(11))
    with LoopDevice.temporary(folder / "data", read_only=True) as loop:
        assert_type(loop, LoopDevice)
        assert_type(loop.size, Sectors)
        assert_type(loop.refresh_size(), Sectors)
        assert_type(loop.number, DeviceNumber)
    assert_type(LoopDevice.attach(folder / "data"), LoopDevice)
    assert_type(LoopDevice.find(folder / "data"), list[LoopDevice])


def pools(meta: LoopDevice, data: Path) -> None:
    """Pools take anything that names a block device, and their thin devices know them."""
    with ThinPool.temporary(metadata=meta, data=data, data_block_size=KiB(64)) as temporary:
        assert_type(temporary, ThinPool)
    pool = ThinPool.create(
        "pool", metadata="/dev/loop0", data=DeviceNumber(7, 1), data_block_size="64KiB", discard=False
    )
    assert_type(pool, ThinPool)
    assert_type(ThinPool.open("pool"), ThinPool)
    assert_type(ThinPool.activate("pool", metadata=meta, data=data, low_water_mark=DataBlocks(64)), ThinPool)
    assert_type(pool.target(), ThinPoolTarget)
    status = pool.status()
    assert_type(status, ThinPoolStatus)
    assert_type(status.used_data, DataBlocks)
    assert_type(status.used_metadata, MetaBlocks)
    assert_type(status.mode, PoolMode)
    assert_type(status.discard, DiscardMode | None)
    assert_type(status.data_fraction, float)
    thin = pool.create_thin(0, MiB(512), external_origin=data)
    assert_type(thin, ThinDevice)
    assert_type(thin.pool, ThinPool)
    assert_type(thin.snapshot(1), ThinDevice)
    assert_type(thin.status(), ThinStatus)
    assert_type(thin.status().mapped, Sectors)
    assert_type(thin.active(), DeviceInfo | None)
    assert_type(ThinDevice.open("thin"), ThinDevice)
    pool.grow_data(GiB(20))
    pool.create_thin(0, 512)  # type: ignore[arg-type]
    pool.reconfigure(low_water_mark=64)  # type: ignore[arg-type]
    ThinPool.create("pool", metadata=meta, data=data, data_block_size=KiB(64), discards=True)  # type: ignore[call-arg]


def whole() -> None:
    """The driver as a whole, and who uses a device."""
    assert_type(list_devices(), list[ListedDevice])
    assert_type(driver_version(), tuple[int, int, int])
    assert_type(target_versions(), dict[str, tuple[int, int, int]])
    assert_type(library_version(), str)
    assert_type(users_of(DeviceNumber(7, 0)), list[User])
    set_udev("off", timeout=5)
    assert_type(dmlib.__version__, str)


def errors() -> None:
    """Errors carry typed fields."""
    try:
        Device("disk").remove()
    except DeviceBusyError as error:
        assert_type(error.users, tuple[str, ...])
        assert_type(error.operation, str)
        assert_type(error.errno, int | None)
    except TaskError as error:
        assert_type(error.kernel_log, tuple[str, ...])
    except PoolError as error:
        assert_type(error.pool, str)
