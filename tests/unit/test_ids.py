# SPDX-License-Identifier: MIT
"""Names, uuids, thin ids and device numbers, at their limits and with hostile characters."""

import os
import pickle
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dmlib import ids
from dmlib.errors import ArgumentError
from dmlib.ids import DeviceNumber

GOOD_NAMES = {
    "one byte": "a",
    "127 bytes": "a" * 127,
    "all that udev likes": "AZaz09#+-.:=@_",
    "space": "my disk",
    "31 spaces and 3 letters, 127 bytes as stored": " " * 31 + "abc",
    "UTF-8": "gr\N{LATIN SMALL LETTER O WITH DIAERESIS}\N{LATIN SMALL LETTER SHARP S}e",
    "percent": "100%sure %s %n",
    "new line": "a\nb",
    "tab and escape": "\t\x1b[2J",
    "a lone backslash": "a\\b",
    "backslash at the end": "a\\",
    "backslash and X": "a\\X41",
    "backslash, space, x": "\\ x41",
    "three dots": "...",
    "leading dash": "-rf",
    "quotes": "'\"$(reboot)`;&|",
    "byte that is not UTF-8": "a\udcffb",
    "control as a part": "control1",
}

BAD_NAMES = {
    "empty": ("", "must not be empty"),
    "128 bytes": ("a" * 128, "at most 127 bytes, has 128"),
    "33 spaces, 132 bytes as stored": (" " * 33, "at most 127 bytes, has 132"),
    "32 spaces, 128 bytes as stored": (" " * 32, "at most 127 bytes, has 128"),
    "16 umlauts, 128 bytes as stored": ("\N{LATIN SMALL LETTER A WITH DIAERESIS}" * 16, "has 128"),
    "slash": ("a/b", "must not contain '/'"),
    "path": ("../../etc/passwd", "must not contain '/'"),
    "absolute path": ("/dev/mapper/a", "must not contain '/'"),
    "dot": (".", "is taken"),
    "dot-dot": ("..", "is taken"),
    "the control node": ("control", "is taken"),
    "NUL": ("a\0b", "must not contain NUL"),
    "NUL alone": ("\0", "must not contain NUL"),
    "mangled byte": ("a\\x20b", r"must not contain \x"),
    "mangled capital hex": ("a\\x2Fb", r"must not contain \x"),
    "mangled slash": ("\\x2f", r"must not contain \x"),
    "mangled backslash": ("a\\x5cx41", r"must not contain \x"),
    "half a mangled byte": ("a\\x4", r"must not contain \x"),
    "start of a mangled byte": ("a\\x", r"must not contain \x"),
    "mangled, not hex": ("a\\xzz", r"must not contain \x"),
    "surrogate that is no byte": ("a\ud800", "must be encodable"),
}


@pytest.mark.parametrize("name", GOOD_NAMES.values(), ids=GOOD_NAMES)
def test_good_names(name):
    """A name that a device can have is returned as it is, and survives being stored."""
    assert ids.check_name(name) == name
    stored = ids.mangle(name)
    assert len(stored) <= 127
    assert re.fullmatch(r"([0-9A-Za-z#+\-.:=@_]|\\x[0-9a-f]{2})+", stored)
    assert ids.unmangle(stored.encode()) == name


@pytest.mark.parametrize(("name", "rule"), BAD_NAMES.values(), ids=BAD_NAMES)
def test_bad_names(name, rule):
    """A name that no device can have is refused, with the rule and the argument's name."""
    with pytest.raises(ArgumentError) as caught:
        ids.check_name(name, "new")
    assert rule in caught.value.rule
    assert caught.value.field == "new"
    assert caught.value.value == name
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("check", [ids.check_name, ids.check_uuid])
@pytest.mark.parametrize("value", [None, b"name", 7, ["a"]])
def test_only_text_is_a_name(check, value):
    """Anything but text is a TypeError."""
    with pytest.raises(TypeError, match="must be a str"):
        check(value)


@pytest.mark.parametrize("uuid", ["a", "a" * 128, " " * 32, "LVM-/x", ".", "control", "DMLIB-253:0-thin-5"])
def test_good_uuids(uuid):
    """A uuid may have 128 bytes as stored, and slashes."""
    assert ids.check_uuid(uuid) == uuid


@pytest.mark.parametrize("uuid", ["", "a" * 129, " " * 33, "a\0", "a\\x41", "a\\x", "\ud800"])
def test_bad_uuids(uuid):
    """A uuid that cannot be stored is refused."""
    with pytest.raises(ArgumentError) as caught:
        ids.check_uuid(uuid)
    assert caught.value.field == "uuid"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
@example("\\")
@example("%")
def test_mangle_round_trip(text):
    """Whatever text is stored is read back, unless it looks stored already."""
    stored = ids.mangle(text)
    assert stored.isascii()
    if "\\x" not in text:
        assert ids.unmangle(stored.encode("ascii")) == text


@given(st.binary())
def test_mangle_round_trip_of_bytes(raw):
    """Bytes that are not UTF-8 survive too."""
    text = os.fsdecode(raw)
    assert os.fsencode(ids.unmangle(ids.mangle(text).encode("ascii"))) == raw


@given(st.text(max_size=140))
def test_checked_names_fit_the_kernel(text):
    """What passes the check fits 127 bytes as stored, whatever it was; else it is an ArgumentError."""
    try:
        ids.check_name(text)
    except ArgumentError:
        return
    assert 0 < len(ids.mangle(text)) <= 127
    assert ids.unmangle(ids.mangle(text).encode("ascii")) == text


def test_unmangle_leaves_what_is_not_mangled():
    """Names that others stored without mangling are read as they are."""
    assert ids.unmangle(b"my disk") == "my disk"
    assert ids.unmangle(b"a\\x4") == "a\\x4"
    assert ids.unmangle(b"\\xzz") == "\\xzz"
    assert ids.unmangle(b"\\x5cx41") == "\\x41"
    assert ids.unmangle(b"\xff") == "\udcff"


@pytest.mark.parametrize("thin_id", [0, 1, (1 << 24) - 2, (1 << 24) - 1])
def test_good_thin_ids(thin_id):
    """Thin ids have 24 bits."""
    assert ids.check_thin_id(thin_id) == thin_id


@pytest.mark.parametrize("thin_id", [-1, 1 << 24, 1 << 64, -(1 << 24)])
def test_bad_thin_ids(thin_id):
    """An id outside of 24 bits is refused."""
    with pytest.raises(ArgumentError, match=r"must be 0\.\.16777215") as caught:
        ids.check_thin_id(thin_id, "origin_id")
    assert caught.value.field == "origin_id"


@pytest.mark.parametrize("thin_id", [1.0, "1", None, True])
def test_thin_id_is_a_whole_number(thin_id):
    """Anything but a whole number is a TypeError."""
    with pytest.raises(TypeError, match="must be an int"):
        ids.check_thin_id(thin_id)


@pytest.mark.parametrize("name", ["a", "thin-pool", "x" * 15])
def test_good_target_types(name):
    """A target type has up to 15 bytes."""
    assert ids.check_target_type(name) == name


@pytest.mark.parametrize("name", ["", "x" * 16, "a b", "a\n", "\N{LATIN SMALL LETTER E WITH ACUTE}", "a\0"])
def test_bad_target_types(name):
    """Another target type is refused."""
    with pytest.raises(ArgumentError, match=r"1\.\.15 ASCII"):
        ids.check_target_type(name)


@given(st.integers(0, 4095), st.integers(0, (1 << 20) - 1))
def test_device_number_round_trip(major, minor):
    """A number survives its text, its packed form and pickle."""
    number = DeviceNumber(major, minor)
    assert DeviceNumber.parse(str(number)) == number
    assert DeviceNumber.from_dev(os.makedev(major, minor)) == number
    assert pickle.loads(pickle.dumps(number)) == number  # noqa: S301
    assert str(number) == f"{major}:{minor}"


@pytest.mark.parametrize(
    "text", ["", "8", "8:", ":0", "8:0:0", "8:0 ", " 8:0", "-8:0", "a:b", "8:0\n", "\N{SUPERSCRIPT TWO}:0", "/dev/sda"]
)
def test_bad_device_numbers(text):
    """Anything but major:minor is refused."""
    with pytest.raises(ArgumentError, match="must be major:minor"):
        DeviceNumber.parse(text)


def test_device_number_of_a_number():
    """A number is its own number."""
    number = DeviceNumber(253, 7)
    assert ids.device_number(number) is number


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("/dev/null", "must be a block device"),
        ("/", "must be a block device"),
        ("/nowhere/at/all", "must be a block device (No such file or directory)"),
        ("a\0b", "must be a block device (NUL in the path)"),
        ("", "must be a block device (No such file or directory)"),
    ],
)
def test_device_number_of_something_else(path, rule):
    """A path where no block device is, is refused with the reason."""
    with pytest.raises(ArgumentError) as caught:
        ids.device_number(path, "data_device")
    assert caught.value.rule == rule
    assert caught.value.field == "data_device"


@pytest.mark.parametrize("thing", [None, 7, 1.5, ["/dev/loop0"]])
def test_device_number_of_no_path(thing):
    """What is neither a number nor a path is refused with the argument's name."""
    with pytest.raises(TypeError, match=r"^data_device must be a DeviceNumber, a path"):
        ids.device_number(thing, "data_device")
