# SPDX-License-Identifier: MIT
"""Clones hold the image, are independent, and give their room back."""

import os
from types import SimpleNamespace

import pytest
from disk_clones import Clones, free_id

IMAGE = os.urandom(1 << 20)


@pytest.fixture
def clones(thin_pool, tmp_path):
    (tmp_path / "image").write_bytes(IMAGE)
    made = Clones(thin_pool)
    made.import_image(tmp_path / "image")
    return made


def read(path):
    with open(path, "rb") as device:
        return device.read()


@pytest.mark.needs_device_mapper(targets=["thin-pool", "thin"])
def test_a_clone_is_the_image_and_can_be_changed(clones):
    """What is written to a clone shows in it alone."""
    first, second = clones.clone("first"), clones.clone("second")
    with open(first, "r+b") as device:
        device.write(b"changed")
    assert read(first) == b"changed" + IMAGE[7:]
    assert read(second) == read(clones.base.path) == IMAGE


@pytest.mark.needs_device_mapper(targets=["thin-pool", "thin"])
def test_a_discarded_clone_takes_no_room(clones):
    """Blocks that only a clone had are free after it."""
    before = clones.pool.status(flush=True).used_data
    with open(clones.clone("first"), "r+b") as device:
        device.write(b"changed")
    assert clones.pool.status(flush=True).used_data > before
    clones.discard("first")
    assert clones.pool.status(flush=True).used_data == before


def test_ids():
    """The lowest free number is taken; this test needs no kernel."""
    assert free_id({}) == 1
    assert free_id({"a": SimpleNamespace(thin_id=1), "b": SimpleNamespace(thin_id=3)}) == 2
