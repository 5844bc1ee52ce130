# Each command sets up what it needs on first use: a virtual environment in .venv, which is updated when pyproject.toml
# or constraints.txt change.
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= a red circle to the left of a blue square on a yellow background
OUTPUT ?= $(CURDIR)/picture.png
SEED ?= 7
N ?= 1000
ROWS ?= 2000
BENCH ?= bench
ARGS ?=
export PROMPT OUTPUT

# Tests of one file run in one process, so that fixtures of a module or session are built once per process. There is one
# process more than cores: some tests wait for servers or other processes.
PARALLEL := -n $(shell $(PYTHON) -c "import os; print(1 + (os.cpu_count() or 1))") --dist loadfile --no-loadscope-reorder
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
EXE := .exe
else
BIN := $(VENV)/bin
EXE :=
endif
BROWSER = $(firstword $(KANDINSKY22_CHROMIUM) $(foreach name,chromium chromium-browser google-chrome google-chrome-stable,$(shell command -v $(name) 2>/dev/null)))
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Tests that need neither the reference nor optional packages.
OLDEST_TESTS := $(addprefix tests/unit/test_,$(addsuffix .py,oldest_versions kernels packed_linear fingerprint settings feature_caching))
CHECKED := src tests benchmarks docs
PROSE := README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md

.DEFAULT_GOAL := help
.PHONY: help install run browser test test-fast test-oldest fuzz threads kills lint format typecheck docs bench bench-commands judge train-embedded clean serve-kills serve-load serve-latency studio batch-kills batch-bench

help:  ## list these commands
	@echo "kandinsky22: make COMMAND"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.tools  ## set up .venv with the package and all tools

run: $(VENV)/.package  ## generate a picture with the embedded model: make run PROMPT="a green star" SEED=3
	@$(BIN)/kandinsky22 generate "$$PROMPT" --seed $(SEED) -o "$$OUTPUT" $(ARGS)

test: $(VENV)/.tools  ## run all tests in parallel: make test ARGS="-n 0 -k guidance" uses one
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-fast: $(VENV)/.tools  ## run the tests that are not marked slow
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(ARGS)

browser:  ## install Chromium for the tests of the studio, where there is none (Debian, Ubuntu)
	@if [ -n "$(BROWSER)" ]; then echo "$(BROWSER)"; \
	elif ! command -v apt-get >/dev/null; then echo "no Chromium is installed; install it, or set KANDINSKY22_CHROMIUM" >&2; exit 1; \
	else [ "$$(id -u)" = 0 ] || as_root=sudo; \
	  $$as_root apt-get -qq update && $$as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; fi

kills: $(VENV)/.tools  ## interrupt saves and count what is left: make kills N=500 SEED=7
	KANDINSKY22_KILLS=$(N) KANDINSKY22_KILLS_SEED=$(SEED) $(BIN)/python -m pytest -q -s tests/kills $(ARGS)

serve-kills: $(VENV)/.tools  ## kill the worker N times and the server N/2 times at random, and compare the pictures: make serve-kills N=20
	KANDINSKY22_SERVE_KILLS=$(or $(filter-out 1000,$(N)),20) KANDINSKY22_SERVE_SEED=$(SEED) \
	  $(BIN)/python -m pytest -q -s tests/serve -k many_kills $(ARGS)

serve-load: $(VENV)/.tools  ## send 400 jobs from 20 clients to a server
	KANDINSKY22_SERVE_LOAD=$(or $(filter-out 1000,$(N)),400) $(BIN)/python -m pytest -q -s tests/serve -k many_clients $(ARGS)

serve-latency: $(VENV)/.tools  ## measure what the server adds to a generation
	$(BIN)/python -m benchmarks.serve_latency $(ARGS)

studio: $(VENV)/.serve  ## open the studio in the browser
	@$(BIN)/kandinsky22 serve --open $(ARGS)
batch-kills: $(VENV)/.tools  ## kill a batch of ROWS rows N times and compare with an uninterrupted run: make batch-kills N=20 ROWS=2000
	$(BIN)/python -m tests.batch.kills --rows $(ROWS) --kills $(N) --seed $(SEED) $(ARGS)

batch-bench: $(VENV)/.tools  ## measure batches: one and two processes, batch sizes, memory over ROWS rows, the table of a million pictures
	$(BIN)/python -m benchmarks.batch_rates $(ARGS)
	$(BIN)/python -m benchmarks.batch_memory --rows $(ROWS)

fuzz: $(VENV)/.tools  ## generate calls, files and command lines, and report what escapes: make fuzz N=20000 SEED=1
	$(BIN)/python -m tests.fuzz --count $(N) --seed $(SEED) $(ARGS)

threads: $(VENV)/.tools  ## compare random parallel calls with serial ones: make threads N=1000 SEED=1
	KANDINSKY22_THREAD_CALLS=$(N) KANDINSKY22_THREAD_SEED=$(SEED) OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest tests/threads $(ARGS)

test-oldest:  ## run the tests of kernels and files with the oldest accepted packages, in .venv-oldest
	@$(PYTHON) -m venv .venv-oldest
	.venv-oldest/$(notdir $(BIN))/python -m pip --disable-pip-version-check --quiet install -c constraints-oldest.txt -e . pytest hypothesis
	KANDINSKY22_OLDEST=1 .venv-oldest/$(notdir $(BIN))/python -m pytest $(OLDEST_TESTS)

lint: $(VENV)/.tools  ## check style and spelling
	$(BIN)/python -m ruff check $(CHECKED)
	$(BIN)/python -m ruff format --check $(CHECKED)
	$(BIN)/python -m codespell_lib $(CHECKED) $(PROSE)
	$(BIN)/hadolint Dockerfile

format: $(VENV)/.tools  ## format the sources
	$(BIN)/python -m ruff check --fix $(CHECKED)
	$(BIN)/python -m ruff format $(CHECKED)

typecheck: $(VENV)/.tools  ## check types, strictly
	$(BIN)/python -m mypy

docs: $(VENV)/.tools  ## build the documentation into site/; look at it with: python3 -m http.server -d site
	$(BIN)/python docs/drawings/draw.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.tools  ## compare with the reference and OpenVINO at published size: 80 minutes, 24 GiB of memory, 16 GB of disk
	$(BIN)/python -m benchmarks.compare --folder $(BENCH) --towers full --make
	$(BIN)/python -m benchmarks.compare --folder $(BENCH) --towers full --dtype fp32 bf16 --minutes 18 \
	  --out $(BENCH)/result $(ARGS)
	$(BIN)/python -m benchmarks.commands --folder $(BENCH) --minutes 30 --out $(BENCH)/result/commands.json
	$(BIN)/python -m benchmarks.openvino_compare --folder $(BENCH) --out $(BENCH)/result/openvino.json

bench-commands: $(VENV)/.tools  ## measure whole commands at published size, and write docs/commands.md: 30 minutes
	$(BIN)/python -m benchmarks.commands --folder $(BENCH) --minutes 30 --out benchmarks/results/commands.json --docs $(ARGS)

judge: $(VENV)/.tools  ## measure how often the embedded model's pictures are right
	$(BIN)/python -m benchmarks.embedded_success
	$(BIN)/python -m benchmarks.embedded_modes

train-embedded: $(VENV)/.train  ## train the embedded model from scratch, or resume (hours)
	$(BIN)/python -m kandinsky22.training $(ARGS)

clean:  ## remove .venv, caches and the built documentation
	rm -rf $(VENV) .venv-oldest site .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python$(EXE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "kandinsky22 needs Python 3.10 or newer; select one with: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.package: pyproject.toml constraints.txt | $(BIN)/python$(EXE)
	@echo "installing kandinsky22 into $(VENV) (once; minutes on a slow line)"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.serve: pyproject.toml constraints.txt | $(VENV)/.package
	@$(PIP) install -c constraints.txt -e ".[serve]"
	@touch $@

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/.package
	@$(PIP) install -c constraints.txt -e ".[train]"
	@touch $@

$(VENV)/.tools: pyproject.toml constraints.txt | $(BIN)/python$(EXE)
	@echo "installing kandinsky22 and its test tools into $(VENV) (once; minutes on a slow line)"
	@$(PIP) install -c constraints.txt -e ".[test,bench,docs,dev]"
	@touch $(VENV)/.package $@
