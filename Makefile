# SPDX-License-Identifier: MIT
#
# What a developer types. "make help" lists it.

PYTHON := .venv/bin/python
# Read by tests/run.py; on the command line: make test TIER=unit K="pool and not grow"
export TIER K

.PHONY: help setup demo test lint types docs build clean

help: ## this list
	@echo "make demo                     a thin pool on a real kernel, built and taken down before your eyes"
	@echo "make test                     every tier of the tests, the kernel's in guests"
	@echo "make test TIER=unit           one tier: unit, library, runner, kernel, or harsh (what takes longer)"
	@echo "make test K=expression        the tests whose names match, as pytest -k"
	@echo "make lint                     ruff: rules and formatting"
	@echo "make types                    mypy, strict"
	@echo "make docs                     the documentation, into docs/_build/html"
	@echo "make build                    source distribution and wheel, into dist"
	@echo "make clean                    remove what was built, but for the virtual environment"
	@echo "make setup                    install what the others need (they do it by themselves)"

setup:
	@tools/setup test

demo:
	@tools/setup demo
	@$(PYTHON) -m dmlib.testing run --on auto --timeout 600 -- $(CURDIR)/$(PYTHON) examples/quickstart.py

test:
	@tools/setup test
	@$(PYTHON) tests/run.py

lint:
	@tools/setup test
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check --exclude "*.md"

types:
	@tools/setup test
	$(PYTHON) -m mypy

docs:
	@tools/setup test
	$(PYTHON) -m sphinx -n -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# The wheel is made from the source distribution, which shows that nothing is missing there.
build:
	@tools/setup test
	rm -rf dist
	$(PYTHON) -m build --outdir dist

clean:
	rm -rf build dist docs/_build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f dmlib/_dm.c dmlib/_dm*.so
	find dmlib tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} +
