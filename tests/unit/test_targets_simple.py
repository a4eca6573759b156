# SPDX-License-Identifier: MIT
"""The zero and error targets, raw targets, and the registry."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dmlib.targets
from dmlib.errors import ParseError
from dmlib.targets import Error, Linear, RawTarget, Target, Zero, parse_target, target_class

TYPES = ("linear", "striped", "zero", "error", "thin-pool", "thin")


@pytest.mark.parametrize(("cls", "name"), [(Zero, "zero"), (Error, "error")])
def test_no_parameters(cls, name):
    """Zero and error print nothing, and are read from nothing."""
    # Linux 6.1.176, dmsetup table: "0 2048 zero " and "0 2048 error "
    assert cls().params() == ""
    assert cls.type_name == name
    assert parse_target(name, " ", strict=True) == cls()
    assert type(parse_target(name, "")) is cls
    assert cls().devices == ()
    assert pickle.loads(pickle.dumps(cls())) == cls()  # noqa: S301


def test_the_two_are_not_equal():
    """A device that reads as zeros is not one that fails."""
    assert Zero() != Error()
    assert len({Zero(), Error(), Zero()}) == 2


def test_error_with_parameters():
    """Words that newer error targets take are kept."""
    target = parse_target("error", "8:0 2048 ", strict=True)
    assert target == Error(extra=("8:0", "2048"))
    assert target.params() == "8:0 2048"


@given(st.text(), st.text())
def test_raw_target_keeps_its_text(type_name, text):
    """A type that dmlib does not know keeps its text, but for white space around it."""
    if type_name in TYPES:
        return
    target = parse_target(type_name, text, strict=True)
    assert target == RawTarget(type_name, text)
    assert (target.type_name, target.params(), target.problem) == (type_name, text.strip(), None)
    assert parse_target(type_name, target.params()) == target
    assert pickle.loads(pickle.dumps(target)) == target  # noqa: S301


def test_raw_target_compares_by_text():
    """The kernel's space at the end does not make a table another one, nor does the problem."""
    assert RawTarget("snapshot", "8:0 8:1 P 8 ") == RawTarget("snapshot", "8:0 8:1 P 8")
    assert RawTarget("linear", "x", "is broken") == RawTarget("linear", "x")
    assert RawTarget("mirror", "") != RawTarget("raid", "")
    target = RawTarget("crypt")
    assert target.resolved(lambda _: pytest.fail("nothing to resolve")) is target
    with pytest.raises(AttributeError):
        target.text = "x"


def test_registry():
    """Each type has its class, which knows the type."""
    classes = {name: target_class(name) for name in TYPES}
    assert {name: cls.type_name for name, cls in classes.items()} == {name: name for name in TYPES}
    assert classes["linear"] is Linear
    assert all(issubclass(cls, Target) for cls in classes.values())
    assert target_class("mirror") is None
    assert target_class("") is None
    assert target_class("Linear") is None


def test_exports():
    """Every exported name can be had, and is listed; another is an AttributeError."""
    for name in dmlib.targets.__all__:
        assert getattr(dmlib.targets, name) is not None
        assert name in dir(dmlib.targets)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        dmlib.targets.Nothing  # noqa: B018


word = st.sampled_from(["0", "1", "2", "128", "8:0", "8:1", "/dev/x", "-", "read_only", "ignore_discard", "foo", "-1"])


@given(st.sampled_from(TYPES), st.text() | st.lists(word, max_size=9).map(" ".join))
def test_any_text(type_name, text):
    """Whatever the text, lenient reading returns a target; strict reading does too or raises ParseError."""
    target = parse_target(type_name, text)
    assert target.type_name == type_name
    try:
        strict = parse_target(type_name, text, strict=True)
    except ParseError as error:
        assert target == RawTarget(type_name, text)
        assert target.problem == str(error)  # noqa: PT017
    else:
        assert strict == target
        assert type(target) is target_class(type_name)
        printed = target.params()
        assert printed == printed.strip()
        assert parse_target(type_name, printed, strict=True) == target


def test_a_family_has_to_say_its_words():
    """The base class is nothing by itself: a family that leaves out a part is found at the first use."""
    for use in (lambda: Target().type_name, Target().params, lambda: Target.from_params("")):
        with pytest.raises(NotImplementedError):
            use()
