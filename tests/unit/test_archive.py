# SPDX-License-Identifier: MIT
"""What dmsetup prints for many devices, read without any of them."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmlib import parse_status, parse_table
from dmlib.errors import ParseError
from dmlib.ids import DeviceNumber
from dmlib.table import Table
from dmlib.targets import Linear, RawTarget, ThinPoolStatus, ThinStatus, Zero
from dmlib.units import DataBlocks, Sectors

# In the form of dmsetup, with names that are hard to tell from the rest; the kernel tier reads what it really prints.
TABLES = """\
docker-8:1-1234-pool: 0 131072 thin-pool 7:0 7:1 128 0 0
with blanks: 0 2048 linear 7:2 0
with blanks: 2048 2048 zero
with: colon: 0 8 zero
empty:
8:0: 0 16 striped 2 8 7:0 0 7:1 0
"""
STATUS = """\
docker-8:1-1234-pool: 0 131072 thin-pool 0 9/1024 3/1024 - rw discard_passdown queue_if_no_space - 256
thin: 0 65536 thin 384 65535
with blanks: 0 2048 linear
with blanks: 2048 2048 zero
broken: 0 8 thin-pool Fail
"""


def test_tables():
    """Each device has its segments, in order, whatever is in its name."""
    tables = parse_table(TABLES)
    assert list(tables) == ["docker-8:1-1234-pool", "with blanks", "with: colon", "empty", "8:0"]
    linear = Linear(DeviceNumber(7, 2), Sectors(0))
    assert tables["with blanks"] == Table.concat([(Sectors(2048), linear), (Sectors(2048), Zero())])
    assert tables["8:0"][0].target.type_name == "striped"
    assert (len(tables["empty"]), tables["empty"].problem) == (0, "must be at least one")
    assert tables.unread == ()
    assert list(parse_table(TABLES, strict=True)) == list(tables)


def test_status():
    """So has each its status."""
    status = parse_status(STATUS, strict=True)
    assert isinstance(status["docker-8:1-1234-pool"][0].status, ThinPoolStatus)
    assert status["docker-8:1-1234-pool"][0].status.used_data == DataBlocks(3)
    assert isinstance(status["thin"][0].status, ThinStatus)
    assert [segment.type_name for segment in status["with blanks"]] == ["linear", "zero"]
    assert status["broken"][0].status.raw == "Fail"


def test_one_device():
    """A text about one device has no names."""
    assert parse_table("0 8 zero\n8 8 zero\n", strict=True)[""].length == Sectors(16)
    assert list(parse_status("0 8 zero \n", strict=True)) == [""]


@pytest.mark.parametrize("text", ["", "\n", "No devices found\n"])
def test_no_devices(text):
    """No devices are no trouble."""
    assert parse_table(text, strict=True) == parse_status(text, strict=True) == {}


@pytest.mark.parametrize(
    "line",
    ["hello", "a: 0 x zero", "a: 0 8", "0 8", "a: -1 8 zero", "a: 123456789012345678901 8 zero", "# dmsetup table"],
)
def test_other_lines(line):
    """A line of something else is kept apart, and named in strict mode."""
    text = f"a: 0 8 zero\n{line}\nb: 0 8 zero\n"
    for read in (parse_table, parse_status):
        assert list(read(text)) == ["a", "b"]
        assert read(text).unread == (line,)
        with pytest.raises(ParseError) as caught:
            read(text, strict=True)
        assert caught.value.line == line


def test_what_a_target_cannot_read():
    """A line that breaks its target's grammar is kept raw, and is an error in strict mode."""
    text = "a: 0 8 linear 7:0\nb: 0 8 no-such-target 1 2\n"
    tables = parse_table(text)
    assert isinstance(tables["a"][0].target, RawTarget)
    assert tables["a"][0].target.problem is not None
    assert tables["b"][0].target == RawTarget("no-such-target", "1 2")
    with pytest.raises(ParseError):
        parse_table(text, strict=True)
    assert parse_status("a: 0 8 thin x")["a"][0].status.problem is not None
    with pytest.raises(ParseError):
        parse_status("a: 0 8 thin x", strict=True)


names = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: not any(digit in name for digit in "0123456789") and not name.endswith(":") and name == name.strip()
)


@given(st.dictionaries(names, st.lists(st.integers(1, 1000), min_size=1, max_size=3), max_size=4))
def test_print_and_parse(devices):
    """What is printed with names in front is read back the same."""
    tables = {name: Table.concat([(Sectors(size), Zero()) for size in sizes]) for name, sizes in devices.items()}
    text = "".join(f"{name}: {line}\n" for name, table in tables.items() for line in str(table).split("\n"))
    assert parse_table(text, strict=True) == tables


@given(st.text() | st.text("0123456789: az-\n"))
def test_any_text(text):
    """No text is too strange to be read leniently; strictly, there is a ParseError or nothing."""
    for read in (parse_table, parse_status):
        found = read(text)
        with contextlib.suppress(ParseError):
            assert read(text, strict=True) == found
