# SPDX-License-Identifier: MIT
"""Sphinx's settings. Nothing here needs the network, nor a kernel with the driver."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any

from sphinx.domains.python import PyObject

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "_ext"))
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import dmlib

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx

project = "dmlib"
author = "the dmlib authors"
project_copyright = author
version = release = dmlib.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "dm_tables"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"dmlib {version}"
html_static_path = ["_static"]
html_css_files = ["dmlib.css"]
html_copy_source = False
html_show_copyright = False
pygments_style = "friendly"
default_role = "py:obj"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"

# The house's docstrings end in lines such as "Cost: one ioctl."; they become fields beside "Raises".
_FIELD = re.compile(r"(Cost|Source|Minimum [a-z-]+): (?=\S)")
# Types that the signatures name and that are documented elsewhere: the standard library's, and private ones.
_FOREIGN = re.compile(
    r"(collections\.abc|typing|enum|os|re|types|contextlib|threading)\..*"
    r"|Iterator|Iterable|Sequence|Callable|PathLike|Unpack|Self|Any|Enum|IntFlag|NamedTuple|TracebackType|Literal|TypedDict"
    r"|(dmlib\.)?section\..*|Secret|Prepared\..*|OSError|ValueError|RuntimeError|ExceptionGroup|TypeError|optional|.*\b_[a-z]\w*"
)


def _fields(_app: Sphinx, what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    if what in ("attribute", "data", "property") and ":" in lines[0]:
        lines.insert(0, "\\ ")  # napoleon would take what stands before the colon for a type
    inside = False
    for number, line in enumerate(lines):
        match = _FIELD.match(line)
        if match:
            lines[number] = f":{match[1]}: {line[match.end() :]}"
            inside = True
        elif not line.strip():
            inside = False
        elif inside:
            lines[number] = f"    {line}"


def _resolve(app: Sphinx, env: Any, node: nodes.Element, contnode: nodes.Element) -> nodes.Node | None:
    """Find what a signature names by its room (``ids.DeviceNumber``) under its public name; leave foreign types be."""
    if node.get("refdomain") != "py":
        return None
    target: str = node["reftarget"]
    parts = target.removeprefix("dmlib.").split(".")
    public = next((number for number, part in enumerate(parts) if part in dmlib.__all__), 0)
    for home in ("dmlib", *(f"dmlib.{room}" for room in dmlib._ROOMS)):  # noqa: SLF001
        found = ".".join((home, *parts[public:]))
        reference = env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "obj", found, node, contnode)
        if reference is not None:
            return reference  # type: ignore[no-any-return]
    return contnode if _FOREIGN.fullmatch(target) else None


def setup(app: Sphinx) -> None:
    """Connect what stands above."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
        elif field.name == "exceptions":
            field.label = "Raises"
    app.connect("autodoc-process-docstring", _fields, priority=400)  # before napoleon
    app.connect("missing-reference", _resolve)
