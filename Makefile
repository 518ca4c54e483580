# `make demo` and `make check` are all a fresh clone needs: Python >= 3.10 and make.
# `make gpu` and `make bench` want a CUDA device; PY=python3 runs any target in that Python as it
# is, without a virtual environment.

PYTHON ?= python3
VENV ?= .venv
PY ?= $(VENV)/bin/python
STAMP := $(if $(filter command line environment,$(origin PY)),,$(VENV)/.installed)

# PyPI's torch for Linux carries 2 GB of CUDA libraries: TORCH_INDEX=URL of PyTorch's own index of
# CPU builds takes the small one instead (pip's own settings do, too)
TORCH_INDEX ?=

MODEL := examples/models/llama-stories-4m
ARTIFACT := demo-artifact
PROMPT := Tell me a story about a dog.

# tests that compile kernels for GPUs that are not there: impossible where Triton interprets
AOT_TESTS := $(wildcard tests/codegen/test_aot*.py)
PYTEST := $(PY) -m pytest
BIN := $(dir $(PY))

.PHONY: demo check lint test slow gpu bench clean

demo: $(STAMP)
	$(PY) -m qoqc compile $(MODEL) -o $(ARTIFACT) --force
	$(PY) -m qoqc chat $(ARTIFACT) --prompt "$(PROMPT)" --seed 1 --temperature 0.3

check: lint test

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(BIN)lint-imports

test: $(STAMP)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist worksteal -m "not gpu and not slow" \
		$(addprefix --ignore=,$(AOT_TESTS))
	$(if $(AOT_TESTS),TRITON_INTERPRET=0 $(PYTEST) -m "not gpu and not slow" $(AOT_TESTS))

slow: $(STAMP)
	TRITON_INTERPRET=1 $(PYTEST) -m slow

gpu: $(STAMP)
	$(PYTEST) -m gpu
	$(PY) examples/chat.py $(MODEL)

bench: $(STAMP)
	$(PY) -m qoqc bench --shape llama-3-8b --batch 1,64 --breakdown 1,64 --prefill 8x1024

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt \
		$(addprefix --extra-index-url ,$(TORCH_INDEX)) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(ARTIFACT)
