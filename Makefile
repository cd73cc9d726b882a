# demo and test each work from a fresh clone: they set up $(VENV) when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint bench aot
.DELETE_ON_ERROR:

demo: $(READY)  ## the whole loop on this machine, ending in a report
	$(BIN)/roro quickstart

test: $(READY)  ## all tests
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m roro_fast.eval.tables README.md --check

bench: $(READY)  ## every benchmark in bench/ops and bench/e2e
	@set -e; found=; for f in bench/ops/bench_*.py bench/e2e/bench_*.py; do \
		[ -e "$$f" ] || continue; found=1; echo "== $$f"; $(BIN)/python "$$f"; done; \
	[ -n "$$found" ] || echo "bench: no bench_*.py in bench/ops or bench/e2e"

NVCC ?= nvcc
CUDA_SOURCES := $(wildcard csrc/cuda/*.cu)
TRITON_SOURCES := $(wildcard kernels/*.py)

aot: $(CUDA_SOURCES:csrc/cuda/%.cu=build/aot/%.o)  ## GPU kernels, compiled without a GPU; a register spill is an error
	@if [ -n "$(TRITON_SOURCES)" ]; then \
		echo "aot: no ahead-of-time driver for Triton yet, not compiled: $(TRITON_SOURCES)" >&2; exit 1; fi
	@[ -n "$(CUDA_SOURCES)" ] || echo "aot: no .cu in csrc/cuda and no .py in kernels: nothing to compile"

build/aot/%.o: csrc/cuda/%.cu
	@mkdir -p $(@D)
	$(NVCC) -O3 -std=c++17 -Xcompiler -fPIC -lineinfo -Xptxas -v,-warn-spills,--warning-as-error \
		-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90 -c $< -o $@

$(READY): pyproject.toml setup.py constraints-cpu.txt $(wildcard csrc/*.cpp csrc/host/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "roro_fast needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo 'setting up $(VENV): a few minutes, most of it torch'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints-cpu.txt -e '.[dev]'
	@$(BIN)/python -c 'from roro_fast.engine.pages import HAVE_NATIVE as n; print("host structures:", "native" if n else "Python (no C++ compiler at install)")'
	@touch $@
