# SPDX-License-Identifier: MIT
"""What dmsetup prints for all devices is read as what the devices themselves say."""

import pytest

from dmlib import Device, MiB, Table, Zero, list_devices, parse_status, parse_table
from kernel_kit import tool

pytestmark = pytest.mark.once


@pytest.mark.usefixtures("thin", "linear_device")
def test_all_devices(unique_name):
    """Names with blanks and colons, several segments, a device without a table: all are as the driver has them."""
    hard = Device.create(unique_name(" a: b"), Table.concat([(MiB(1), Zero()), (MiB(1), Zero())]))
    empty = Device.create(unique_name("-empty"))
    tables, status = parse_table(tool("dmsetup", "table")), parse_status(tool("dmsetup", "status", "--noflush"))
    assert set(tables) == set(status) == {device.name for device in list_devices()}
    assert (tables.unread, status.unread) == ((), ())
    for name, table in tables.items():
        assert list(table) == list(Device(name).table() or ())
        assert status[name] == Device(name).status()
    assert parse_table(tool("dmsetup", "table", hard.name), strict=True)[""] == hard.table()
    hard.remove()
    empty.remove()
    assert len(tables) == 5
