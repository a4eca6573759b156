# SPDX-License-Identifier: MIT
"""Tables: layout, printing, reading."""

import doctest
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import dmlib.table
from dmlib.errors import ArgumentError, ParseError
from dmlib.ids import DeviceNumber
from dmlib.table import Segment, StatusSegment, Table, status_from_entries
from dmlib.targets import (
    EmptyStatus,
    Error,
    Linear,
    RawStatus,
    RawTarget,
    Striped,
    ThinPoolTarget,
    ThinStatus,
    ThinTarget,
    Zero,
)
from dmlib.units import DataBlocks, KiB, MiB, Sectors

A, B = DeviceNumber(8, 0), DeviceNumber(8, 16)
POOL = ThinPoolTarget(A, B, KiB(64))


def segment(start, length, target=None):
    return Segment(Sectors(start), Sectors(length), target or Zero())


targets = st.sampled_from(
    [Zero(), Error(), Linear(A, KiB(4)), ThinTarget(A, 7, B), RawTarget("snapshot", "8:0 8:1 P 8"), RawTarget("x")]
)
tables = st.lists(st.tuples(st.builds(Sectors, st.integers(1, 1 << 40)), targets), min_size=1).map(Table.concat)


@given(tables)
def test_print_and_parse(table):
    """A table is read back from its text and from its entries as the same table."""
    assert Table.parse(str(table), strict=True) == table
    assert Table.from_entries(table.entries(), strict=True) == table
    assert pickle.loads(pickle.dumps(table)) == table  # noqa: S301
    assert hash(Table.parse(str(table))) == hash(table)
    assert table.problem is None


def test_concat_lays_end_to_end():
    """Each part starts where the one before ends; lengths may be text."""
    table = Table.concat([("1MiB", Linear(A, KiB(0))), (KiB(512), Zero()), (MiB(1), Error())])
    assert [(s.start, s.length, s.end) for s in table] == [
        (Sectors(0), MiB(1), MiB(1)),
        (MiB(1), KiB(512), KiB(1536)),
        (KiB(1536), MiB(1), KiB(2560)),
    ]
    assert table.length == KiB(2560)
    assert len(table) == 3
    assert table[1] == segment(2048, 1024)
    assert table == Table(list(table))


def test_entries_are_primitives():
    """The ioctl layer gets whole numbers of sectors and text."""
    table = Table.concat([(KiB(4), Linear(A, KiB(1))), (KiB(4), Zero())])
    assert table.entries() == ((0, 8, "linear", "8:0 2"), (8, 8, "zero", ""))
    assert {type(value) for entry in table.entries() for value in entry} == {int, str}


def test_text_is_that_of_dmsetup():
    """A line for each segment, as dmsetup prints it for one device, without space at the end."""
    # Linux 6.1.176, dmsetup table: "0 2048 linear 7:2 8", "0 2048 zero ", "0 32768 thin-pool 7:0 7:1 128 0 0 "
    table = Table.concat([(MiB(1), Linear("7:2", KiB(4))), (MiB(1), Zero())])
    assert str(table) == "0 2048 linear 7:2 8\n2048 2048 zero"
    assert Table.parse("0 2048 linear 7:2 8\n2048 2048 zero \n\n") == table
    assert str(Table.parse("0 32768 thin-pool 7:0 7:1 128 0 0 ")) == "0 32768 thin-pool 7:0 7:1 128 0 0"


LAYOUTS = {
    "none": ([], None, "at least one"),
    "not at 0": ([segment(8, 8)], 0, "must start at sector 0"),
    "gap": ([segment(0, 8), segment(9, 8)], 1, "a gap: must start at sector 8"),
    "gap later": ([segment(0, 8), segment(8, 8), segment(24, 8)], 2, "a gap: must start at sector 16"),
    "overlap": ([segment(0, 8), segment(7, 8)], 1, "an overlap: must start at sector 8"),
    "same twice": ([segment(0, 8), segment(0, 8)], 1, "an overlap"),
    "order": ([segment(0, 8), segment(16, 8), segment(8, 8)], 1, "a gap"),
    "empty": ([segment(0, 0)], 0, "length must not be 0"),
    "empty later": ([segment(0, 8), segment(8, 0), segment(8, 8)], 1, "length must not be 0"),
    "too long": ([segment(0, 8), segment(8, (1 << 64) - 8)], 1, "within 64 bits"),
    "pool first": ([segment(0, 8, POOL), segment(8, 8)], 0, "must be alone"),
    "pool second": ([segment(0, 8), segment(8, 8, POOL)], 1, "must be alone"),
    "stripes": ([segment(0, 8), segment(8, 9, Striped(Sectors(1), [(A, KiB(0)), (B, KiB(0))]))], 1, "multiple"),
}


@pytest.mark.parametrize(("segments", "number", "rule"), LAYOUTS.values(), ids=LAYOUTS)
def test_impossible_layouts(segments, number, rule):
    """A layout that the kernel would refuse is refused here, with the segment; read from elsewhere it is kept."""
    field = "segments" if number is None else f"segments[{number}]"
    with pytest.raises(ArgumentError) as caught:
        Table(segments)
    assert rule in caught.value.rule
    assert caught.value.field == field
    if number is not None:
        assert caught.value.value == str(segments[number])

    entries = [part.entry() for part in segments]
    with pytest.raises(ParseError, match=rule) as caught:
        Table.from_entries(entries, strict=True)
    assert caught.value.field == field

    table = Table.from_entries(entries)
    assert rule in table.problem
    assert list(table) == segments
    assert str(table) == "\n".join(str(part) for part in segments)
    with pytest.raises(ArgumentError, match="cannot be loaded"):
        table.entries()


def test_longest_table():
    """A table ends within 64 bits."""
    assert Table.single(Sectors((1 << 64) - 1), Zero()).length == Sectors((1 << 64) - 1)


def test_single():
    """One target over the whole device; a pool may be that."""
    table = Table.single("16MiB", POOL)
    assert table.entries() == ((0, 32768, "thin-pool", "8:0 8:16 128 0 0"),)
    with pytest.raises(ArgumentError, match="length must not be 0"):
        Table.single(Sectors(0), Zero())


@pytest.mark.parametrize("length", [2048, 1.0, None, DataBlocks(3)])
def test_lengths_need_a_unit(length):
    """A bare number is not a length."""
    with pytest.raises(TypeError, match="has no unit"):
        Table.single(length, Zero())
    with pytest.raises(TypeError, match=r"parts\[1\]\.length"):
        Table.concat([(KiB(4), Zero()), (length, Zero())])
    with pytest.raises(TypeError, match="start="):
        Segment(length, KiB(4), Zero())


@pytest.mark.parametrize("target", ["zero", None, Zero])
def test_segment_wants_a_target(target):
    """Text is not a target."""
    with pytest.raises(TypeError, match="must be a Target"):
        Segment(KiB(0), KiB(4), target)


def test_tables_are_values():
    """A table cannot be changed, and is a key; equal segments make equal tables."""
    table = Table.single(KiB(4), Zero())
    with pytest.raises(AttributeError):
        table.segments = ()
    with pytest.raises(AttributeError):
        table[0].start = KiB(1)
    assert {table: 1}[Table.parse("0 8 zero")] == 1
    assert table != Table.single(KiB(4), Error())
    assert table != Table.single(KiB(8), Zero())


def test_is_the_kernel_running_my_table():
    """What the kernel prints equals what was asked for by path, once the paths are resolved."""
    mine = Table.single("16MiB", ThinPoolTarget("/dev/meta", "/dev/data", KiB(64), discard_passdown=False))
    kernel = Table.from_entries([(0, 32768, "thin-pool", "8:0 8:16 128 0 1 no_discard_passdown ")])
    assert mine != kernel
    assert mine.devices == ("/dev/meta", "/dev/data")
    assert mine.resolved({"/dev/meta": A, "/dev/data": B}.__getitem__) == kernel
    assert kernel.devices == (A, B)


def test_devices_are_named_once():
    """Devices of several segments come once, in order; those of a raw target are unknown."""
    parts = [(KiB(4), t) for t in (Linear(B), Linear(A), Linear(B, KiB(4)), RawTarget("mirror", "8:32 0"))]
    assert Table.concat(parts).devices == (B, A)


def test_a_strangers_table():
    """Unknown targets and broken parameters are kept; only the second is a problem, and of the target alone."""
    text = "0 8 mirror core 2 64 nosync 2 8:0 0 8:16 0 \n8 8 linear 8:0\n16 8 linear 8:0 0 more"
    table = Table.parse(text)
    assert table.problem is None
    assert [type(part.target) for part in table] == [RawTarget, RawTarget, Linear]
    assert [getattr(part.target, "problem", None) is None for part in table] == [True, False, True]
    assert str(table) == text.replace(" \n", "\n")
    with pytest.raises(ParseError, match="offset"):
        Table.parse(text, strict=True)


@pytest.mark.parametrize(
    ("line", "field", "position"),
    [
        ("8 8", "segment", 2),
        ("x", "segment", 1),
        ("x 8 zero", "start", 0),
        ("8 x zero", "length", 1),
        ("8 -8 zero", "length", 1),
        ("8 0x8 zero", "length", 1),
        ("name: 8 8 zero", "start", 0),
        ("8 " + "9" * 5000 + " zero", "length", 1),
        ("8 \N{ARABIC-INDIC DIGIT THREE} zero", "length", 1),
    ],
)
def test_lines_that_are_no_segments(line, field, position):
    """A line without start, length and type is left out with a problem; in strict mode it is an error."""
    text = f"0 8 zero\n{line}\n"
    with pytest.raises(ParseError) as caught:
        Table.parse(text, strict=True)
    assert (caught.value.field, caught.value.position, caught.value.line) == (field, position, line)
    table = Table.parse(text)
    assert table.segments == (segment(0, 8),)
    assert table.problem == f"left out: {caught.value}"
    with pytest.raises(ArgumentError, match="cannot be loaded: left out"):
        table.entries()


lines = st.lists(st.sampled_from(["0", "8", "zero", "linear", "8:0", "thin", "-", "\n", "striped", "1"]))


@given(st.text() | lines.map(" ".join))
@example("0 8 zero\r\n8 8 zero\r\n")
@example("0 8 \x1c")
def test_any_text(text):
    """Whatever the text, lenient reading returns a table; strict reading does too or raises ParseError."""
    table = Table.parse(text)
    try:
        strict = Table.parse(text, strict=True)
    except ParseError:
        broken = [part for part in table if isinstance(part.target, RawTarget) and part.target.problem]
        assert table.problem or broken
    else:
        assert strict == table
        assert Table.from_entries(table.entries(), strict=True) == table


def test_status_of_segments():
    """Each segment of a status has place, type and state."""
    entries = [(0, 8, "linear", ""), (8, 128, "thin", "128 127"), (136, 8, "era", "8 1/2 3 - "), (144, 8, "thin", "x")]
    status = status_from_entries(entries)
    assert [type(part.status) for part in status] == [EmptyStatus, ThinStatus, RawStatus, RawStatus]
    assert status[1] == StatusSegment(
        Sectors(8), Sectors(128), "thin", ThinStatus("", mapped=Sectors(128), highest_mapped=Sectors(127))
    )
    assert [str(part) for part in status] == ["0 8 linear", "8 128 thin 128 127", "136 8 era 8 1/2 3 -", "144 8 thin x"]
    assert status[2].status.problem is None
    assert "mapped" in status[3].status.problem
    with pytest.raises(ParseError, match="mapped"):
        status_from_entries(entries, strict=True)
    assert status_from_entries([]) == ()


def test_example_in_docstring():
    """What the docstring shows is what happens."""
    result = doctest.testmod(dmlib.table)
    assert result.attempted > 0
    assert result.failed == 0
