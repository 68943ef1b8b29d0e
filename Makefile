# `make run` and `make test` work on a fresh machine with Python 3.11 or newer (venv, pip), git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help run test lint types unit schema picture session format clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable . --group dev
	@touch $@

run: $(STAMP) ## try it: a throw-away inbox and a local stand-in for the service
	$(BIN)/sfwatch demo

test: lint types unit ## everything that CI runs

lint: $(STAMP) ## style, and which module may import what
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

unit: $(STAMP) ## the tests
	$(BIN)/python tests/programs.py
	$(BIN)/pytest

schema: $(STAMP) ## write config/sfwatch.schema.json, and the README's table of keys, from the code
	$(BIN)/python tests/schema.py

picture: $(STAMP) ## draw docs/demo.svg, the README's picture, from a run of the demo
	$(BIN)/python tests/picture.py

session: $(STAMP) ## a whole session over TLS with a 1 GB file (root, Debian), with its figures
	$(BIN)/python tests/session.py

.PHONY: walks
walks: $(STAMP) ## 2,000 random histories of the whole daemon, and 100 walks of each model (half an hour)
	SFWATCH_WALKS=2000 $(BIN)/pytest tests/test_simulation.py tests/test_lost_answers_model.py tests/test_refusals_model.py

.PHONY: crash-test
crash-test: $(STAMP) ## kill and fail every call of a delivery, cut the power (root, a C compiler, half an hour)
	SFWATCH_SWEEP=full $(BIN)/pytest tests/crash

.PHONY: bench soak
bench: $(STAMP) ## all benchmarks, against curl and others, over TLS (root, Debian; twelve minutes)
	cd tests && ../$(BIN)/python -m benchmarks

soak: $(STAMP) ## 50,000 files through one process: memory, descriptors and threads stay flat
	cd tests && ../$(BIN)/python -m benchmarks.soak

.PHONY: burst-test
burst-test: $(STAMP) ## 20,000 files into a stopped process and 60,000 into a running one (ten minutes)
	SFWATCH_BURST=full $(BIN)/pytest tests/watching -k burst

.PHONY: peers
peers: $(STAMP) ## other people's Files servers from PyPI, with lost answers: docs/peers.md (five minutes)
	cd tests && ../$(BIN)/python -m peers

format: $(STAMP) ## put the code into its form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## forget the virtual environment and all caches
	rm -rf $(VENV) .peers .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
