# The accelerator to install for: found by itself, or named (make run ACCEL=cpu).
ACCEL ?=
ifeq ($(strip $(ACCEL)),)
override ACCEL := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo cuda || echo cpu)
endif
PYTHON ?=
ARGS ?=
EXPERIMENT ?= movie_reviews
FAST := tests/records tests/methods tests/tasks $(addprefix tests/whole/test_,rooms.py layers.py pins.py old_runs.py)
PY := .venv/bin/python
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

export ACCEL PYTHON
# pyright otherwise asks the network for newer versions of itself.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help setup prepare run test test-fast test-slow lint format lock wheel clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  ACCEL=cpu|cuda  what to install for (here: $(ACCEL))"
	@echo "  PYTHON=...      the Python (3.11 to 3.13) to make .venv with"
	@echo "  EXPERIMENT=...  what to run, a file of conf/experiment (here: $(EXPERIMENT); null for the plain defaults)"
	@echo "  ARGS=...        passed on, e.g. make run ARGS='run.steps=50' or make test ARGS='-k journal'"

setup: ## create .venv with the pinned packages (about 4 minutes; nothing to do the second time)
	@bash scripts/setup.sh

prepare: setup ## put the model and the data into the cache (once)
	@$(PY) -m zoray.prepare

run: prepare ## tune SmolLM2-135M on movie reviews: the main job
	$(PY) -m zoray.launch $(if $(filter-out null,$(EXPERIMENT)),$(if $(findstring run.resume=,$(ARGS)),,experiment=$(EXPERIMENT))) $(ARGS)

test: prepare ## ruff, pyright, and the tests but those of make test-slow
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright
	$(PYTEST) -m "not slow" $(ARGS)

test-fast: setup ## the tests of the pure rooms, and of the house itself: no engine, no cluster, no server
	$(PYTEST) -m "not slow" $(FAST) $(ARGS)

test-slow: prepare ## the tests that take minutes: everything dies, odd requests by the thousand, a million lines
	$(PYTEST) -m slow --timeout 900 $(ARGS)

lint: setup ## ruff and pyright, without the tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: setup ## let ruff fix and format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

lock: ## pin the requirements anew with uv (ARGS=--upgrade moves every pin)
	@bash scripts/lock.sh $(ARGS)

wheel: setup ## build the wheel into dist/
	$(PY) -m build --wheel --no-isolation

clean: ## remove build output and tool caches; keeps .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
