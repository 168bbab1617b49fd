PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The same number of threads everywhere: the tests compare floating-point results.
TESTENV := OMP_NUM_THREADS=2 TOKENIZERS_PARALLELISM=false

LLAMA := .llama
TPU := .venv-tpu

.PHONY: quickstart rlhf-demo test test-fast test-exhaustive test-gpu verify-gguf setup-tpu test-tpu lint notebooks format setup clean help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) scripts/setup.sh $(VENV)

setup: $(VENV)/.ready  ## build .venv

quickstart: $(VENV)/.ready  ## QLoRA of the real Gemma 3 270M on this machine's CPU
	$(BIN)/gemma-tune sft recipes/quickstart.yaml --resume auto

rlhf-demo: $(VENV)/.ready  ## SFT, two reward models and PPO, on the same Gemma and CPU (docs/rlhf.md)
	$(BIN)/gemma-tune sft recipes/quickstart.yaml --resume auto
	$(BIN)/gemma-tune reward recipes/demo_reward_first.yaml --resume auto
	$(BIN)/gemma-tune reward recipes/demo_reward_second.yaml --resume auto
	$(BIN)/gemma-tune ppo recipes/demo_ppo.yaml --resume auto

test: lint  ## everything that CI runs
	$(TESTENV) $(BIN)/python -m pytest -q --durations=15

test-fast: $(VENV)/.ready  ## under two minutes, no real model
	$(TESTENV) $(BIN)/python -m pytest -q tests/unit

test-exhaustive: $(VENV)/.ready  ## kills a run before each of its file operations; ten minutes
	$(TESTENV) $(BIN)/python -m pytest -q -m exhaustive tests

test-gpu: $(VENV)/.ready  ## on a CUDA machine: training, memory and speed there
	$(BIN)/python -m pytest -q -s -m gpu tests/gpu

# Beside the environment, not in it: the other tests must pass without llama.cpp.
$(LLAMA)/.ready: $(VENV)/.ready
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --upgrade --no-deps --target $(LLAMA) \
		llama-cpp-python==0.3.36 diskcache
	touch $@

verify-gguf: $(LLAMA)/.ready  ## GGUF files in llama.cpp itself; builds it first (5 minutes), with runs/quickstart if there
	PYTHONPATH=$(LLAMA) $(if $(wildcard runs/quickstart/adapter),GEMMA_TUNE_TEST_RUN=runs/quickstart) \
		$(BIN)/python -m pytest -q -s -m llama tests/llama

# Beside the other one: no environment can hold both (pyproject.toml, dependency-groups).
$(TPU)/.ready: pyproject.toml constraints-tpu.txt scripts/setup_tpu.sh
	PYTHON=$(PYTHON) scripts/setup_tpu.sh $(TPU)

setup-tpu: $(TPU)/.ready  ## build .venv-tpu (JAX, tunix, qwix); LIBTPU=1 on a TPU, and to compile for one

test-tpu: $(VENV)/.ready $(TPU)/.ready  ## SFT in JAX on eight simulated chips, held against torch
	$(TESTENV) $(BIN)/python -m pytest -q -s -m tpu tests/tpu

lint: $(VENV)/.ready  ## style, types and the floors of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

notebooks: $(VENV)/.ready  ## recipes/notebooks/*.ipynb from their sources
	$(BIN)/python scripts/notebooks.py

format: $(VENV)/.ready  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) $(TPU) $(LLAMA) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
