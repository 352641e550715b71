# Every target sets itself up: a fresh machine needs Python 3.11 or later and a package index.
PYTHON ?= python3
BIN := .venv/bin
# Without an NVIDIA GPU, torch as pinned in constraints-cpu.txt; with one, whatever pip finds best.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c constraints-cpu.txt")
# Two workers of one thread each are faster than one of two for models this small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

.PHONY: demo test check docs clean

demo: .venv/ready
	$(BIN)/shearling demo --out demo

test: .venv/tools
	$(PYTEST)

check: .venv/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST) -m "not slow"

# Proves the tables that have changed, then writes docs/families.md and README's list of models.
docs: .venv/ready
	$(BIN)/python benchmarks/conformance.py
	$(BIN)/python docs/generate.py

.venv/ready: pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e .
	@touch $@

.venv/tools: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info
