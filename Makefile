# Everything runs in .venv, which the first target that needs it makes from the versions in constraints.txt; only the
# benchmark has an environment of its own, for the packages that it compares with.
#   make quickstart PYTHON=python3.12        another interpreter (the pins need Python 3.11 or newer)
#   make quickstart PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"     torch without CUDA
#   make test PYTEST_ARGS="-k schedules"     part of the tests, in one process (the default is three: many tests wait)

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?= -n 3 --dist worksteal
BIN := .venv/bin

# `accelerate launch` gives a process one CPU thread unless told otherwise. Recursive (=), so that it is asked only in use.
THREADS ?= $(or $(OMP_NUM_THREADS),$(shell $(BIN)/python -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())"))

# The quickstart and the tests need nothing from the hub, and say so here; HF_HUB_OFFLINE=0 lifts it.
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast test-package measures soak benchmark compare docs lint format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

quickstart: .venv/.examples ## train a small model on the Python standard library, then evaluate raw and averaged weights
	rm -rf runs/quickstart
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(THREADS) examples/run_clm.py configs/quickstart.yaml
	$(BIN)/python examples/evaluate_clm.py runs/quickstart

test: lint ## lint, type-check, then run the whole test suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: .venv/.dev ## run the tests that start no process
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not launches"

test-package: .venv/.dev ## build sdist and wheel, install them elsewhere, and train there (a part of make test)
	$(BIN)/python -m pytest tests/test_packaging.py

measures: .venv/.dev ## count lines, files, overrides, private names and words (tests/measures.py -v tells where)
	@$(BIN)/python tests/measures.py

docs: .venv/.dev ## write docs/flags.md and the drawing in docs/development.md from the code
	$(BIN)/python docs/generate.py

KILLS ?= 50
SOAK_ARGS ?=
soak: .venv/.dev ## kill trainings at 50 random moments (KILLS=..., SOAK_ARGS="--processes 2 --backend fsdp2"), compare with twins
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python tests/faults/kills.py --kills $(KILLS) $(SOAK_ARGS)

BENCHMARK_FLAGS ?=
benchmark: .venv-benchmark/.installed ## cost of steps, averages, trainings beside other packages (BENCHMARK_FLAGS="--quick")
	.venv-benchmark/bin/python benchmarks/benchmark.py --json runs/benchmark.json --figure runs/benchmark.png $(BENCHMARK_FLAGS)

COMPARE_FLAGS ?=
compare: .venv/.examples ## train AdamW with a cosine and five ways of RAdam, tuned (100 minutes; COMPARE_FLAGS="--quick": 8)
	$(BIN)/python benchmarks/compare_methods.py $(COMPARE_FLAGS)

lint: .venv/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environments and caches; runs/ stays
	rm -rf .venv .venv-benchmark .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python .venv-benchmark/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
		echo "$(PYTHON) is older than Python 3.11, which the versions in constraints.txt need: make PYTHON=python3.12 ..." >&2; exit 2; }
	@# A half-made environment would look finished to the next run.
	$(PYTHON) -m venv $(@:/bin/python=) || { rm -rf $(@:/bin/python=); exit 1; }

# A stamp per set of extras: written only after pip succeeded, older than the files that decide what is installed.
.venv/.examples: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the pinned packages into .venv (minutes on the first run)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[examples,plots]"
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the pinned packages into .venv (minutes on the first run)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[examples,plots,test,trl,dev]"
	@touch $@

# timm's average needs only torch, but `import timm` a torchvision that fits the build of torch: it comes alone.
.venv-benchmark/.installed: pyproject.toml constraints.txt | .venv-benchmark/bin/python
	@echo "Installing the pinned packages into .venv-benchmark (minutes on the first run)"
	.venv-benchmark/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[benchmark]"
	.venv-benchmark/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt --no-deps timm
	@touch $@
