# Every target sets up what it needs: a virtual environment, torch, this package with its extension.
# Use another interpreter with PYTHON=python3.12, or an environment you already have with VENV=path;
# a torch found in that environment is left alone.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
OUT ?= benchmarks/results

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/.pad-kernels
PIN_TORCH = $(BIN)/python -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' \
	> $(STAMPS)/torch-pin
NATIVE := pyproject.toml $(wildcard setup.py) $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo miniature test check-kernels check-native coverage bench gpu-check lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "  ARGS='...' is handed on, for example: make test ARGS='-k sequence -x'"

demo: $(STAMPS)/demo ## distil preferences into a small model on this machine and write a report
	$(BIN)/pad-kernels demo $(ARGS)

miniature: $(STAMPS)/train ## compare all methods on a task with a known reward, 5 seeds; resumes
	$(BIN)/python -m examples.miniature $(ARGS)

test: $(STAMPS)/dev $(STAMPS)/demo ## run the whole test suite
	$(BIN)/python -m pytest $(ARGS)

check-kernels: $(STAMPS)/dev ## compile every GPU kernel for every device and read its machine code
	PAD_KERNELS_CUBINS=all $(BIN)/python -m pytest tests/test_triton_cubins.py tests/test_triton_fused.py tests/test_cuda_build.py $(ARGS)

check-native: $(STAMPS)/dev ## run the C++ and CUDA sources on a CPU under compiler sanitizers
	PAD_KERNELS_SANITIZE=all $(BIN)/python -m pytest tests/test_sanitizers.py tests/test_row_bounds.py $(ARGS)

coverage: $(STAMPS)/dev $(STAMPS)/demo ## run the suite and fail below 95 % of the package's lines
	$(BIN)/python -m pytest --cov --cov-report=term --cov-fail-under=95 $(ARGS)

bench: $(STAMPS)/bench $(STAMPS)/peers ## measure against the GEMM floor and the peers; table, JSON, plots
	$(BIN)/pad-kernels bench --out $(OUT) $(ARGS)

# With the machine's own Python, torch and Triton, which have to fit its driver: no environment is
# made and nothing is fetched. STAGE=build|parity|sanitize|bench for one, FRESH=1 to start over.
gpu-check: ## build, check and measure on the GPU of this machine; resumes, prints a table last
	$(PYTHON) benchmarks/gpu_check $(if $(STAGE),--stage $(STAGE)) $(if $(FRESH),--fresh) \
		$(if $(filter-out file,$(origin OUT)),--out $(OUT)) $(ARGS)

lint: $(STAMPS)/dev ## ruff, ruff format, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(STAMPS)/dev ## let ruff and clang-format rewrite what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format -i

clean: ## remove the environment, the built extension and caches
	rm -rf $(VENV) build dist *.egg-info bench-results .pytest_cache .mypy_cache .ruff_cache .coverage
	rm -f pad_kernels/_C*.so pad_kernels/_cuda*.so pad_kernels/_*_build.txt

$(BIN)/python:
	@echo "== virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: nothing that follows may choose or replace it.
$(STAMPS)/torch: constraints.txt | $(BIN)/python
	@mkdir -p $(STAMPS)
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
		{ echo "== torch, from constraints.txt"; $(PIP) install --constraint constraints.txt torch; }
	@touch $@

# The package is installed in place, so Python sources need no second installation; csrc does.
$(STAMPS)/package: $(NATIVE) $(STAMPS)/torch
	@echo "== pad-kernels and its extension"
	$(PIP) install --quiet --editable .
	@touch $@

# Extras of the package that is already installed: pip adds what is missing and rebuilds nothing.
$(STAMPS)/dev $(STAMPS)/demo $(STAMPS)/bench $(STAMPS)/train: $(STAMPS)/%: pyproject.toml $(STAMPS)/package
	@echo "== what '$*' needs"
	@$(PIN_TORCH)
	$(PIP) install --quiet --constraint $(STAMPS)/torch-pin 'pad-kernels[$*]'
	@touch $@

# Peers are optional: where one has no build for this machine the benchmark lists it as missing.
$(STAMPS)/peers: pyproject.toml $(STAMPS)/package
	@echo "== peers to compare with"
	@$(PIN_TORCH)
	-$(PIP) install --quiet --constraint $(STAMPS)/torch-pin 'pad-kernels[peers]'
	@touch $@
