# SPDX-License-Identifier: MIT
"""The striped target."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmlib.errors import ArgumentError, ParseError
from dmlib.ids import DeviceNumber
from dmlib.table import Table
from dmlib.targets import RawTarget, Stripe, Striped, parse_target
from dmlib.units import KiB, MiB, Sectors

numbers = st.builds(DeviceNumber, st.integers(0, 4095), st.integers(0, (1 << 20) - 1))
offsets = st.builds(Sectors, st.integers(0, (1 << 64) - 1))
chunks = st.builds(Sectors, st.integers(1, (1 << 32) - 1))
A, B = DeviceNumber(7, 2), DeviceNumber(7, 3)


@given(chunks, st.lists(st.tuples(numbers | st.just("/dev/x"), offsets), min_size=1, max_size=6), st.just(("y",)))
def test_print_and_parse(chunk_size, stripes, extra):
    """What is printed is read back as the same target."""
    target = Striped(chunk_size, stripes, extra=extra)
    assert parse_target("striped", target.params(), strict=True) == target
    assert target.devices == tuple(device for device, _ in stripes)


def test_kernel_form():
    """The kernel prints count, chunk size, then device and offset of each."""
    # Linux 6.1.176, dmsetup table: "0 16384 striped 2 64 7:2 0 7:3 128"
    target = Striped(KiB(32), [(A, Sectors(0)), (B, "64KiB")])
    assert target.params() == "2 64 7:2 0 7:3 128"
    assert parse_target("striped", "2 64 7:2 0 7:3 128 ") == target
    assert target.stripes[1] == Stripe(B, KiB(64))
    assert pickle.loads(pickle.dumps(target)) == target  # noqa: S301


def test_limits_of_chunk_size():
    """A chunk has 1 to 2^32-1 sectors."""
    for count in (1, (1 << 32) - 1):
        assert Striped(Sectors(count), [(A, KiB(0))]).chunk_size == Sectors(count)
    for count in (0, 1 << 32):
        with pytest.raises(ArgumentError) as caught:
            Striped(Sectors(count), [(A, KiB(0))])
        assert caught.value.field == "chunk_size"


def test_refused():
    """No stripes, a stripe without unit, a bad device: each is named."""
    with pytest.raises(ArgumentError, match="at least one"):
        Striped(KiB(4), [])
    with pytest.raises(TypeError, match=r"stripes\[1\]\.offset=0 has no unit"):
        Striped(KiB(4), [(A, KiB(0)), (B, 0)])
    with pytest.raises(ArgumentError) as caught:
        Striped(KiB(4), [(A, KiB(0)), ("a b", KiB(0))])
    assert caught.value.field == "stripes[1].device"
    with pytest.raises(TypeError, match="chunk_size=8 has no unit"):
        Striped(8, [(A, KiB(0))])


def test_length_rule():
    """A segment holds whole rows of chunks; the kernel says the same."""
    # Linux 6.1.176: "0 2000 striped 2 64 ..." is refused, "Target length not divisible by chunk size"
    target = Striped(Sectors(64), [(A, KiB(0)), (B, KiB(0))])
    assert Table.single(Sectors(128), target).length == Sectors(128)
    assert Table.single(MiB(1), target).length == MiB(1)
    for count in (2000, 127, 129, 64):
        with pytest.raises(ArgumentError, match="multiple of chunk size times stripes, 128 sectors"):
            Table.single(Sectors(count), target)


def test_resolved():
    """Paths become numbers, offsets stay."""
    target = Striped(KiB(4), [("/dev/a", KiB(1)), (B, KiB(2))], extra=("x",))
    found = {"/dev/a": A, B: B}
    assert target.resolved(found.__getitem__) == Striped(KiB(4), [(A, KiB(1)), (B, KiB(2))], extra=("x",))


@pytest.mark.parametrize(
    ("text", "field", "position"),
    [
        ("", "stripe_count", 0),
        ("0 64", "stripe_count", 0),
        ("x 64", "stripe_count", 0),
        ("4294967295 64 8:0 0", "stripe_count", 0),
        ("1", "stripe_count", 0),
        ("1 64", "stripes[0].device", 2),
        ("1 0 8:0 0", "chunk_size", 1),
        ("1 4294967296 8:0 0", "chunk_size", 1),
        ("2 64 8:0 0", "stripes[1].device", 4),
        ("2 64 8:0 0 8:1", "stripes[1].offset", 5),
        ("2 64 8:0 0 8:1 x", "stripes[1].offset", 5),
    ],
)
def test_malformed(text, field, position):
    """A broken line is kept raw with its problem; in strict mode the word at fault is named."""
    with pytest.raises(ParseError) as caught:
        parse_target("striped", text, strict=True)
    assert (caught.value.field, caught.value.position) == (field, position)
    assert parse_target("striped", text) == RawTarget("striped", text)
