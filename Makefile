# Everything a newcomer needs: `make demo` and `make test` do all their set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HEADWATER_MOSQUITTO ?= $(CURDIR)/.cache/mosquitto

.PHONY: demo test lint slow clean

demo: $(VENV)/ready
	$(BIN)/headwater-sim data fetch watch
	$(BIN)/headwater-sim demo --out out/demo

test: lint
	$(BIN)/pytest -n 2

lint: $(VENV)/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

slow: $(VENV)/ready-dev
	$(BIN)/pytest -m slow

# A Python of 3.11 or later is checked first, since pip's own message is hard to read.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Headwater needs Python 3.11 or later; call make with PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/ready: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all]'
	touch $@

$(VENV)/ready-dev: $(VENV)/ready .cache/mosquitto/.tried
	$(BIN)/pip install --quiet -c constraints.txt --group dev
	touch $@

# mosquitto is wanted for half of the link's tests; where it cannot be had they are skipped.
.cache/mosquitto/.tried:
	mkdir -p $(@D)
	scripts/fetch-mosquitto $(@D)
	touch $@

clean:
	rm -rf $(VENV) .cache out
