# SPDX-License-Identifier: MIT
"""The thin and thin-pool targets and the limits of a pool."""

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmlib.errors import ArgumentError, ParseError
from dmlib.ids import DeviceNumber
from dmlib.targets import RawTarget, ThinPoolTarget, ThinTarget, parse_target
from dmlib.targets.thin import (
    METADATA_MAX,
    METADATA_MIN,
    METADATA_RECOMMENDED_MIN,
    check_data_block_size,
    check_metadata_size,
    recommended_metadata_size,
)
from dmlib.units import DataBlocks, GiB, KiB, MetaBlocks, MiB, Sectors, TiB

META, DATA, POOL = DeviceNumber(7, 0), DeviceNumber(7, 1), DeviceNumber(254, 0)
numbers = st.builds(DeviceNumber, st.integers(0, 4095), st.integers(0, (1 << 20) - 1))
FLAGS = ("zero_new_blocks", "discard", "discard_passdown", "read_only", "error_if_no_space")
pools = st.builds(
    ThinPoolTarget,
    numbers | st.just("/dev/meta"),
    st.just("/dev/data"),
    st.integers(1, 1 << 14).map(lambda blocks: KiB(64) * blocks),
    st.builds(DataBlocks, st.integers(0, (1 << 64) - 1)),
    **{flag: st.booleans() for flag in FLAGS},
    extra=st.lists(st.sampled_from(["7", "word"]), max_size=2),
)


def pool(**keywords):
    return ThinPoolTarget(META, DATA, KiB(64), **keywords)


@given(pools)
def test_pool_print_and_parse(target):
    """What is printed is read back as the same pool, with at most four features, none twice, none in conflict."""
    printed = target.params()
    assert parse_target("thin-pool", printed, strict=True) == target
    assert parse_target("thin-pool", printed + " ").params() == printed
    features = target.features
    assert len(features) <= 4
    assert len(set(features)) == len(features)
    assert not {"ignore_discard", "no_discard_passdown"} <= set(features)
    assert printed.split()[4] == str(len(features))


# Linux 6.1.176, thin-pool 1.22.0, dmsetup table | cat -A; and what had been asked for.
KERNEL_FORMS = [
    ("7:0 7:1 128 0 0 ", "0", {}),
    ("7:0 7:1 128 7 0 ", "7 0", {"low_water_mark": DataBlocks(7)}),
    ("7:0 7:1 128 0 1 skip_block_zeroing ", "0 1 skip_block_zeroing", {"zero_new_blocks": False}),
    ("7:0 7:1 128 0 1 ignore_discard ", "0 1 ignore_discard", {"discard": False}),
    ("7:0 7:1 128 0 1 no_discard_passdown ", "0 1 no_discard_passdown", {"discard_passdown": False}),
    (
        "7:0 7:1 128 0 2 ignore_discard no_discard_passdown ",
        "0 2 no_discard_passdown ignore_discard",
        {"discard": False, "discard_passdown": False},
    ),
    ("7:0 7:1 128 0 1 read_only ", "0 1 read_only", {"read_only": True}),
    (
        "7:0 7:1 128 5 1 error_if_no_space ",
        "5 1 error_if_no_space",
        {"low_water_mark": DataBlocks(5), "error_if_no_space": True},
    ),
    (
        "7:0 7:1 128 0 4 skip_block_zeroing no_discard_passdown read_only error_if_no_space ",
        "0 4 error_if_no_space read_only no_discard_passdown skip_block_zeroing",
        {"zero_new_blocks": False, "discard_passdown": False, "read_only": True, "error_if_no_space": True},
    ),
    (
        "7:0 7:1 128 0 2 skip_block_zeroing read_only ",
        "0 2 SKIP_block_ZEROING Read_Only",
        {"zero_new_blocks": False, "read_only": True},
    ),
    ("7:0 7:1 128 0 1 read_only ", "0 2 read_only read_only", {"read_only": True}),
]


@pytest.mark.parametrize(("shown", "asked", "keywords"), KERNEL_FORMS)
def test_pool_kernel_forms(shown, asked, keywords):
    """What the kernel shows, what it was told, and the target built in Python are equal."""
    target = pool(**keywords)
    assert parse_target("thin-pool", shown, strict=True) == target
    assert parse_target("thin-pool", f"7:0 7:1 128 {asked}", strict=True) == target
    if target.discard:
        assert target.params() + " " == shown


def test_discard_off_makes_passdown_moot():
    """Without discard there is nothing to pass down, so the two ways to say it are one target."""
    assert pool(discard=False) == pool(discard=False, discard_passdown=False)
    assert pool(discard=False).discard_passdown is False
    assert pool(discard=False).features == ("ignore_discard",)


def test_most_features():
    """All that can be asked for at once is four words, which the kernel takes."""
    target = pool(
        **dict.fromkeys(("zero_new_blocks", "discard", "discard_passdown"), False),
        read_only=True,
        error_if_no_space=True,
    )
    assert target.params() == "7:0 7:1 128 0 4 skip_block_zeroing ignore_discard read_only error_if_no_space"


def test_unknown_features_and_words_are_kept():
    """A newer kernel's feature and the words behind the features are printed back in their places."""
    target = parse_target("thin-pool", "7:0 7:1 128 0 2 future read_only tail 5", strict=True)
    assert target == pool(read_only=True, extra_features=("future",), extra=("tail", "5"))
    assert target.params() == "7:0 7:1 128 0 2 read_only future tail 5"


def test_too_many_features():
    """More than four features are refused before the kernel has to."""
    full = {"zero_new_blocks": False, "read_only": True, "error_if_no_space": True}
    assert len(pool(**full, extra_features=["x"]).features) == 4
    with pytest.raises(ArgumentError, match="at most 4"):
        pool(**full, extra_features=["x", "y"])
    with pytest.raises(ArgumentError, match="at most 4"):
        pool(**full, discard=False, extra_features=["x"])


@pytest.mark.parametrize("word", ["read_only", "Ignore_Discard", "a b", ""])
def test_bad_extra_features(word):
    """A feature that has an argument of its own, or is not one word, is refused."""
    with pytest.raises(ArgumentError) as caught:
        pool(extra_features=[word])
    assert caught.value.field == "extra_features"


GOOD_BLOCKS = (128, 256, 384, 1024, 2097152 - 128, 2097152)
BAD_BLOCKS = (0, 1, 64, 127, 129, 192, 2097151, 2097153, 2097152 + 128, 1 << 32)


@pytest.mark.parametrize("count", GOOD_BLOCKS)
def test_good_block_sizes(count):
    """Data blocks have 128..2097152 sectors and are a multiple of 128."""
    assert check_data_block_size(Sectors(count)) == Sectors(count)
    assert ThinPoolTarget(META, DATA, Sectors(count)).params() == f"7:0 7:1 {count} 0 0"


@pytest.mark.parametrize("count", BAD_BLOCKS)
def test_bad_block_sizes(count):
    """Another block size is refused in Python, and makes a line that is read malformed."""
    with pytest.raises(ArgumentError) as caught:
        ThinPoolTarget(META, DATA, Sectors(count))
    assert caught.value.field == "data_block_size"
    with pytest.raises(ParseError) as caught:
        parse_target("thin-pool", f"7:0 7:1 {count} 0 0", strict=True)
    assert (caught.value.field, caught.value.position) == ("data_block_size", 2)


def test_pool_arguments():
    """Units are wanted, two devices are wanted, the mark has 64 bits."""
    assert ThinPoolTarget("/dev/a", "/dev/b", "64KiB").data_block_size == KiB(64)
    with pytest.raises(TypeError, match="data_block_size=128 has no unit"):
        ThinPoolTarget(META, DATA, 128)
    for mark in (1024, Sectors(1024), MetaBlocks(1), None):
        with pytest.raises(TypeError, match=r"write DataBlocks\(1024\)"):
            pool(low_water_mark=mark)
    assert pool(low_water_mark=DataBlocks((1 << 64) - 1)).params() == "7:0 7:1 128 18446744073709551615 0"
    with pytest.raises(ArgumentError, match="64 bits"):
        pool(low_water_mark=DataBlocks(1 << 64))
    with pytest.raises(ArgumentError, match="must not be the metadata device") as caught:
        ThinPoolTarget("7:0", META, KiB(64))
    assert caught.value.field == "data_device"
    with pytest.raises(TypeError):
        ThinPoolTarget(META, DATA, KiB(64), DataBlocks(0), False)  # flags are keywords


def test_pool_as_value():
    """A pool target can be copied with changes, pickled, and knows its devices."""
    target = pool(read_only=True)
    assert dataclasses.replace(target, read_only=False) == pool()
    assert pickle.loads(pickle.dumps(target)) == target  # noqa: S301
    assert target.devices == (META, DATA)
    assert target != pool()
    paths = ThinPoolTarget("/dev/m", "/dev/d", KiB(64), error_if_no_space=True, extra_features=("x",), extra=("y",))
    resolved = paths.resolved({"/dev/m": META, "/dev/d": DATA}.__getitem__)
    assert resolved == pool(error_if_no_space=True, extra_features=("x",), extra=("y",))


@pytest.mark.parametrize(
    ("text", "field", "position"),
    [
        ("", "metadata_device", 0),
        ("7:0", "data_device", 1),
        ("7:0 7:1", "data_block_size", 2),
        ("7:0 7:1 128", "low_water_mark", 3),
        ("7:0 7:1 128 -1", "low_water_mark", 3),
        ("7:0 7:1 128 0 x", "feature_count", 4),
        ("7:0 7:1 128 0 2 read_only", "feature_count", 4),
        ("7:0 7:0 128 0 0", "data_device", 1),
        ("7:0 7:1 128 0 5 a b c d e", "extra_features", 9),
    ],
)
def test_pool_malformed(text, field, position):
    """A broken line is kept raw with its problem; in strict mode the word at fault is named."""
    with pytest.raises(ParseError) as caught:
        parse_target("thin-pool", text, strict=True)
    assert (caught.value.field, caught.value.position) == (field, position)
    assert parse_target("thin-pool", text) == RawTarget("thin-pool", text)


thins = st.builds(ThinTarget, st.just(POOL), st.integers(0, (1 << 24) - 1), st.none() | st.just(DATA)) | st.builds(
    ThinTarget, numbers, st.integers(0, (1 << 24) - 1), st.just("/dev/base"), extra=st.just(("x", "y"))
)


@given(thins)
def test_thin_print_and_parse(target):
    """What is printed is read back as the same target."""
    assert parse_target("thin", target.params(), strict=True) == target
    assert pickle.loads(pickle.dumps(target)) == target  # noqa: S301


def test_thin_kernel_forms():
    """The kernel prints pool, id, and the external origin if there is one."""
    # Linux 6.1.176, thin 1.22.0, dmsetup table | cat -A: "0 32768 thin 254:0 0$", "0 65536 thin 254:0 1 7:4$"
    assert parse_target("thin", "254:0 0") == ThinTarget(POOL, 0)
    assert parse_target("thin", "254:0 1 7:4") == ThinTarget(POOL, 1, DeviceNumber(7, 4))
    assert ThinTarget(POOL, 1, external_origin="7:4").params() == "254:0 1 7:4"
    assert ThinTarget(POOL, 1).devices == (POOL,)
    assert ThinTarget(POOL, 1, DATA).devices == (POOL, DATA)


@pytest.mark.parametrize("thin_id", [0, (1 << 24) - 1])
def test_good_thin_ids(thin_id):
    """An id has 24 bits."""
    assert ThinTarget(POOL, thin_id).params() == f"254:0 {thin_id}"


@pytest.mark.parametrize("thin_id", [-1, 1 << 24])
def test_bad_thin_ids(thin_id):
    """An id outside of 24 bits is refused, also when read."""
    with pytest.raises(ArgumentError) as caught:
        ThinTarget(POOL, thin_id)
    assert caught.value.field == "thin_id"
    with pytest.raises(ParseError) as caught:
        parse_target("thin", f"254:0 {thin_id}", strict=True)
    assert (caught.value.field, caught.value.position) == ("thin_id", 1)


def test_thin_arguments():
    """The id is a number, the external origin not the pool, and nothing follows an origin that is not there."""
    with pytest.raises(TypeError, match="thin_id must be an int"):
        ThinTarget(POOL, "0")
    with pytest.raises(ArgumentError, match="must not be the pool"):
        ThinTarget(POOL, 0, "254:0")
    with pytest.raises(ArgumentError, match="external origin"):
        ThinTarget(POOL, 0, extra=["x"])
    found = {"/dev/p": POOL, "/dev/o": DATA}.__getitem__
    assert ThinTarget("/dev/p", 5, "/dev/o").resolved(found) == ThinTarget(POOL, 5, DATA)
    assert ThinTarget("/dev/p", 5).resolved(found) == ThinTarget(POOL, 5)


@pytest.mark.parametrize(
    ("text", "field", "position"),
    [("", "pool", 0), ("254:0", "thin_id", 1), ("254:0 x", "thin_id", 1), ("254:0 0 254:0", "external_origin", 2)],
)
def test_thin_malformed(text, field, position):
    """A broken line is kept raw with its problem; in strict mode the word at fault is named."""
    with pytest.raises(ParseError) as caught:
        parse_target("thin", text, strict=True)
    assert (caught.value.field, caught.value.position) == (field, position)
    assert parse_target("thin", text) == RawTarget("thin", text)


def test_metadata_limits():
    """A pool uses 255 * (2^14 - 64) blocks of metadata; the least is checked from both sides."""
    assert METADATA_MAX.bytes == 17045913600
    assert MetaBlocks(4161600).to_sectors() == METADATA_MAX
    assert check_metadata_size(METADATA_MIN) == METADATA_MIN
    assert check_metadata_size("20GiB") == GiB(20)
    with pytest.raises(ArgumentError) as caught:
        check_metadata_size(METADATA_MIN - Sectors(1), "metadata_device")
    assert caught.value.field == "metadata_device"
    with pytest.raises(TypeError):
        check_metadata_size(1 << 30)


@pytest.mark.parametrize(
    ("data", "block", "metadata"),
    [
        (GiB(100), KiB(64), Sectors.from_bytes(100 * 16384 * 48)),
        (TiB(1), KiB(64), MiB(768)),
        (TiB(1), GiB(1), METADATA_RECOMMENDED_MIN),
        (Sectors(1), KiB(64), METADATA_RECOMMENDED_MIN),
        (Sectors(0), KiB(64), METADATA_RECOMMENDED_MIN),
        (TiB(1000), KiB(64), METADATA_MAX),
        ("100GiB", "512KiB", Sectors.from_bytes(100 * 2048 * 48)),
    ],
)
def test_recommended_metadata_size(data, block, metadata):
    """48 bytes for each block, within the limits."""
    assert recommended_metadata_size(data, block) == metadata


@given(st.integers(0, 1 << 45), st.integers(1, 1 << 14))
def test_recommended_metadata_size_is_enough(count, blocks):
    """The size is whole 4 KiB blocks, never below the rule of thumb unless at the maximum, and hardly above."""
    data, block = Sectors(count), KiB(64) * blocks
    size = recommended_metadata_size(data, block)
    wanted = -(-count // block.count) * 48
    assert METADATA_RECOMMENDED_MIN <= size <= METADATA_MAX
    assert size.count % 8 == 0
    assert size.bytes >= wanted or size == METADATA_MAX
    assert size.bytes < wanted + 4096 or size == METADATA_RECOMMENDED_MIN


def test_recommended_metadata_size_checks_its_arguments():
    """Sizes need units, and the block size its rule."""
    with pytest.raises(TypeError, match="data_size=1 has no unit"):
        recommended_metadata_size(1, KiB(64))
    with pytest.raises(ArgumentError, match="multiple of 128"):
        recommended_metadata_size(GiB(1), KiB(96))
