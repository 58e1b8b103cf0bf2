# Every target sets up what it needs in .venv, once: a stamp file per extra remembers it. Nothing outside this folder is touched.
# Another interpreter: make PYTHON=python3.12 test. To start afresh: make clean.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto
OUT ?= demo-out
TORCH ?=

BIN := $(VENV)/bin
LOWEST := .venv-lowest
PIP := -m pip install --quiet --disable-pip-version-check
# One thread a test process: the processes share the cores among them.
TEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 MPLBACKEND=agg

.PHONY: help demo test slow lint format types docs bench lowest clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.demo  ## sample from a model that comes with fewstep, and show what few calls cost
	$(BIN)/fewstep demo --out $(OUT)
	@echo "Open $(CURDIR)/$(OUT)/index.html in a browser."

test: $(VENV)/.dev  ## the tests, and the examples in the docstrings
	$(TEST) $(BIN)/python -m pytest -m "not slow" -n $(JOBS)

slow: $(VENV)/.dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev  ## style, format, and the rules about imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_layers.py

format: $(VENV)/.dev  ## rewrite the files in the format that lint wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev  ## check the types
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open $(CURDIR)/site/index.html in a browser."

bench: $(VENV)/.dev  ## measure everything again (half an hour), and bring the tables of the README and the pages up to date
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/models.py
	$(BIN)/python tools/readme_table.py
	$(BIN)/python tools/migration_table.py

lowest: $(LOWEST)/.dev  ## the tests with the lowest versions that fewstep promises to work with
	$(TEST) $(LOWEST)/bin/python -m pytest -m "not slow" -n $(JOBS)

clean:  ## remove everything that was made
	rm -rf $(VENV) $(LOWEST) build dist site $(OUT) .pytest_cache .ruff_cache .hypothesis
	find src tests tools benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# ---- set-up ----------------------------------------------------------------------------------------------------------------------------
# constraints.txt matters: without it pip may fetch another PyTorch, and with that gigabytes of CUDA libraries.

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python $(PIP) -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python $(PIP) -c constraints.txt -e ".[demo,dev]"
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python $(PIP) -c constraints.txt -e ".[docs]"
	@touch $@

$(LOWEST)/.dev: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	sed -E $(if $(TORCH),'s/^torch==.*/torch==$(TORCH)/','') constraints-lowest.txt > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python $(PIP) -c $(LOWEST)/constraints.txt -e ".[demo]" POT hypothesis pytest pytest-xdist
	@touch $@
