# Everything runs in .venv, which the first target that needs it creates. Pip's own environment variables are honoured.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
CONSTRAINTS := constraints.txt
EXTRAS := dev,demo,st
ARGS ?=

.PHONY: demo test test-portable test-floor test-newest test-wheel test-tools compatibility page-of-compatibility
.PHONY: lint docs bench bench-methods readme stubs notebooks examples clean

demo: $(READY)
	$(VENV)/bin/bioadapt demo $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(ARGS)

# As other processors would run it: without vector kernels and with products summed as on any x86-64, then with those
# of half the width. ARGS="-m rounding" takes the tests that hang on it most.
test-portable: $(READY)
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE $(MAKE) test
	ATEN_CPU_CAPABILITY=avx2 $(MAKE) test

# The parts that lean on other libraries, in environments of their own: with the lowest versions that are promised, and
# with the newest that the promised ranges allow.
LEANING := tests/tuner tests/methods tests/test_conformance.py tests/test_saved_adapters.py
test-floor:
	$(MAKE) test VENV=.venv-floor CONSTRAINTS=constraints-floor.txt EXTRAS=circuits,search,suite ARGS="$(LEANING) $(ARGS)"

test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=/dev/null EXTRAS=circuits,search,suite ARGS="$(LEANING) $(ARGS)"

# The page of what works with what, from a run of the tests behind it, in an environment that has the quantisers too.
compatibility:
	$(MAKE) page-of-compatibility VENV=.venv-compatibility EXTRAS=dev,demo,st,tools

page-of-compatibility: $(READY)
	$(PY) scripts/compatibility.py $(ARGS)

# The wheel in empty environments, without extras and with each of them; ARGS="none search" takes some.
test-wheel:
	$(PYTHON) scripts/check_wheel.py $(ARGS)

# The examples and tests that other people's tools take part in, which are installed for it.
test-tools: $(READY)
	$(PY) -m pip install --quiet --constraint $(CONSTRAINTS) "lm-eval[hf]" mteb onnx onnxruntime onnxscript
	$(PY) -m pytest -q tests/test_examples.py tests/environment/test_tools.py \
	  -k "lm_harness or text_benchmark or merge_convert_distil or onnx" $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: $(READY)
	$(PY) benchmarks/primitives.py $(ARGS)

bench-methods: $(READY)
	$(PY) benchmarks/methods.py $(ARGS)

readme: $(READY)
	$(PY) scripts/readme_table.py

# What editors and type checkers read of functions that are made from the registry.
stubs: $(READY)
	$(PY) scripts/stubs.py

notebooks: $(READY)
	$(PY) scripts/notebooks.py

# All examples in full, which takes an hour or so; ARGS="retrieval images" takes some.
examples: $(READY)
	$(PY) scripts/run_examples.py $(ARGS)

clean:
	rm -rf .venv .venv-floor .venv-newest .venv-compatibility

# The stamp is written last: an interrupted installation is taken up again.
$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bioadapt needs Python 3.11 or newer; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time this takes some minutes."
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	touch $@
