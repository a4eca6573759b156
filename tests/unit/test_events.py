# SPDX-License-Identifier: MIT
"""What two lists of devices say of what happened between them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmlib._control import ListedDevice
from dmlib.errors import UnsupportedError
from dmlib.events import Change, check_version, compare
from dmlib.ids import DeviceNumber


def listed(name="a", minor=0, event_nr=0, uuid="u"):
    return ListedDevice(name, DeviceNumber(253, minor), event_nr, uuid)


@pytest.mark.parametrize(
    ("before", "now", "kinds"),
    [
        (listed(), listed(), []),
        (listed(), listed(event_nr=3), ["changed"]),
        (listed(), listed(name="b", event_nr=1), ["renamed"]),
        (listed(), listed(name="b"), ["renamed"]),  # it has no live table, whose event it would be
        (listed(), listed(uuid="v", event_nr=9), ["removed", "created"]),  # its number was given to another
        (listed(event_nr=2), listed(event_nr=1), ["removed", "created"]),  # made again with the same uuid
        (listed(), listed(minor=1), ["removed", "created"]),
        (listed(uuid=""), listed(uuid="u", event_nr=1), ["changed"]),
        (listed(uuid=""), listed(uuid="u"), ["removed", "created"]),
        (listed(uuid=""), listed(uuid="u", name="b", event_nr=1), ["removed", "created"]),
        (listed(uuid=""), listed(uuid="", event_nr=1), ["changed"]),
        (listed(uuid=""), listed(uuid="", name="b", event_nr=1), ["renamed"]),
        (listed(uuid=""), listed(uuid="", name="b"), ["removed", "created"]),
        (listed(uuid="", event_nr=5), listed(uuid="", name="b", event_nr=4), ["removed", "created"]),
    ],
)
def test_identity(before, now, kinds):
    """A device is known again by number, uuid and a counter that does not go back; a reused number is no rename."""
    assert [change.kind for change in compare([before], [now])] == kinds


def test_order_and_fields():
    """Removals come first; each change has both states and the counter's movement."""
    a, b, c = listed("a", 0, uuid="a"), listed("b", 1, 4, uuid="b"), listed("c", 2, 7, uuid="c")
    moved = listed("b", 1, 6, uuid="b")
    assert compare([a, b], [moved, c]) == (
        Change("removed", a, a, 0),
        Change("changed", moved, b, 2),
        Change("created", c, None, 7),
    )


devices = st.lists(
    st.builds(listed, st.sampled_from("ab"), st.integers(0, 3), st.integers(0, 3), st.sampled_from(["", "u", "v"])),
    unique_by=lambda device: device.number,
)


@given(devices, devices)
def test_changes_account_for_all(before, now):
    """Applied to the list before, the changes give the list now, and each device is told of once."""
    changes = compare(before, now)
    there = {device.number: device for device in before}
    for change in changes:
        if change.kind == "removed":
            assert there.pop(change.device.number) == change.before == change.device
        else:
            assert there.pop(change.device.number, None) == change.before
            there[change.device.number] = change.device
            assert change.events == (change.device.event_nr or 0) - (change.before.event_nr if change.before else 0)
    assert sorted(there.values(), key=lambda device: device.number) == sorted(now, key=lambda device: device.number)


def test_versions():
    """A driver before 4.37 is refused with what is needed."""
    check_version((4, 37, 0))
    check_version((5, 0, 0))
    with pytest.raises(UnsupportedError) as caught:
        check_version((4, 36, 9))
    assert (caught.value.have, caught.value.need) == ("4.36.9", "driver 4.37.0 (Linux 4.14)")
