# SPDX-License-Identifier: MIT
"""Sizes: arithmetic within a unit, and refusal of everything that would mix units."""

import copy
import doctest
import operator
import pickle
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmlib import ids, units
from dmlib.errors import ArgumentError
from dmlib.units import (
    DataBlocks,
    GiB,
    KiB,
    MetaBlocks,
    MiB,
    Sectors,
    TiB,
    as_sectors,
    format_bytes,
)

KINDS = (Sectors, DataBlocks, MetaBlocks)
counts = st.integers(min_value=0, max_value=1 << 70)


@pytest.mark.parametrize(
    ("size", "count"), [(KiB(1), 2), (KiB(64), 128), (MiB(1), 2048), (GiB(1), 1 << 21), (TiB(1), 1 << 31), (KiB(0), 0)]
)
def test_unit_functions_count_sectors(size, count):
    """KiB to TiB return sectors of 512 bytes."""
    assert size == Sectors(count)
    assert size.bytes == count * 512


@given(counts, counts)
def test_arithmetic_is_that_of_whole_numbers(left, right):
    """Sums, order and remainders of sizes are those of their counts."""
    a, b = Sectors(left), Sectors(right)
    assert (a + b).count == left + right
    assert (a + b) - b == a
    assert (a < b, a <= b, a > b, a >= b, a == b) == (left < right, left <= right, left > right, left >= right, a == b)
    assert (a == b) is (left == right)
    assert bool(a) is bool(left)
    assert (a * 3).count == (3 * a).count == left * 3
    if right:
        assert a // b == left // right
        assert type(a // b) is int
        assert (a % b).count == left % right


@pytest.mark.parametrize("kind", KINDS)
def test_result_keeps_its_kind(kind):
    """Arithmetic on a kind of block gives the same kind."""
    a, b = kind(7), kind(2)
    assert [type(x) for x in (a + b, a - b, a * 2, 2 * a, a % b)] == [kind] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_negative_is_refused(kind):
    """No size is below zero, not even as a difference."""
    with pytest.raises(ArgumentError, match="cannot be negative") as caught:
        kind(-1)
    assert caught.value.value == -1
    with pytest.raises(ArgumentError):
        kind(1) - kind(2)
    assert kind(2) - kind(2) == kind(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [1.0, "1", None, True, Fraction(1)])
def test_only_whole_numbers_make_a_size(kind, value):
    """A float, a text, a boolean is not a count."""
    with pytest.raises(TypeError, match="takes a whole number"):
        kind(value)


MIXES = [(a, b) for a in KINDS for b in (*KINDS, int) if a is not b]


@pytest.mark.parametrize("verb", [operator.add, operator.sub, operator.floordiv, operator.mod])
@pytest.mark.parametrize(("left", "right"), MIXES)
def test_units_do_not_mix(verb, left, right):
    """Adding, subtracting or dividing across units, or with a bare number, is a TypeError both ways round."""
    with pytest.raises(TypeError):
        verb(left(4), right(2))
    with pytest.raises(TypeError):
        verb(right(4), left(2))


@pytest.mark.parametrize("verb", [operator.lt, operator.le, operator.gt, operator.ge])
@pytest.mark.parametrize(("left", "right"), MIXES)
def test_units_do_not_compare(verb, left, right):
    """Order across units is a TypeError; they are unequal, and never one dictionary key."""
    with pytest.raises(TypeError):
        verb(left(4), right(4))
    assert left(4) != right(4)
    assert len({left(4): 1, right(4): 2}) == 2


@pytest.mark.parametrize("factor", [2.0, "2", True, Sectors(2)])
def test_only_whole_factors(factor):
    """A size is multiplied by a whole number only."""
    with pytest.raises(TypeError):
        Sectors(1) * factor


@pytest.mark.parametrize("cast", [int, float, operator.index, hex, range])
def test_no_silent_number(cast):
    """A size cannot slip in where a number of bytes is meant."""
    with pytest.raises(TypeError):
        cast(Sectors(8))


@pytest.mark.parametrize("kind", KINDS)
def test_immutable(kind):
    """A size cannot be changed, nor given attributes."""
    size = kind(5)
    with pytest.raises(AttributeError, match="cannot be changed"):
        size.count = 6
    with pytest.raises(AttributeError, match="cannot be changed"):
        del size.count
    with pytest.raises(AttributeError):
        size.other = 1
    assert size == kind(5)


@pytest.mark.parametrize("kind", KINDS)
def test_pickle_copy_hash(kind):
    """Copies through pickle and copy are equal, of the same kind, and hash alike."""
    size = kind(1 << 40)
    for twin in (pickle.loads(pickle.dumps(size)), copy.copy(size), copy.deepcopy(size)):  # noqa: S301
        assert twin == size
        assert type(twin) is kind
        assert hash(twin) == hash(size)


def test_repr_and_str():
    """The repr makes the size again; the text says the unit."""
    assert [repr(kind(3)) for kind in KINDS] == ["Sectors(3)", "DataBlocks(3)", "MetaBlocks(3)"]
    assert [str(kind(3)) for kind in KINDS] == ["3s", "3 data blocks", "3 metadata blocks"]
    assert [str(x) for x in (Sectors(0), Sectors(2), KiB(1024), KiB(1025), TiB(1024))] == [
        "0s",
        "1KiB",
        "1MiB",
        "1025KiB",
        "1PiB",
    ]


@pytest.mark.parametrize(
    ("text", "sectors"),
    [
        ("64KiB", 128),
        (" 1.5 GiB ", 3 << 20),
        ("10GB", 10**10 // 512),
        ("2048s", 2048),
        ("512B", 1),
        ("0s", 0),
        ("0.5KiB", 1),
        ("512kB", 1000),
        ("1MB".replace("1", "64"), 125000),
        ("1PiB", 1 << 41),
        ("0.0000000000000000000KiB", 0),
    ],
)
def test_parse(text, sectors):
    """A number with a unit is read exactly."""
    assert Sectors.parse(text) == Sectors(sectors)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "64",
        "64K",
        "64k",
        "64kib",
        "64 K iB",
        "KiB",
        "-1KiB",
        "+1KiB",
        "1e3KiB",
        "1,5KiB",
        ".5KiB",
        "1.KiB",
        "0x10KiB",
        "64KiB 1",
        "1_000s",
        "\N{ARABIC-INDIC DIGIT THREE}KiB",
        "1\N{MICRO SIGN}B",
        "1KiB\0",
        "9" * 5000 + "KiB",
        "nanKiB",
    ],
)
def test_parse_refuses_other_forms(text):
    """A bare number, a lone letter, another sign or script is refused, with a list of what to write."""
    with pytest.raises(ArgumentError, match="write a number and a unit") as caught:
        Sectors.parse(text, "data_size")
    assert caught.value.field == "data_size"


@pytest.mark.parametrize("text", ["1B", "513B", "0.5s", "1.5s", "0.3KiB", "1kB", "1MB"])
def test_parse_refuses_parts_of_a_sector(text):
    """A size that is not a whole number of sectors is never rounded."""
    with pytest.raises(ArgumentError, match="whole number of 512-byte sectors"):
        Sectors.parse(text)


@given(counts)
def test_format_parse_round_trip(count):
    """Every size is read back from its text exactly."""
    assert Sectors.parse(str(Sectors(count))) == Sectors(count)


@given(st.text())
def test_parse_never_fails_otherwise(text):
    """Whatever the text, it is a size or an ArgumentError."""
    try:
        assert Sectors.parse(text) >= Sectors(0)
    except ArgumentError as error:
        assert error.value == text  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize("value", [65536, 0, 1.5, None, b"1KiB", DataBlocks(1), MetaBlocks(1), True])
def test_as_sectors_refuses_what_has_no_unit(value):
    """A bare number is a TypeError that says what to write instead."""
    with pytest.raises(TypeError, match=r'offset=.* has no unit: write KiB\(64\), .* or "10GiB"'):
        as_sectors(value, "offset")


def test_as_sectors_takes_sizes_and_text():
    """Sectors pass as they are; text is read."""
    size = Sectors(9)
    assert as_sectors(size, "size") is size
    assert as_sectors("10GiB", "size") == GiB(10)


@pytest.mark.parametrize("size", [1, 511, 513, 1 << 20 | 1])
def test_from_bytes_refuses_parts_of_a_sector(size):
    """Bytes have to be a multiple of 512."""
    with pytest.raises(ArgumentError, match="multiple of 512"):
        Sectors.from_bytes(size)


def test_from_bytes():
    """Bytes become sectors and back."""
    assert Sectors.from_bytes(1 << 30) == GiB(1)
    assert Sectors.from_bytes(0) == Sectors(0)
    with pytest.raises(ArgumentError, match="negative"):
        Sectors.from_bytes(-512)


def test_blocks_to_sectors():
    """Pool blocks need the pool's block size, metadata blocks have 4 KiB."""
    assert DataBlocks(3).to_sectors(KiB(64)) == KiB(192)
    assert MetaBlocks(3).to_sectors() == KiB(12)
    assert MetaBlocks(3).bytes == 12288
    assert not hasattr(DataBlocks(3), "bytes")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1610612736, "1.5 GiB"),
        (65.54e3, "64 KiB"),
        (1 << 50, "1 PiB"),
    ],
)
def test_format_bytes(size, text):
    """Sizes for people are rounded to four digits."""
    assert format_bytes(size) == text


@pytest.mark.parametrize("module", [units, ids])
def test_examples_in_docstrings(module):
    """What the docstrings show is what happens."""
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
