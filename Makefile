# Every command makes what it needs on first use: a virtual environment in .venv, kept until pyproject.toml or
# constraints.txt change.
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= a red circle to the left of a blue square on a yellow background
OUTPUT ?= $(CURDIR)/picture.png
SEED ?= 7
BENCH ?= bench
ARGS ?=
export PROMPT OUTPUT

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CHECKED := src tests benchmarks

.DEFAULT_GOAL := help
.PHONY: help install run test test-fast lint format typecheck bench judge train-embedded clean

help:  ## list these commands
	@echo "kandinsky22: make COMMAND"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.tools  ## set up .venv with everything for work on the project

run: $(VENV)/.package  ## draw a picture with the embedded model: make run PROMPT="a green star" SEED=3
	@$(BIN)/kandinsky22 generate "$$PROMPT" --seed $(SEED) -o "$$OUTPUT" $(ARGS)

test: $(VENV)/.tools  ## run all tests
	$(BIN)/python -m pytest $(ARGS)

test-fast: $(VENV)/.tools  ## run the tests that are not marked slow
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

lint: $(VENV)/.tools  ## check style
	$(BIN)/python -m ruff check $(CHECKED)
	$(BIN)/python -m ruff format --check $(CHECKED)

format: $(VENV)/.tools  ## put the sources into the project's style
	$(BIN)/python -m ruff check --fix $(CHECKED)
	$(BIN)/python -m ruff format $(CHECKED)

typecheck: $(VENV)/.tools  ## check types, strictly
	$(BIN)/python -m mypy

bench: $(VENV)/.tools  ## compare with the reference at published size: 20 minutes, 24 GiB of memory, 16 GB of disk
	$(BIN)/python -m benchmarks.compare --folder $(BENCH) --towers full --make
	$(BIN)/python -m benchmarks.compare --folder $(BENCH) --towers full --dtype fp32 bf16 --minutes 18 \
	  --out $(BENCH)/result $(ARGS)

judge: $(VENV)/.tools  ## judge the embedded model's pictures
	$(BIN)/python -m benchmarks.embedded_success
	$(BIN)/python -m benchmarks.embedded_modes

train-embedded: $(VENV)/.package  ## train the embedded model from nothing, or go on where it stopped (hours)
	$(BIN)/python -m kandinsky22.training $(ARGS)

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "kandinsky22 needs Python 3.10 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.package: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing kandinsky22 into $(VENV) (once; minutes on a slow line)"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.tools: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing kandinsky22 and its test tools into $(VENV) (once; minutes on a slow line)"
	@$(PIP) install -c constraints.txt -e ".[test,bench,dev]"
	@touch $(VENV)/.package $@
