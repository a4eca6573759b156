# SPDX-License-Identifier: MIT
"""The targets that make faults: delay, flakey, dust, log-writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmlib.errors import ArgumentError, ParseError
from dmlib.ids import DeviceNumber
from dmlib.targets import (
    CorruptByte,
    Delay,
    DelayedPath,
    DelayStatus,
    Dust,
    DustStatus,
    EmptyStatus,
    Flakey,
    LogWrites,
    LogWritesStatus,
    RawStatus,
    RawTarget,
    parse_status,
    parse_target,
)
from dmlib.units import KiB, Sectors

U32 = (1 << 32) - 1
numbers = st.builds(DeviceNumber, st.integers(0, 4095), st.integers(0, (1 << 20) - 1))
words = st.text("abcxyz0123456789_-", min_size=1, max_size=8)
offsets = st.builds(Sectors, st.integers(0, (1 << 64) - 1))
counts = st.integers(0, U32)
paths = st.builds(DelayedPath, numbers, offsets, counts)
unknown = words.filter(lambda word: word not in {"drop_writes", "error_writes", "error_reads", "corrupt_bio_byte"})

delays = st.builds(Delay, paths) | st.builds(Delay, paths, paths) | st.builds(Delay, paths, paths, paths)
bytes_of_reads = st.builds(CorruptByte, st.integers(1, U32), st.just("r"), st.integers(0, 255), counts)
flakeys = st.builds(
    Flakey,
    numbers,
    offsets,
    up=st.integers(1, 1000),
    down=st.integers(0, 1000),
    drop_writes=st.booleans(),
    error_reads=st.booleans(),
    corrupt_byte=st.none() | bytes_of_reads,
    random_read_corrupt=st.integers(0, 1_000_000_000),
    random_write_corrupt=st.integers(0, 1_000_000_000),
    extra_features=st.lists(unknown, max_size=2),
)
dusts = st.builds(Dust, numbers, offsets, st.integers(0, 21).map(lambda bits: Sectors(1 << bits)))
logs = st.builds(LogWrites, numbers, numbers, extra=st.lists(words, max_size=2))


@given(delays | flakeys | dusts | logs)
def test_print_and_parse(target):
    """What is printed is read back as the same target."""
    assert parse_target(target.type_name, target.params(), strict=True) == target
    assert type(target).from_params(target.params() + " ") == target


# Linux 6.1.176, dmsetup table and dmsetup status of devices made in a guest.
KERNEL_FORMS = [
    ("delay", "7:0 0 500", Delay(DelayedPath(DeviceNumber(7, 0), Sectors(0), 500))),
    (
        "delay",
        "7:0 0 0 7:1 8 500",
        Delay(DelayedPath(DeviceNumber(7, 0), Sectors(0), 0), DelayedPath(DeviceNumber(7, 1), Sectors(8), 500)),
    ),
    ("flakey", "7:0 0 60 0 0 ", Flakey("7:0", up=60, down=0)),
    ("flakey", "7:0 0 0 5 1 drop_writes", Flakey("7:0", up=0, down=5, drop_writes=True)),
    ("flakey", "7:0 0 1 5 1 error_writes", Flakey("7:0", up=1, down=5, error_writes=True)),
    (
        "flakey",
        "7:0 8 1 5 6 drop_writes corrupt_bio_byte 32 r 1 0",
        Flakey("7:0", Sectors(8), up=1, down=5, drop_writes=True, corrupt_byte=CorruptByte(32, "r", 1)),
    ),
    ("dust", "7:0 0 4096", Dust("7:0", Sectors(0), KiB(4))),
    ("log-writes", "7:0 7:1", LogWrites("7:0", "7:1")),
]


@pytest.mark.parametrize(("kind", "text", "target"), KERNEL_FORMS)
def test_kernel_forms(kind, text, target):
    """What the kernel prints is read, and dmlib prints the same."""
    assert parse_target(kind, text, strict=True) == target
    assert target.params() == text.strip()


def test_status():
    """Each form of status is read into its fields."""
    assert parse_status("delay", "1 2 3", strict=True) == DelayStatus("1 2 3", reads=1, writes=2, flushes=3)
    assert parse_status("flakey", "", strict=True) == EmptyStatus("")
    number = DeviceNumber(7, 0)
    for text, failing, verbose in (
        ("7:0 bypass verbose", False, True),
        ("7:0 fail_read_on_bad_block quiet", True, False),
        ("7:0 fail_read_on_bad_block", True, True),  # before Linux 5.5
    ):
        status = DustStatus(text, device=number, failing=failing, verbose=verbose)
        assert parse_status("dust", text, strict=True) == status
    assert parse_status("log-writes", "5 99", strict=True) == LogWritesStatus(
        "5 99", entries=5, highest_sector=Sectors(99), logging=True
    )
    status = parse_status("log-writes", "5 99 logging_disabled new", strict=True)
    assert (status.logging, status.extra) == (False, ("new",))


def test_devices():
    """The devices below are told in order, and replaced by their numbers."""
    target = Delay(DelayedPath("/a", Sectors(0), 1), DelayedPath("/b", Sectors(0), 1), DelayedPath("/c", Sectors(0), 1))
    assert target.devices == ("/a", "/b", "/c")
    known = {"/a": DeviceNumber(8, 0), "/b": DeviceNumber(8, 1), "/c": DeviceNumber(8, 2)}.__getitem__
    assert target.resolved(known).params() == "8:0 0 1 8:1 0 1 8:2 0 1"
    assert Flakey("/b", up=1, down=1, error_reads=True).resolved(known).params() == "8:1 0 1 1 1 error_reads"
    assert Dust("/a", Sectors(0), Sectors(1)).resolved(known).params() == "8:0 0 512"
    assert LogWrites("/a", "/c").resolved(known).params() == "8:0 8:2"


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Delay(DelayedPath("7:0", Sectors(0), -1)), "read.milliseconds"),
        (lambda: Delay(DelayedPath("7:0", Sectors(0), U32 + 1)), "read.milliseconds"),
        (lambda: Delay(DelayedPath("a b", Sectors(0), 1)), "read.device"),
        (lambda: Delay(DelayedPath("7:0", Sectors(0), 1), None, DelayedPath("7:0", Sectors(0), 1)), "flush"),
        (lambda: Flakey("7:0", up=0, down=0), "down"),
        (lambda: Flakey("7:0", up=U32, down=1), "down"),
        (lambda: Flakey("7:0", up=True, down=1), "up"),
        (lambda: Flakey("7:0", up=1, down=1, drop_writes=True, error_writes=True), "error_writes"),
        (lambda: Flakey("7:0", up=1, down=1, drop_writes=True, corrupt_byte=CorruptByte(1, "w", 0)), "corrupt_byte"),
        (lambda: Flakey("7:0", up=1, down=1, corrupt_byte=CorruptByte(0, "r", 0)), "corrupt_byte"),
        (lambda: Flakey("7:0", up=1, down=1, corrupt_byte=CorruptByte(1, "x", 0)), "corrupt_byte"),
        (lambda: Flakey("7:0", up=1, down=1, corrupt_byte=CorruptByte(1, "r", 256)), "corrupt_byte.value"),
        (lambda: Flakey("7:0", up=1, down=1, random_read_corrupt=1_000_000_001), "random_read_corrupt"),
        (lambda: Dust("7:0", Sectors(0), Sectors(3)), "block_size"),
        (lambda: Dust("7:0", Sectors(0), Sectors(0)), "block_size"),
        (lambda: Dust("7:0", Sectors(0), Sectors(1 << 22)), "block_size"),
        (lambda: LogWrites("7:0", ""), "log_device"),
    ],
)
def test_what_cannot_be(make, field):
    """What the kernel would refuse, or take for something else, is refused by name."""
    with pytest.raises(ArgumentError) as caught:
        make()
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("kind", "text", "field", "position"),
    [
        ("delay", "7:0 0", "read.milliseconds", 2),
        ("delay", "7:0 0 1 7:1 0", "write.milliseconds", 5),
        ("flakey", "7:0 0 1", "down", 3),
        ("flakey", "7:0 0 1 1 2 drop_writes", "feature_count", 4),
        ("flakey", "7:0 0 1 1 1 corrupt_bio_byte 1 r 1 0", "feature_count", 4),
        ("flakey", "7:0 0 1 1 5 corrupt_bio_byte 1 x 1 0", "corrupt_byte.direction", 7),
        ("flakey", "7:0 0 0 0 0", "down", 3),
        ("dust", "7:0 0 100", "block_size", 2),
        ("dust", "7:0 0 1536", "block_size", 2),
        ("log-writes", "7:0", "log_device", 1),
    ],
)
def test_malformed(kind, text, field, position):
    """A broken line is kept raw with its problem; in strict mode the word at fault is named."""
    with pytest.raises(ParseError) as caught:
        parse_target(kind, text, strict=True)
    assert (caught.value.field, caught.value.position) == (field, position)
    target = parse_target(kind, text)
    assert isinstance(target, RawTarget)
    assert target.problem == str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text", "field"),
    [("delay", "1 2", "flushes"), ("dust", "7:0 maybe", "failing"), ("dust", "7:0 bypass loud", "verbose"),
     ("log-writes", "x 1", "entries")],
)  # fmt: skip
def test_malformed_status(kind, text, field):
    """So is a broken status."""
    with pytest.raises(ParseError) as caught:
        parse_status(kind, text, strict=True)
    assert caught.value.field == field
    assert isinstance(parse_status(kind, text), RawStatus)


@given(st.sampled_from(["delay", "flakey", "dust", "log-writes"]), st.text())
def test_any_text(kind, text):
    """No text is too strange to be kept."""
    assert parse_target(kind, text).type_name == kind
    assert parse_status(kind, text).raw == text
