# make study         trains, measures and writes study/report.html
# make test          every test
# make lint          style, types and the direction of imports
# make bench         layers and networks against their peers, about 25 minutes; make bench-quick: a part of it, two minutes
# make test-gpu      what a GPU alone can show; make bench-gpu: against PyTorch and torch.compile there, eight minutes
# make clean         removes what these made
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Twice quiet: errors only. What is being installed, and why it takes a while, the targets say themselves.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
# .venv also takes on what an older checkout of these two files asked for.
NEEDS := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: study test lint clean
.DELETE_ON_ERROR:

study: $(VENV)/.package
	$(BIN)/batchnorm study --out study

test: $(VENV)/.package $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.package $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist study .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "batchnorm needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: $(NEEDS) | $(BIN)/python
	@echo "Installing batchnorm and what it needs into $(VENV) (PyTorch is large: minutes on a slow line)"
	@$(PIP) --editable .
	@touch $@

# What an extra of the installed package asks for; installing the package again would compile its core again.
$(VENV)/.%: $(NEEDS) $(VENV)/.package
	@echo "Installing what 'make $*' needs"
	@$(BIN)/python -c 'import importlib.metadata as m, re; \
		print(*(re.split("; extra| and extra", r)[0] for r in m.requires("batchnorm") if "$*" in r.partition("extra == ")[2]), sep="\n")' > $@-needs
	@$(PIP) --requirement $@-needs
	@touch $@

.PHONY: bench bench-quick
bench bench-quick: $(VENV)/.package $(VENV)/.bench
	$(BIN)/python benchmarks/bench.py $(if $(filter bench-quick,$@),--quick)

# On a machine with a GPU, with the PyTorch and Triton that its Python has: nothing is installed.
.PHONY: test-gpu bench-gpu
test-gpu:
	PYTHONPATH=src TRITON_INTERPRET=0 $(PYTHON) -m pytest -q tests/gpu
bench-gpu:
	PYTHONPATH=src TRITON_INTERPRET=0 $(PYTHON) benchmarks/gpu.py
