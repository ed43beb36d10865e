# Everything runs in .venv, which the first target that needs it makes. Another interpreter: make venv PYTHON=python3.12
PYTHON ?= python3
PY := .venv/bin/python

# On a machine without a CUDA GPU this is the version tested. Installed first and by itself, so that nothing below picks
# another one. On a GPU machine: make venv TORCH=torch==2.11.0
TORCH ?= torch==2.13.0

# Two cores, several processes: threads that spin while they wait made one generation four times slower.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

SOURCES := megatron_bupo tests setup.py $(wildcard benchmarks checkpoint_converters examples tools)

.DEFAULT_GOAL := help
.PHONY: help venv sglang-env slurm demo test test-unit test-parallel lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: .venv/.installed ## make .venv and install into it (minutes; nothing to do when it is there)

# The stamp is newer than setup.py exactly when the requirements in it are installed.
.venv/.installed: setup.py
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --editable '.[dev,sglang]'
	touch $@

sglang-env: venv ## SGLang for machines without a GPU, in .venv-sglang (3 GB, two minutes; nothing to do when it is there)
	$(PY) tools/sglang_env.py --output .venv-sglang

slurm: ## what the tests of the Slurm scripts need: Debian's packages, where root may install them
	bash tools/install_slurm.sh

demo: venv ## the main job on a small model: BuPO in two processes, GRPO from the same start, a figure
	$(PY) examples/demo.py

test: lint sglang-env slurm ## lint, then all tests
	$(PY) -m pytest tests -q --durations=15

test-unit: venv ## the quick tests
	$(PY) -m pytest tests/unit -q

test-parallel: venv ## the tests that start several processes
	$(PY) -m pytest tests/parallel -q

lint: venv ## format, lint and types, checked
	$(PY) -m ruff format --check --quiet $(SOURCES)
	$(PY) -m ruff check --quiet $(SOURCES)
	$(PY) -m mypy megatron_bupo

format: venv ## format and sort the sources
	$(PY) -m ruff format $(SOURCES)
	$(PY) -m ruff check --fix $(SOURCES)

clean: ## remove caches and runs; .venv and models stay
	rm -rf build runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +
