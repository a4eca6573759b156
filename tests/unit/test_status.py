# SPDX-License-Identifier: MIT
"""Status lines: every form that kernels print, old ones, future ones, and nonsense."""

import pickle
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dmlib.errors import ParseError
from dmlib.ids import DeviceNumber
from dmlib.targets import (
    DiscardMode,
    EmptyStatus,
    PoolMode,
    RawStatus,
    StatusUnavailable,
    StripedStatus,
    ThinFailed,
    ThinPoolFailed,
    ThinPoolStatus,
    ThinStatus,
    ThinUnbound,
    parse_status,
)
from dmlib.units import DataBlocks, MetaBlocks, Sectors

TYPES = ("linear", "striped", "zero", "error", "thin-pool", "thin")


def captured():
    """Return the lines of the data file as (type, text)."""
    text = (Path(__file__).parent.parent / "data" / "status-lines.txt").read_text(encoding="ascii")
    lines = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    assert all(len(line) == 3 and line[2] == "." for line in lines)
    return [(type_name, status) for type_name, status, _ in lines]


CAPTURED = captured()


@pytest.mark.parametrize(("type_name", "text"), CAPTURED)
def test_captured_lines_are_typed(type_name, text):
    """Every line that a real kernel printed is read, in strict mode, with nothing left over."""
    status = parse_status(type_name, text, strict=True)
    assert not isinstance(status, RawStatus)
    assert status.raw == text
    assert status.extra == ()
    assert parse_status(type_name, text.rstrip()) == status
    assert pickle.loads(pickle.dumps(status)) == status  # noqa: S301


def words_of(status):
    """Print a pool's status again from its fields."""
    return [
        str(status.transaction_id),
        f"{status.used_metadata.count}/{status.total_metadata.count}",
        f"{status.used_data.count}/{status.total_data.count}",
        "-" if status.held_metadata_root is None else str(status.held_metadata_root),
        status.mode.value,
        status.discard.value,
        "error_if_no_space" if status.error_if_no_space else "queue_if_no_space",
        "needs_check" if status.needs_check else "-",
        str(status.metadata_low_water.count),
    ]


POOL_LINES = [text for type_name, text in CAPTURED if type_name == "thin-pool" and text != "Fail"]


@pytest.mark.parametrize("text", POOL_LINES)
def test_no_word_is_lost(text):
    """A pool's status holds every word of its line."""
    assert words_of(parse_status("thin-pool", text)) == text.split()


def test_pool_at_work():
    """The fields have their units."""
    text = "7 1650/16384 2/256 26 rw discard_passdown queue_if_no_space - 1024 "
    assert parse_status("thin-pool", text) == ThinPoolStatus(
        text,
        transaction_id=7,
        used_metadata=MetaBlocks(1650),
        total_metadata=MetaBlocks(16384),
        used_data=DataBlocks(2),
        total_data=DataBlocks(256),
        held_metadata_root=26,
        mode=PoolMode.READ_WRITE,
        discard=DiscardMode.PASSDOWN,
        error_if_no_space=False,
        needs_check=False,
        metadata_low_water=MetaBlocks(1024),
    )


def test_pool_figures():
    """Free space, fractions and the metadata mark follow from the counts."""
    status = parse_status("thin-pool", "0 15872/16384 64/256 - rw discard_passdown queue_if_no_space - 512 ")
    assert (status.free_data, status.free_metadata) == (DataBlocks(192), MetaBlocks(512))
    assert (status.data_fraction, status.metadata_fraction) == (0.25, 0.96875)
    assert status.metadata_is_low
    assert not parse_status(
        "thin-pool", "0 15871/16384 64/256 - rw discard_passdown queue_if_no_space - 512 "
    ).metadata_is_low
    # A pool whose metadata was too small to learn its data size, captured above; and an impossible one.
    assert parse_status("thin-pool", "0 9/10 0/0 - ro").data_fraction == 1.0
    odd = parse_status("thin-pool", "0 11/10 5/4 -")
    assert (odd.free_data, odd.free_metadata) == (DataBlocks(0), MetaBlocks(0))


# What older kernels leave off, and what was true for them; the words are those of the full line, cut.
FULL = "5 120/1024 30/100 - out_of_data_space ignore_discard error_if_no_space needs_check 256"


@pytest.mark.parametrize("count", range(3, 10))
def test_old_short_forms(count):
    """A pool's line may end after any word from the data figures on; what is missing has its old meaning."""
    words = FULL.split()[:count]
    status = parse_status("thin-pool", " ".join(words) + " ", strict=True)
    assert status.transaction_id == 5
    assert status.used_data == DataBlocks(30)
    assert status.held_metadata_root is None
    assert status.mode is (PoolMode.OUT_OF_DATA_SPACE if count > 4 else PoolMode.READ_WRITE)
    assert status.discard is (DiscardMode.IGNORE if count > 5 else None)
    assert status.error_if_no_space is (count > 6)
    assert status.needs_check is (True if count > 7 else None)
    assert status.metadata_low_water == (MetaBlocks(256) if count > 8 else None)
    assert status.extra == ()
    assert not status.metadata_is_low


def test_unknown_words_at_the_end_are_kept():
    """Words that newer kernels may add are kept, in strict mode too."""
    assert parse_status("thin-pool", FULL + " new 7 ", strict=True).extra == ("new", "7")
    assert parse_status("thin", "128 255 new", strict=True).extra == ("new",)
    assert parse_status("striped", "1 8:0 1 A new", strict=True).extra == ("new",)
    assert parse_status("linear", "new words", strict=True) == EmptyStatus("", ("new", "words"))
    assert parse_status("thin-pool", "Fail reason", strict=True) == ThinPoolFailed("", ("reason",))


@pytest.mark.parametrize(
    ("type_name", "text", "cls"),
    [
        ("thin-pool", "Fail", ThinPoolFailed),
        ("thin-pool", "Fail ", ThinPoolFailed),
        ("thin-pool", "Error", StatusUnavailable),
        ("thin", "Fail", ThinFailed),
        ("thin", "Error", StatusUnavailable),
        ("thin", "-", ThinUnbound),
        ("thin", "0 -", ThinStatus),
        ("thin", "0", ThinStatus),
        ("linear", "", EmptyStatus),
        ("zero", " ", EmptyStatus),
        ("error", "", EmptyStatus),
        ("striped", "1 8:0 1 A", StripedStatus),
        ("snapshot", "16/2048 16", RawStatus),
        ("", "", RawStatus),
    ],
)
def test_state_is_the_class(type_name, text, cls):
    """Each state has a class of its own, exactly."""
    status = parse_status(type_name, text, strict=True)
    assert type(status) is cls
    assert status.raw == text


@pytest.mark.parametrize(
    ("type_name", "text"),
    [
        ("thin-pool", "Failed"),
        ("thin-pool", "fail"),
        ("thin-pool", "Error:"),
        ("thin-pool", "0 Fail"),
        ("thin", "Failing 5"),
        ("thin", "--"),
        ("thin", "0 Fail"),
    ],
)
def test_words_are_compared_whole(type_name, text):
    """Fail and Error count only as the whole first word."""
    status = parse_status(type_name, text)
    assert type(status) is RawStatus
    assert status.problem


def test_unknown_words_that_look_like_flags():
    """A word that merely contains another is not taken for it."""
    status = parse_status("thin-pool", "0 1/9 0/9 - rw no_discard_passdown queue_if_no_space - 4 zero ro")
    assert status.mode is PoolMode.READ_WRITE
    assert status.discard is DiscardMode.NO_PASSDOWN
    assert status.extra == ("zero", "ro")


def test_thin():
    """Mapped and highest sectors are sizes; the highest is none if nothing is mapped."""
    status = parse_status("thin", "256 639")
    assert status == ThinStatus("256 639", mapped=Sectors(256), highest_mapped=Sectors(639))
    assert parse_status("thin", "0 -").highest_mapped is None
    assert parse_status("thin", "0 0").highest_mapped == Sectors(0)


def test_striped():
    """The stripes that are not alive are named."""
    status = parse_status("striped", "3 8:0 /dev/sdb 8:32 1 ADU")
    assert status.devices == (DeviceNumber(8, 0), "/dev/sdb", DeviceNumber(8, 32))
    assert status.failed_devices == ("/dev/sdb", DeviceNumber(8, 32))
    assert parse_status("striped", "2 8:0 8:16 1 AA").failed_devices == ()


MALFORMED = [
    ("thin-pool", "", "transaction_id", 0),
    ("thin-pool", "0", "metadata", 1),
    ("thin-pool", "0 5 0/1 -", "metadata", 1),
    ("thin-pool", "0 5/6", "data", 2),
    ("thin-pool", "0 5/6 /1", "data", 2),
    ("thin-pool", "0 5/6 1/", "data", 2),
    ("thin-pool", "0 5/6 1/2/3", "data", 2),
    ("thin-pool", "-1 5/6 1/2", "transaction_id", 0),
    ("thin-pool", "18446744073709551616 5/6 1/2", "transaction_id", 0),
    ("thin-pool", "9" * 5000 + " 5/6 1/2", "transaction_id", 0),
    ("thin-pool", "\N{ARABIC-INDIC DIGIT THREE} 5/6 1/2", "transaction_id", 0),
    ("thin-pool", "0 5/6 1/2 root", "held_metadata_root", 3),
    ("thin-pool", "0 5/6 1/2 - rx", "mode", 4),
    ("thin-pool", "0 5/6 1/2 - RW", "mode", 4),
    ("thin-pool", "0 5/6 1/2 - rw discard", "discard", 5),
    ("thin-pool", "0 5/6 1/2 - rw ignore_discard -", "no_space", 6),
    ("thin-pool", "0 5/6 1/2 - rw ignore_discard queue_if_no_space 1024", "needs_check", 7),
    ("thin-pool", "0 5/6 1/2 - rw ignore_discard queue_if_no_space - low", "metadata_low_water", 8),
    ("thin", "", "mapped", 0),
    ("thin", "x", "mapped", 0),
    ("thin", "1.5 3", "mapped", 0),
    ("thin", "128 x", "highest_mapped", 1),
    ("striped", "", "stripe_count", 0),
    ("striped", "0 1 ", "stripe_count", 0),
    ("striped", "4294967295 8:0 1 A", "stripe_count", 0),
    ("striped", "2 8:0 8:16", "health_words", 3),
    ("striped", "2 8:0 8:16 2 AA", "health_words", 3),
    ("striped", "2 8:0 8:16 1", "health", 4),
    ("striped", "2 8:0 8:16 1 A", "health", 4),
]


@pytest.mark.parametrize(("type_name", "text", "field", "position"), MALFORMED)
def test_malformed(type_name, text, field, position):
    """A broken line is kept raw with its problem; in strict mode the word at fault is named."""
    status = parse_status(type_name, text)
    assert type(status) is RawStatus
    assert (status.raw, status.type_name) == (text, type_name)
    with pytest.raises(ParseError) as caught:
        parse_status(type_name, text, strict=True)
    assert (caught.value.field, caught.value.position, caught.value.line) == (field, position, text)
    assert status.problem == str(caught.value)


alphabet = st.sampled_from(
    ["0", "1", "5/6", "1/2", "-", "rw", "ro", "Fail", "Error", "8:0", "AA", "ignore_discard", "queue_if_no_space", "x"]
)
near_misses = st.lists(alphabet, max_size=12).map(" ".join)


@given(st.sampled_from(TYPES), st.text() | near_misses)
@example("thin-pool", "0 5/6 1/2 \x1c - rw")
@example("striped", "18446744073709551615 8:0")
def test_any_text(type_name, text):
    """Whatever the text, lenient reading returns its raw words; strict reading does too or raises ParseError."""
    status = parse_status(type_name, text)
    assert status.raw == text
    try:
        strict = parse_status(type_name, text, strict=True)
    except ParseError:
        assert type(status) is RawStatus
    else:
        assert strict == status
        assert type(status) is not RawStatus


u64 = st.integers(0, (1 << 64) - 1)


@given(
    st.tuples(u64, u64, u64, u64, u64, u64 | st.just("-")),
    st.sampled_from(list(PoolMode)),
    st.sampled_from(list(DiscardMode)),
    st.booleans(),
    st.booleans(),
    u64,
)
def test_pool_round_trip(figures, mode, discard, error_if_no_space, needs_check, low):
    """Every line of the full form is read without loss."""
    transaction, used, total, data, data_total, root = figures
    line = (
        f"{transaction} {used}/{total} {data}/{data_total} {root} {mode.value} {discard.value} "
        f"{'error' if error_if_no_space else 'queue'}_if_no_space {'needs_check' if needs_check else '-'} {low} "
    )
    assert words_of(parse_status("thin-pool", line, strict=True)) == line.split()


def test_statuses_are_immutable_and_compare_by_meaning():
    """Two lines that differ in white space are equal; different states never are."""
    assert parse_status("thin", "0 -") == parse_status("thin", " 0  - ")
    assert hash(parse_status("thin", "0 -")) == hash(parse_status("thin", " 0  - "))
    assert parse_status("thin", "Fail") != parse_status("thin-pool", "Fail")
    assert parse_status("thin", "Fail") != parse_status("thin", "Error")
    assert parse_status("x", "a") != parse_status("x", "a ")
    assert parse_status("x", "a") != parse_status("y", "a")
    with pytest.raises(AttributeError):
        parse_status("thin", "0 -").mapped = Sectors(1)
