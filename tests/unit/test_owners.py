# SPDX-License-Identifier: MIT
"""Who keeps a device, by its uuid; and LVM's names, held against dmsetup splitname."""

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmlib.errors import ArgumentError
from dmlib.owners import LvmName, join_lvm_name, owner_of, split_lvm_name

# LVM's own alphabet for names of groups and volumes.
parts = st.text("ab9_.+-", min_size=1, max_size=12).filter(lambda text: not text.startswith("-"))


@pytest.mark.parametrize(
    ("uuid", "program"),
    [
        # As the programs make them; the long runs of letters are random.
        ("LVM-Yfz3MsxMtCkA9Gl4pDkMp2jxVqUhHr4oLpeQ2vWzjsd4wXR8Q7xXzQyM6v3cGUkq", "LVM"),
        ("LVM-Yfz3MsxMtCkA9Gl4pDkMp2jxVqUhHr4oLpeQ2vWzjsd4wXR8Q7xXzQyM6v3cGUkq-tpool", "LVM"),
        ("CRYPT-LUKS2-0f1e2d3c4b5a69788796a5b4c3d2e1f0-root", "cryptsetup"),
        ("CRYPT-VERITY-0f1e2d3c4b5a69788796a5b4c3d2e1f0-system", "cryptsetup"),
        ("mpath-3600508b400105e210000900000490000", "multipath"),
        ("part1-mpath-3600508b400105e210000900000490000", "kpartx"),
        ("part12-LVM-x", "kpartx"),
        ("stratis-1-private-0f1e2d3c4b5a69788796a5b4c3d2e1f0-thin-pool", "Stratis"),
        ("DMRAID-ddf1_mirror", "dmraid"),
        ("VDO-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0", "VDO"),
    ],
)
def test_other_owners(uuid, program):
    """Programs that keep devices are known by how the uuid begins."""
    owner = owner_of(uuid)
    assert owner.foreign
    assert str(owner) == owner.program == program
    assert uuid.startswith(f"{owner.prefix}-")


def test_our_own():
    """Dmlib's devices are its own."""
    owner = owner_of("DMLIB-7:0-thin-3")
    assert (owner.foreign, str(owner)) == (False, "dmlib")


@pytest.mark.parametrize(
    "uuid",
    ["", "-", "LVM", "lvm-x", "LVMX-x", "part-x", "part1", "xpart1-x", "my-disk", "CRYPT", "DMLIBX-1", "dmlib-test"],
)
def test_no_owner(uuid):
    """A uuid of any other form names nobody."""
    assert owner_of(uuid) is None


@given(st.text())
def test_any_uuid(uuid):
    """No uuid is too strange to be asked about."""
    owner = owner_of(uuid)
    assert owner is None or uuid.startswith(owner.prefix)


@given(parts, parts, parts | st.just(""))
def test_names_round_trip(group, volume, layer):
    """A name that is put together comes apart the same."""
    assert split_lvm_name(join_lvm_name(group, volume, layer)) == LvmName(group, volume, layer)


@pytest.mark.parametrize(
    "name",
    ["vg-lv", "vg--docker-data", "a--b--c-d--e-tpool", "vg-lv_tdata", "vg---x", "a----b-c", "vg-lv-real", "a-b--"],
)
def test_names_as_dmsetup_has_them(name):
    """The program dmsetup finds the same parts."""
    command = [
        "dmsetup",
        "splitname",
        name,
        "LVM",
        "--noheadings",
        "--separator",
        "|",
        "-o",
        "vg_name,lv_name,lv_layer",
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "|".join(split_lvm_name(name))


@pytest.mark.parametrize("name", ["", "-", "a", "a-", "-a", "a-b-c-d", "a--b"])
def test_names_that_lvm_does_not_give(name):
    """What LVM cannot have made is refused."""
    with pytest.raises(ArgumentError) as caught:
        split_lvm_name(name)
    assert caught.value.field == "name"


@pytest.mark.parametrize(
    ("words", "field"),
    [(("", "a"), "group"), (("a", ""), "volume"), (("-a", "b"), "group"), (("a", "b", "-c"), "layer")],
)
def test_parts_that_lvm_does_not_have(words, field):
    """A part that LVM refuses is refused by name."""
    with pytest.raises(ArgumentError) as caught:
        join_lvm_name(*words)
    assert caught.value.field == field
