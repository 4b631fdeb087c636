# make setup   make .venv with the pinned requirements
# make run     set up, then train the three arms on the embedded phantom
# make test    set up, then run the tests
# make test-long   the others, in half an hour: every network against PyTorch, kills, long runs
# make test-matrix   the core's tests on each newer Python that is installed, with the newest JAX for it
# make check   lint, format and types
# make tpu-check   compile the training step with the TPU compiler; no TPU is needed
# make clean   remove the environment

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TPU := build/tpu-check
TPU_CHECK ?=
CORE := inmerge_jax/merging/*,inmerge_jax/merging/backends/*

# Counting lines takes a third of a test's time, so the rest of the tests go without.
OF_CORE := tests/core

.PHONY: setup run test test-long test-matrix check tpu-check clean

setup: $(READY)

run: $(READY)
	$(BIN)/python -m experiments.quickstart

test: $(READY)
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile --cov=inmerge_jax --cov-report= $(OF_CORE)
	$(BIN)/python -m coverage report --include=$(CORE) --fail-under=95
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile $(patsubst %,--ignore=%,$(OF_CORE))

test-long: $(READY)
	$(BIN)/python -m pytest -m long -n 2 --dist loadfile

# What the core's tests import; nothing is pinned, so that a new release that breaks the core is seen.
MATRIX ?= python3.12 python3.13
MATRIX_PACKAGES := jax flax optax orbax-checkpoint numpy scipy scikit-learn safetensors rich \
  dm-haiku equinox hypothesis pytest pytest-timeout pytest-xdist

test-matrix:
	@for python in $(MATRIX); do \
	  version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || \
	    { echo "skipped: $$python is not installed"; continue; }; \
	  bin=build/matrix/$$version/bin; \
	  $$python -m venv build/matrix/$$version && \
	  $$bin/python -m pip install --quiet $(MATRIX_PACKAGES) && \
	  $$bin/python -m pytest -m "not long" -n 2 tests/core || exit 1; \
	done

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
