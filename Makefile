# make setup   make .venv with the pinned requirements
# make run     set up, then train the three arms on the embedded phantom
# make test    set up, then run the tests
# make test-long   the others, in half an hour: every network against PyTorch, kills, long runs
# make check   lint, format and types
# make tpu-check   compile the training step with the TPU compiler; no TPU is needed
# make clean   remove the environment

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TPU := build/tpu-check
TPU_CHECK ?=
CORE := inmerge_jax/merging/*

# Counting lines takes a third of a test's time, so the rest of the tests go without.
OF_CORE := tests/core

.PHONY: setup run test test-long check tpu-check clean

setup: $(READY)

run: $(READY)
	$(BIN)/python -m experiments.quickstart

test: $(READY)
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile --cov=inmerge_jax --cov-report= $(OF_CORE)
	$(BIN)/python -m coverage report --include=$(CORE) --fail-under=95
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile $(patsubst %,--ignore=%,$(OF_CORE))

test-long: $(READY)
	$(BIN)/python -m pytest -m long -n 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tpu-check: $(READY) $(TPU)/.ready
	PYTHONPATH=$(TPU) $(BIN)/python -m experiments.tpu_check $(TPU_CHECK)

# In a folder of its own: with libtpu in .venv, every start of JAX looks for a TPU and says so.
$(TPU)/.ready: requirements-tpu-check.txt | $(READY)
	rm -rf $(TPU)
	$(BIN)/python -m pip install --quiet --no-deps --target $(TPU) --requirement requirements-tpu-check.txt
	touch $@

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11; choose another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $(READY)

clean:
	rm -rf $(VENV)
