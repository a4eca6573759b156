# SPDX-License-Identifier: MIT
"""
Device mapper for Python: typed, exception-raising, udev-correct.

Importing dmlib opens nothing, needs no privilege and no driver, and loads a module only when a name of it is used.
"""

from dmlib._lazy import importer

TYPE_CHECKING = False  # what typing's is to type checkers, without the cost of importing typing
if TYPE_CHECKING:
    from dmlib.aio import AsyncEventMonitor as AsyncEventMonitor
    from dmlib.archive import ByDevice as ByDevice
    from dmlib.archive import parse_status as parse_status
    from dmlib.archive import parse_table as parse_table
    from dmlib.device import Device as Device
    from dmlib.driver import ListedDevice as ListedDevice
    from dmlib.driver import driver_version as driver_version
    from dmlib.driver import library_version as library_version
    from dmlib.driver import list_devices as list_devices
    from dmlib.driver import remove_all as remove_all
    from dmlib.driver import target_version as target_version
    from dmlib.driver import target_versions as target_versions
    from dmlib.errors import ArgumentError as ArgumentError
    from dmlib.errors import CleanupError as CleanupError
    from dmlib.errors import DeviceBusyError as DeviceBusyError
    from dmlib.errors import DeviceExistsError as DeviceExistsError
    from dmlib.errors import DeviceNotFoundError as DeviceNotFoundError
    from dmlib.errors import DmError as DmError
    from dmlib.errors import DriverUnavailableError as DriverUnavailableError
    from dmlib.errors import ForeignDeviceError as ForeignDeviceError
    from dmlib.errors import OutOfDataSpaceError as OutOfDataSpaceError
    from dmlib.errors import OutOfMetadataSpaceError as OutOfMetadataSpaceError
    from dmlib.errors import ParseError as ParseError
    from dmlib.errors import PermissionDeniedError as PermissionDeniedError
    from dmlib.errors import PoolError as PoolError
    from dmlib.errors import PoolFailedError as PoolFailedError
    from dmlib.errors import PoolNeedsCheckError as PoolNeedsCheckError
    from dmlib.errors import PoolReadOnlyError as PoolReadOnlyError
    from dmlib.errors import StateError as StateError
    from dmlib.errors import SuspendTimeoutError as SuspendTimeoutError
    from dmlib.errors import TargetRefusedError as TargetRefusedError
    from dmlib.errors import TaskError as TaskError
    from dmlib.errors import UdevTimeoutError as UdevTimeoutError
    from dmlib.errors import UnsupportedError as UnsupportedError
    from dmlib.events import Change as Change
    from dmlib.events import EventMonitor as EventMonitor
    from dmlib.ids import DeviceNumber as DeviceNumber
    from dmlib.loop import LoopDevice as LoopDevice
    from dmlib.loop import LoopOptions as LoopOptions
    from dmlib.loop import LoopStatus as LoopStatus
    from dmlib.loop import create_sparse_file as create_sparse_file
    from dmlib.loop import grow_sparse_file as grow_sparse_file
    from dmlib.operations import Geometry as Geometry
    from dmlib.operations import Operation as Operation
    from dmlib.owners import LvmName as LvmName
    from dmlib.owners import Owner as Owner
    from dmlib.owners import join_lvm_name as join_lvm_name
    from dmlib.owners import owner_of as owner_of
    from dmlib.owners import split_lvm_name as split_lvm_name
    from dmlib.results import DeviceInfo as DeviceInfo
    from dmlib.results import Result as Result
    from dmlib.sysfs import BlockDevice as BlockDevice
    from dmlib.sysfs import block_device as block_device
    from dmlib.sysfs import block_devices as block_devices
    from dmlib.table import Segment as Segment
    from dmlib.table import StatusSegment as StatusSegment
    from dmlib.table import Table as Table
    from dmlib.targets import CorruptByte as CorruptByte
    from dmlib.targets import Delay as Delay
    from dmlib.targets import DelayedPath as DelayedPath
    from dmlib.targets import DelayStatus as DelayStatus
    from dmlib.targets import DiscardMode as DiscardMode
    from dmlib.targets import Dust as Dust
    from dmlib.targets import DustStatus as DustStatus
    from dmlib.targets import EmptyStatus as EmptyStatus
    from dmlib.targets import Error as Error
    from dmlib.targets import Flakey as Flakey
    from dmlib.targets import Linear as Linear
    from dmlib.targets import LogWrites as LogWrites
    from dmlib.targets import LogWritesStatus as LogWritesStatus
    from dmlib.targets import PoolMode as PoolMode
    from dmlib.targets import RawStatus as RawStatus
    from dmlib.targets import RawTarget as RawTarget
    from dmlib.targets import StatusUnavailable as StatusUnavailable
    from dmlib.targets import Stripe as Stripe
    from dmlib.targets import Striped as Striped
    from dmlib.targets import StripedStatus as StripedStatus
    from dmlib.targets import ThinFailed as ThinFailed
    from dmlib.targets import ThinPoolFailed as ThinPoolFailed
    from dmlib.targets import ThinPoolStatus as ThinPoolStatus
    from dmlib.targets import ThinPoolTarget as ThinPoolTarget
    from dmlib.targets import ThinStatus as ThinStatus
    from dmlib.targets import ThinTarget as ThinTarget
    from dmlib.targets import ThinUnbound as ThinUnbound
    from dmlib.targets import Zero as Zero
    from dmlib.targets.thin import recommended_metadata_size as recommended_metadata_size
    from dmlib.task import Task as Task
    from dmlib.thin import PoolFeatures as PoolFeatures
    from dmlib.thin import ThinDevice as ThinDevice
    from dmlib.thin import ThinPool as ThinPool
    from dmlib.tree import DeviceTree as DeviceTree
    from dmlib.tree import tear_down as tear_down
    from dmlib.udev import UdevFlags as UdevFlags
    from dmlib.udev import set_udev as set_udev
    from dmlib.units import DataBlocks as DataBlocks
    from dmlib.units import GiB as GiB
    from dmlib.units import KiB as KiB
    from dmlib.units import MetaBlocks as MetaBlocks
    from dmlib.units import MiB as MiB
    from dmlib.units import Sectors as Sectors
    from dmlib.units import Size as Size
    from dmlib.units import TiB as TiB
    from dmlib.units import format_bytes as format_bytes
    from dmlib.usage import User as User
    from dmlib.usage import device_under as device_under
    from dmlib.usage import users_of as users_of

__version__ = "0.1.0.dev0"

_ROOMS = {
    "units": "DataBlocks GiB KiB MetaBlocks MiB Sectors Size TiB format_bytes",
    "ids": "DeviceNumber",
    "owners": "LvmName Owner join_lvm_name owner_of split_lvm_name",
    "errors": (
        "ArgumentError CleanupError DeviceBusyError DeviceExistsError DeviceNotFoundError DmError "
        "DriverUnavailableError ForeignDeviceError OutOfDataSpaceError OutOfMetadataSpaceError ParseError "
        "PermissionDeniedError PoolError PoolFailedError PoolNeedsCheckError PoolReadOnlyError StateError "
        "SuspendTimeoutError TargetRefusedError TaskError UdevTimeoutError UnsupportedError"
    ),
    "targets": (
        "CorruptByte Delay DelayStatus DelayedPath Dust DustStatus Flakey LogWrites LogWritesStatus "
        "DiscardMode EmptyStatus Error Linear PoolMode RawStatus RawTarget StatusUnavailable Stripe Striped "
        "StripedStatus ThinFailed ThinPoolFailed ThinPoolStatus ThinPoolTarget ThinStatus ThinTarget "
        "ThinUnbound Zero"
    ),
    "table": "Segment StatusSegment Table",
    "archive": "ByDevice parse_status parse_table",
    "operations": "Geometry Operation",
    "results": "DeviceInfo Result",
    "task": "Task",
    "udev": "UdevFlags set_udev",
    "driver": "ListedDevice driver_version library_version list_devices remove_all target_version target_versions",
    "sysfs": "BlockDevice block_device block_devices",
    "tree": "DeviceTree tear_down",
    "events": "Change EventMonitor",
    "aio": "AsyncEventMonitor",
    "device": "Device",
    "loop": "LoopDevice LoopOptions LoopStatus create_sparse_file grow_sparse_file",
    "usage": "User device_under users_of",
    "thin": "PoolFeatures ThinDevice ThinPool",
    "targets.thin": "recommended_metadata_size",
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - they are strings

if not TYPE_CHECKING:  # type checkers see the imports above, and so a name that is not there
    __getattr__ = importer(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
