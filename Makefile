# Each target makes what it needs. PYTHON=python3.12 make ... picks another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Memory in large pages: a training step on CPU takes a quarter less time (glibc; elsewhere it means nothing).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help env test check demo bench clean

help:            ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 10

env: $(STAMP)    ## the environment, in .venv
$(STAMP): requirements.txt requirements-cucim.txt requirements-export.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: PYTHON=python3.11 make env")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-export.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-cucim.txt || echo "cuCIM is not available here: slides will be read by OpenSlide, slower"
	@touch $@

# One process of tests for each core, up to four; a file's tests stay together, because they share what they compiled.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

test: env        ## every test
	$(PYTEST)

check: env       ## lint, types, tests (stops at the first failure)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -x

demo: env        ## slides, training, prediction, report: runs/demo/report.html
	$(BIN)/python -m experiments.demo --workdir=runs/demo

bench: env       ## the table of BENCHMARKS.md
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-bench.txt
	$(BIN)/python -m experiments.benchmark

clean:           ## removes the environment and caches (not runs/)
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
