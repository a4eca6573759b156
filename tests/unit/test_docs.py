# SPDX-License-Identifier: MIT
"""The documentation against the code: examples in docstrings, completeness of the reference, the changelog."""

import dataclasses
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import dmlib

TREE = Path(__file__).parents[2]
SHOWING = ("units", "ids", "owners", "errors", "table", "archive", "targets", "tree")
SHOWING_MODULES = [f"dmlib.{name}" for name in SHOWING]
SHOWING_MODULES += [f"dmlib.targets.{path.stem}" for path in sorted((TREE / "dmlib/targets").glob("[!_]*.py"))]
REFERENCE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((TREE / "docs/reference").glob("*.rst")))
PUBLIC = [name for name in dmlib.__all__ if name != "__version__"]
CLASSES = [name for name in PUBLIC if isinstance(getattr(dmlib, name), type)]
GROUPS = ["Security", "Removed", "Deprecated", "Added", "Changed", "Fixed"]


@pytest.mark.parametrize("name", SHOWING_MODULES)
def test_docstring_examples(name):
    """What the docstrings show, where they show what needs no driver, is what happens."""
    module = importlib.import_module(name)
    shown = Path(inspect.getfile(module)).read_text(encoding="utf-8").count("    >>> ")
    result = doctest.testmod(module)
    assert (result.failed, result.attempted) == (0, shown)


def test_some_examples_exist():
    """The examples are found: the vocabulary and the table have some."""
    counts = {name: doctest.testmod(importlib.import_module(name)).attempted for name in SHOWING_MODULES}
    assert all(counts[f"dmlib.{name}"] for name in ("units", "ids", "table"))


def own_docstring(thing):
    """Return what somebody wrote, not what a dataclass or a base class supplies."""
    text = vars(thing).get("__doc__") if isinstance(thing, type) else getattr(thing, "__doc__", None)
    made_up = dataclasses.is_dataclass(thing) and (text or "").startswith(f"{thing.__name__}(")
    return "" if made_up else text or ""


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name):
    """Each public class and function says what it is, in a first line that ends like a sentence."""
    thing = getattr(dmlib, name)
    if name == "Size":  # an alias has none; the reference describes it
        return
    first = inspect.cleandoc(own_docstring(thing)).partition("\n\n")[0]
    assert first, f"dmlib.{name} has no docstring"
    assert first.rstrip("`)")[-1] in ".:;", f"dmlib.{name}: {first!r}"


@pytest.mark.parametrize("name", CLASSES)
def test_public_methods_have_docstrings(name):
    """Each public method and property of a public class has a docstring."""
    cls = getattr(dmlib, name)
    ours = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "dmlib"]
    members = {key: value for base in reversed(ours) for key, value in vars(base).items() if not key.startswith("_")}
    for key, value in members.items():
        function = getattr(value, "__func__", value)
        if inspect.isfunction(function) or isinstance(value, property):
            inherited = [vars(base)[key] for base in cls.__mro__ if key in vars(base)]
            documented = [getattr(getattr(one, "__func__", one), "__doc__", None) for one in inherited]
            assert any(documented), f"dmlib.{name}.{key} has no docstring"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_in_the_reference(name):
    """Each public name has its entry in docs/reference."""
    entry = rf"^\.\. (auto(class|function|exception|data)|py:data):: {name}$"
    assert re.search(entry, REFERENCE, re.MULTILINE), f"add dmlib.{name} to docs/reference"


def test_reference_names_exist():
    """Each entry of docs/reference names something that is there."""
    entries = re.findall(r"^\.\. auto(?:class|function|exception|data):: (\S+)$", REFERENCE, re.MULTILINE)
    assert len(entries) > len(PUBLIC) // 2
    for entry in entries:
        home, _, name = entry.rpartition(".")
        assert hasattr(importlib.import_module(home or "dmlib"), name), entry


def changelog():
    return (TREE / "CHANGELOG.md").read_text(encoding="utf-8")


def test_changelog_and_version_agree():
    """The version is the one that the changelog has on top: released with a date, or announced under Unreleased."""
    versions = re.findall(r"^## \[(\S+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", changelog(), re.MULTILINE)
    assert versions[0] == ("Unreleased", "")
    released, dot, _ = dmlib.__version__.partition(".dev")
    unreleased = changelog().split("\n## ")[1]
    if dot:
        assert f"To be {released}," in unreleased
        assert released not in [version for version, _ in versions]
    else:
        assert versions[1][0] == released
    assert all(date for _, date in versions[1:])


def test_changelog_grammar():
    """Groups stand in their order, and entries begin with a name, say something and end."""
    for part in changelog().split("\n## ")[1:]:
        groups = re.findall(r"^### (.+)$", part, re.MULTILINE)
        assert groups == [group for group in GROUPS if group in groups]
        entries = re.split(r"\n- ", part)[1:]
        assert entries
        for entry in entries:
            text = entry.partition("\n\n")[0].strip()
            assert text.endswith("."), text
            assert not re.fullmatch(r"<?https?://\S+>?\.?|\[.*\]\(.*\)\.?", text), text


def test_readme_names_the_version():
    """README says which version is in the making, or was released."""
    readme = (TREE / "README.md").read_text(encoding="utf-8")
    assert f"Version {dmlib.__version__.partition('.dev')[0]} " in readme


def test_readme_example_is_the_yardstick():
    """README, the front page of the documentation, and what the tests run are the same five lines."""
    readme = (TREE / "README.md").read_text(encoding="utf-8")
    index = (TREE / "docs/index.rst").read_text(encoding="utf-8")
    example = re.search(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)[1]
    lines = [line.strip() for line in example.splitlines() if line.strip()]
    assert len(lines) == 5
    shown = [line.strip() for line in index.splitlines()]
    assert [line for line in lines if line not in shown] == []
