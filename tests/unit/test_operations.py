# SPDX-License-Identifier: MIT
"""What can be said to a task, as data: complete, and about things that exist."""

import inspect

import pytest

from dmlib._ffi import Library
from dmlib.operations import GETTERS, INPUTS, ON_DEVICES, RULES, Operation
from dmlib.results import Result
from dmlib.task import Task

ADDRESS = {"self", "operation", "name", "uuid", "number", "target"}


def test_every_operation_has_its_rules():
    """No operation is without rules, and what it needs is something that it takes."""
    assert set(RULES) == set(Operation)
    for operation, rules in RULES.items():
        assert rules.c_type in Library.__annotations__, operation
        assert not rules.needs or operation in INPUTS[rules.needs].on
    assert {operation for operation in Operation if operation not in ON_DEVICES} == {
        Operation.REMOVE_ALL,
        Operation.VERSION,
        Operation.TARGET_VERSION,
        Operation.TARGET_VERSIONS,
    }


def test_every_input_is_described():
    """What a Task takes beyond its address is what the table has, and an attribute of the task."""
    parameters = set(inspect.signature(Task).parameters) - ADDRESS
    assert parameters == set(INPUTS)
    assert parameters <= set(Task.__slots__)


@pytest.mark.parametrize("name", INPUTS)
def test_setters_exist(name):
    """Each input names the functions of libdevmapper that it goes to, and some operation takes it."""
    for setter in INPUTS[name].setter.split(", "):
        assert hasattr(Library, setter) or setter == "dm_task_ima_measurement"
    assert INPUTS[name].on
    assert INPUTS[name].means


@pytest.mark.parametrize("name", GETTERS)
def test_getters_exist(name):
    """Each result names the functions that it comes from."""
    assert name in Result.__slots__
    assert set(GETTERS) == set(Result.__slots__)
    for getter in GETTERS[name].getter.split(", "):
        assert hasattr(Library, getter)
