# SPDX-License-Identifier: MIT
"""Builds the extension; everything else about the package stands in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=["_build_dm.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
