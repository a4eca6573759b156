# SPDX-License-Identifier: MIT
"""
The status parsers against libdevmapper's own, which need no kernel.

Two parsers of different authors agree on every line that a kernel printed. Where they differ on other lines, the
difference is a limit of the C parser, and is stated here, so that a change of either is noticed.
"""

from pathlib import Path
from types import SimpleNamespace

import cffi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmlib.targets import (
    DiscardMode,
    PoolMode,
    RawStatus,
    StatusUnavailable,
    ThinFailed,
    ThinPoolFailed,
    ThinPoolStatus,
    ThinStatus,
    ThinUnbound,
    parse_status,
)
from dmlib.units import Sectors

ffi = cffi.FFI()
ffi.cdef("""
    struct dm_pool;
    struct dm_pool *dm_pool_create(const char *name, size_t chunk_hint);
    void dm_pool_destroy(struct dm_pool *p);

    struct dm_status_thin_pool {
        uint64_t transaction_id;
        uint64_t used_metadata_blocks;
        uint64_t total_metadata_blocks;
        uint64_t used_data_blocks;
        uint64_t total_data_blocks;
        uint64_t held_metadata_root;
        uint32_t read_only;
        int discards;
        uint32_t fail : 1;
        uint32_t error_if_no_space : 1;
        uint32_t out_of_data_space : 1;
        uint32_t needs_check : 1;
        uint32_t error : 1;
        uint32_t reserved : 27;
    };
    int dm_get_status_thin_pool(struct dm_pool *mem, const char *params, struct dm_status_thin_pool **status);

    struct dm_status_thin {
        uint64_t mapped_sectors;
        uint64_t highest_mapped_sector;
        uint32_t fail : 1;
        uint32_t reserved : 31;
    };
    int dm_get_status_thin(struct dm_pool *mem, const char *params, struct dm_status_thin **status);
""")

POOL_FIELDS = (
    "transaction_id",
    "used_metadata_blocks",
    "total_metadata_blocks",
    "used_data_blocks",
    "total_data_blocks",
    "held_metadata_root",
    "read_only",
    "discards",
    "fail",
    "error_if_no_space",
    "out_of_data_space",
    "needs_check",
    "error",
)
THIN_FIELDS = ("mapped_sectors", "highest_mapped_sector", "fail")
DISCARDS = {DiscardMode.IGNORE: 0, DiscardMode.NO_PASSDOWN: 1, DiscardMode.PASSDOWN: 2, None: 2}


def open_library():
    """Return libdevmapper under its Debian or its Fedora name."""
    try:
        return ffi.dlopen("libdevmapper.so.1.02.1")
    except OSError:
        return ffi.dlopen("libdevmapper.so.1.02")


lib = open_library()


def ask_library(function, kind, fields, text):
    """Return what the C parser makes of *text*; ``None`` if it refuses."""
    pool = lib.dm_pool_create(b"status", 1024)
    assert pool != ffi.NULL
    try:
        status = ffi.new(f"struct {kind} **")
        if not getattr(lib, function)(pool, text.encode(), status):
            return None
        return SimpleNamespace(**{name: int(getattr(status[0], name)) for name in fields})
    finally:
        lib.dm_pool_destroy(pool)


def c_thin_pool(text):
    return ask_library("dm_get_status_thin_pool", "dm_status_thin_pool", POOL_FIELDS, text)


def c_thin(text):
    return ask_library("dm_get_status_thin", "dm_status_thin", THIN_FIELDS, text)


def as_c_pool(status):
    """Return our status of a pool in the terms of the C structure, which has no place for the held root."""
    values = dict.fromkeys(POOL_FIELDS, 0)
    match status:
        case ThinPoolFailed():
            values |= {"fail": 1}
        case StatusUnavailable():
            values |= {"fail": 1, "error": 1}
        case ThinPoolStatus():
            values |= {
                "transaction_id": status.transaction_id,
                "used_metadata_blocks": status.used_metadata.count,
                "total_metadata_blocks": status.total_metadata.count,
                "used_data_blocks": status.used_data.count,
                "total_data_blocks": status.total_data.count,
                "read_only": int(status.mode is PoolMode.READ_ONLY),
                "out_of_data_space": int(status.mode is PoolMode.OUT_OF_DATA_SPACE),
                "discards": DISCARDS[status.discard],
                "error_if_no_space": int(status.error_if_no_space),
                "needs_check": int(bool(status.needs_check)),
            }
        case _:
            return None
    return SimpleNamespace(**values)


def as_c_thin(status):
    """Return our status of a thin device in the terms of the C structure, which does not tell ``-`` from 0."""
    match status:
        case ThinFailed():
            return SimpleNamespace(mapped_sectors=0, highest_mapped_sector=0, fail=1)
        case ThinUnbound():
            return SimpleNamespace(mapped_sectors=0, highest_mapped_sector=0, fail=0)
        case ThinStatus():
            highest = status.highest_mapped or Sectors(0)
            return SimpleNamespace(mapped_sectors=status.mapped.count, highest_mapped_sector=highest.count, fail=0)
        case _:
            return None


def captured(type_name):
    text = (Path(__file__).parent.parent / "data" / "status-lines.txt").read_text(encoding="ascii")
    lines = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    return [line[1] for line in lines if line[0] == type_name]


FULL = ["5", "120/1024", "30/100", "-", "rw", "no_discard_passdown", "error_if_no_space", "needs_check", "256"]
OLD_FORMS = [" ".join(FULL[:count]) + " " for count in range(3, len(FULL) + 1)]


@pytest.mark.parametrize("text", [*captured("thin-pool"), "Error", *OLD_FORMS])
def test_pool_lines(text):
    """Both parsers see the same pool in every line of a kernel, old or new."""
    expected = c_thin_pool(text)
    assert expected is not None
    assert as_c_pool(parse_status("thin-pool", text, strict=True)) == expected


@pytest.mark.parametrize("text", [*captured("thin"), "-"])
def test_thin_lines(text):
    """Both parsers see the same thin device in every line of a kernel."""
    expected = c_thin(text)
    assert expected is not None
    assert as_c_thin(parse_status("thin", text, strict=True)) == expected


figures = st.integers(0, (1 << 64) - 1)


@settings(deadline=None, database=None)
@given(
    st.tuples(figures, figures, figures, figures, figures, figures | st.just("-")),
    st.sampled_from(["rw", "ro", "out_of_data_space"]),
    st.sampled_from(["ignore_discard", "discard_passdown", "no_discard_passdown"]),
    st.sampled_from(["error_if_no_space", "queue_if_no_space"]),
    st.sampled_from(["needs_check", "-"]),
    figures,
)
def test_any_pool_line(counts, mode, discard, no_space, check, low):
    """Both parsers agree on every line that the grammar allows."""
    transaction, used, total, data, data_total, root = counts
    line = f"{transaction} {used}/{total} {data}/{data_total} {root} {mode} {discard} {no_space} {check} {low} "
    assert as_c_pool(parse_status("thin-pool", line, strict=True)) == c_thin_pool(line)


@settings(deadline=None, database=None)
@given(figures, figures)
def test_any_thin_line(mapped, highest):
    """Both parsers agree on every thin device with something mapped."""
    line = f"{mapped} {highest}"
    assert as_c_thin(parse_status("thin", line, strict=True)) == c_thin(line)


def test_library_never_fills_the_held_root():
    """The C parser leaves the metadata snapshot out; ours has it."""
    line = "7 1650/16384 2/256 26 rw discard_passdown queue_if_no_space - 1024 "
    assert c_thin_pool(line).held_metadata_root == 0
    assert parse_status("thin-pool", line).held_metadata_root == 26


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("0 5/6 1/2 - rw discard_passdown queue_if_no_space - 4 zero ", "read_only"),
        ("0 5/6 1/2 - rw discard_passdown queue_if_no_space - 4 no_needs_check", "needs_check"),
        ("0 5/6 1/2 - rw discard_passdown queue_if_no_space - 4 Failover", "fail"),
        ("0 5/6 1/2 - rw discard_passdown queue_if_no_space - 4 Errors", "error"),
    ],
)
def test_library_matches_parts_of_words(line, field):
    """The C parser takes a part of an unknown word for a flag; ours compares whole words in their places."""
    assert getattr(c_thin_pool(line), field) == 1
    status = parse_status("thin-pool", line, strict=True)
    assert isinstance(status, ThinPoolStatus)
    assert getattr(as_c_pool(status), field) == 0
    assert status.extra == (line.split()[-1],)


def test_library_needs_a_word_after_ro():
    """The C parser does not see a read-only pool where the line ends after ``ro``; ours does."""
    assert c_thin_pool("0 5/6 1/2 - ro").read_only == 0
    assert parse_status("thin-pool", "0 5/6 1/2 - ro").mode is PoolMode.READ_ONLY


def test_library_does_not_know_error_of_thin():
    """The C parser refuses ``Error`` of a thin device, which is a state for ours."""
    assert c_thin("Error") is None
    assert type(parse_status("thin", "Error")) is StatusUnavailable


def test_library_takes_any_dash_for_nothing():
    """The C parser reads nothing from a line with a dash, be it nonsense; ours says that it is."""
    assert c_thin("5 - 7") == SimpleNamespace(mapped_sectors=0, highest_mapped_sector=0, fail=0)
    assert c_thin("non-sense") == SimpleNamespace(mapped_sectors=0, highest_mapped_sector=0, fail=0)
    assert type(parse_status("thin", "non-sense")) is RawStatus


@pytest.mark.parametrize("line", ["", "x", "0", "0 5", "0 5/6", "0 5/6 1", "0 5/6 x/2", "rw"])
def test_both_refuse(line):
    """What is no pool to one parser is none to the other."""
    assert c_thin_pool(line) is None
    assert type(parse_status("thin-pool", line)) is RawStatus
