# Python and make are all you need: everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-all check format docs bench dist clean

help:
	@echo "make demo      install, then convert, calibrate and fine-tune a model of handwritten digits"
	@echo "make test      install, then run the fast tests (minutes)"
	@echo "make test-all  install, then run all tests and 20,000 mutated files (an hour)"
	@echo "make check     install, then run ruff and mypy --strict"
	@echo "make format    run ruff --fix and ruff format"
	@echo "make dist      build wheel and sdist, and try both in an empty environment"
	@echo "make docs      install, then build the site of README and docs into site/"
	@echo "make bench     time tied models against dense ones (minutes; see docs/results.md)"

demo: .venv/.demo
	$(BIN)/tiedconv demo

test: .venv/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: .venv/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python benchmarks/fuzz.py

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open site/index.html; for the search: python3 -m http.server -d site"

bench: .venv/.dev
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/conversion.py

dist: .venv/.dev
	$(BIN)/python scripts/check_dist.py

clean:
	rm -rf .venv demo-output build dist site *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch comes first and alone, so that no other package's looser requirement picks its release.
.venv/.torch: constraints.txt | $(BIN)/python
	$(INSTALL) torch
	$(INSTALL) torchvision
	@touch $@

.venv/.demo: pyproject.toml .venv/.torch
	$(INSTALL) -e '.[demo]'
	@touch $@

.venv/.dev: pyproject.toml .venv/.torch
	$(INSTALL) -e '.[dev]'
	@touch $@

.venv/.docs: pyproject.toml .venv/.torch
	$(INSTALL) -e '.[docs]'
	@touch $@
