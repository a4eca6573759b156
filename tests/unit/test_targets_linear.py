# SPDX-License-Identifier: MIT
"""The linear target."""

import copy
import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmlib.errors import ArgumentError, ParseError
from dmlib.ids import DeviceNumber
from dmlib.targets import Linear, RawTarget, parse_target
from dmlib.units import DataBlocks, KiB, Sectors

numbers = st.builds(DeviceNumber, st.integers(0, 4095), st.integers(0, (1 << 20) - 1))
words = st.text(min_size=1).filter(lambda text: text.split() == [text] and "\0" not in text)
offsets = st.builds(Sectors, st.integers(0, (1 << 64) - 1))


@given(st.builds(Linear, numbers | words, offsets, extra=st.lists(words, max_size=3)))
def test_print_and_parse(target):
    """What is printed is read back as the same target."""
    assert Linear.from_params(target.params()) == target
    assert parse_target("linear", target.params() + " ", strict=True) == target


def test_kernel_form():
    """The kernel prints number and sector; dmlib prints the same."""
    # Linux 6.1.176, dmsetup table: "0 2048 linear 7:2 8"
    assert parse_target("linear", "7:2 8") == Linear(DeviceNumber(7, 2), Sectors(8))
    assert Linear(DeviceNumber(7, 2), "4KiB").params() == "7:2 8"
    assert Linear(DeviceNumber(7, 2)).params() == "7:2 0"
    assert Linear.type_name == "linear"


def test_devices():
    """Text of a number becomes the number; a path stays, until it is resolved."""
    assert Linear("8:16", KiB(0)) == Linear(DeviceNumber(8, 16), KiB(0))
    target = Linear("/dev/sdb", KiB(4), extra=("x",))
    assert target.devices == ("/dev/sdb",)
    assert target.params() == "/dev/sdb 8 x"
    resolved = target.resolved({"/dev/sdb": DeviceNumber(8, 16)}.__getitem__)
    assert resolved == Linear(DeviceNumber(8, 16), KiB(4), extra=("x",))


@pytest.mark.parametrize("device", ["", " ", "a b", "a\n", "a\0b", " /dev/sda", DeviceNumber(4096, 0)])
def test_bad_devices(device):
    """A device that would not be one word of the table, or has no such number, is refused."""
    with pytest.raises(ArgumentError) as caught:
        Linear(device, KiB(0))
    assert caught.value.field == "device"


@pytest.mark.parametrize("device", [DeviceNumber(0, 1 << 20), DeviceNumber(-1, 0), DeviceNumber(8, -1)])
def test_numbers_that_no_device_has(device):
    """Majors have 12 bits and minors 20."""
    with pytest.raises(ArgumentError):
        Linear(device, KiB(0))
    assert Linear(DeviceNumber(4095, (1 << 20) - 1)).params() == "4095:1048575 0"


@pytest.mark.parametrize("device", [None, 8, b"/dev/sda", (8, 0)])
def test_device_of_another_type(device):
    """Anything but a number or a path is a TypeError that names the way to a number."""
    with pytest.raises(TypeError, match="device_number"):
        Linear(device, KiB(0))


@pytest.mark.parametrize("offset", [0, 8, 1.5, None, DataBlocks(1)])
def test_offset_without_unit(offset):
    """An offset needs its unit."""
    with pytest.raises(TypeError, match="has no unit"):
        Linear("8:0", offset)


def test_offset_limits():
    """An offset has 64 bits."""
    assert Linear("8:0", Sectors((1 << 64) - 1)).params() == "8:0 18446744073709551615"
    with pytest.raises(ArgumentError, match="64 bits"):
        Linear("8:0", Sectors(1 << 64))


@pytest.mark.parametrize("word", ["", "a b", "\t", "a\0"])
def test_bad_extra(word):
    """An unknown word has to be one word."""
    with pytest.raises(ArgumentError) as caught:
        Linear("8:0", extra=["ok", word])
    assert caught.value.field == "extra"


def test_value_object():
    """A target cannot be changed, can be replaced, copied, pickled and used as a key."""
    target = Linear("8:0", KiB(1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.offset = KiB(2)
    assert dataclasses.replace(target, offset=KiB(2)) == Linear("8:0", KiB(2))
    assert copy.deepcopy(target) == pickle.loads(pickle.dumps(target)) == target  # noqa: S301
    assert len({target, Linear("8:0", KiB(1)), Linear("8:1", KiB(1))}) == 2
    assert not hasattr(target, "__dict__")
    assert "offset=Sectors(2)" in repr(target)


@pytest.mark.parametrize(
    ("text", "field", "position"),
    [
        ("", "device", 0),
        ("8:0", "offset", 1),
        ("8:0 x", "offset", 1),
        ("8:0 -1", "offset", 1),
        ("8:0 18446744073709551616", "offset", 1),
        ("8:0 8:0", "offset", 1),
    ],
)
def test_malformed(text, field, position):
    """A broken line is kept raw with its problem; in strict mode the word at fault is named."""
    with pytest.raises(ParseError) as caught:
        parse_target("linear", text, strict=True)
    assert (caught.value.field, caught.value.position, caught.value.line) == (field, position, text)
    target = parse_target("linear", text)
    assert target == RawTarget("linear", text)
    assert target.problem == str(caught.value)


@pytest.mark.parametrize(
    "word", ["4096:0", "0:1048576", "9999999999999:1", "8:", ":0", "8:0:0", "8:x", "\N{SUPERSCRIPT TWO}:0"]
)
def test_words_that_are_no_numbers(word):
    """A word that no device can have as its number is kept as the path that it may be."""
    target = parse_target("linear", f"{word} 8", strict=True)
    assert target.device == word
    assert target.params() == f"{word} 8"
