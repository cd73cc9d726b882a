# demo and test each work from a fresh clone: they set up $(VENV) when it is missing.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV := $(VENV)/.ready-dev

.PHONY: demo test lint bench aot
.DELETE_ON_ERROR:

demo: $(READY)  ## the whole loop on this machine, ending in a report
	$(BIN)/roro quickstart

test: $(DEV)  ## all tests, in $(WORKERS) processes; WORKERS=0: in one
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m roro_fast.eval.tables README.md --check

bench: $(READY)  ## every benchmark in bench/ops and bench/e2e; minutes of a quiet machine
	@set -e; for f in bench/ops/bench_*.py bench/e2e/bench_*.py bench/e2e/rollout.py bench/e2e/scaling.py; do \
		echo "== $$f"; $(BIN)/python -m "$$(echo $${f%.py} | tr / .)"; done

aot: $(DEV)  ## GPU kernels, Triton and CUDA, compiled without a GPU; spills and misfits are errors
	$(BIN)/python -m bench.aot

# The extensions are built against the torch that runs them, not against a second one in a build environment.
PIP = $(BIN)/python -m pip install --disable-pip-version-check -q

SOURCES := pyproject.toml setup.py constraints-cpu.txt $(wildcard csrc/*.cpp csrc/*.h csrc/host/* csrc/cpu/*)

define set-up  # extras to install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "roro_fast needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo 'setting up $(VENV): a few minutes, most of it torch'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints-cpu.txt torch setuptools pybind11 wheel
	$(PIP) -c constraints-cpu.txt --no-build-isolation -e '.$(1)'
	@$(BIN)/python -c 'from roro_fast.engine.pages import HAVE_NATIVE as n; print("host structures:", "native" if n else "Python (no C++ compiler at install)")'
	@$(BIN)/python -c 'from roro_fast.ops import native as n; print("CPU kernels:", "native, " + n.isa() if n.available() else n.why_not())'
endef

$(READY): $(SOURCES)
	$(call set-up)
	@touch $@

$(DEV): $(SOURCES)
	$(call set-up,[dev])
	@touch $(READY) $@
