# make setup   make .venv with the pinned requirements
# make run     set up, then train the three arms on the embedded phantom
# make test    set up, then run the tests
# make test-long   the others, in an hour: every network against PyTorch, kills, long runs
# make coverage   the core's tests, which run 95 % of its lines or more; a part of test-long
# make test-matrix   the core's tests and a short training on each of Python 3.11 to 3.13 that is installed
# make check   lint, format and types
# make docs    build the documentation into site/; DOCS_EXECUTE=false leaves the notebook unexecuted
# make tpu-check   compile the training step with the TPU compiler; no TPU is needed
# make clean   remove the environments

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TPU := build/tpu-check
TPU_CHECK ?=
CORE := inmerge_jax/merging/*,inmerge_jax/merging/backends/*

.PHONY: setup run test coverage test-long test-matrix check docs tpu-check clean

setup: $(READY)

run: $(READY)
	$(BIN)/python -m experiments.quickstart

# Files in their order: those with few tests, each of which is slow, are not left for the end.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

# Most of a test's time is XLA's. It compiles faster without these optimizations.
QUICK := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true
# JAX 0.11 and newer end at the first of these flags.
EMITTERS := import jaxlib; print("--xla_cpu_use_fusion_emitters=false \
  --xla_cpu_parallel_codegen_split_count=1" * (jaxlib.__version__ < "0.11"))

test: $(READY)
	XLA_FLAGS="$(QUICK) $$($(BIN)/python -c '$(EMITTERS)')" $(BIN)/python -m pytest -m "not long" --hypothesis-profile quick $(TWO)

# Counting lines takes a third of a test's time, so `test` goes without.
coverage: $(READY)
	$(BIN)/python -m pytest -m "not long" $(TWO) --cov=inmerge_jax --cov-report= tests/core
	$(BIN)/python -m coverage report --include=$(CORE) --fail-under=95

test-long: $(READY) coverage
	$(BIN)/python -m pytest -m long $(TWO)

# On each Python: the core's tests and a short training, with the versions that requirements.txt pins
# for it. PyTorch, medmnist and TensorFlow's data sets are for other tests and are left out.
MATRIX ?= 3.11 3.12 3.13
MATRIX_TESTS := tests/core
MATRIX_PACKAGES := jax flax optax orbax-checkpoint numpy scipy scikit-learn safetensors rich tyro \
  filelock matplotlib jinja2 dm-haiku equinox hypothesis pytest pytest-timeout pytest-xdist
MATRIX_TRAINING := --size 16 --phantom.train 256 --model vgg11_bn --width 0.125 --skip 3 \
  --threshold 0 --batch-size 32 --epochs 2 --merging-epochs 1 --devices 1 --overwrite

test-matrix: $(MATRIX:%=matrix-%)

matrix-%:
	@python=$$(.ci/find-python $*) || { echo "skipped on Python $*: $$python"; exit 0; }; \
	$(MAKE) --no-print-directory PYTHON="$$python" build/matrix/$*/.ready && \
	XLA_FLAGS="$(QUICK)" build/matrix/$*/bin/python -m pytest -m "not long" $(TWO) $(MATRIX_TESTS) && \
	build/matrix/$*/bin/python -m experiments.train $(MATRIX_TRAINING) --output runs/matrix-$*

build/matrix/%/.ready: requirements.txt Makefile
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint requirements.txt $(MATRIX_PACKAGES)
	touch $@

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Warnings are errors. MkDocs' own notice about a later major version is no warning of this site.
docs: $(VENV)/.ready-docs
	$(BIN)/python -m experiments.tables --figures docs/figures/results
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict

$(VENV)/.ready-docs: requirements-docs.txt $(READY)
	$(BIN)/python -m pip install --quiet --constraint requirements.txt --requirement requirements-docs.txt
	touch $@

tpu-check: $(READY) $(TPU)/.ready
	PYTHONPATH=$(TPU) $(BIN)/python -m experiments.benchmarks.tpu.check $(TPU_CHECK)

# In a folder of its own: with libtpu in .venv, every start of JAX looks for a TPU and says so.
$(TPU)/.ready: requirements-tpu-check.txt | $(READY)
	rm -rf $(TPU)
	$(BIN)/python -m pip install --quiet --no-deps --target $(TPU) --requirement requirements-tpu-check.txt
	touch $@

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11; choose another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(READY)

clean:
	rm -rf $(VENV) build/matrix
