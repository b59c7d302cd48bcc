PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test lint docs run margins oldest

install: $(BIN)/python

$(BIN)/python: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[bench,test,docs]'

test: install
	$(BIN)/pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Fills the generated blocks of README.md and docs/, then builds the site into site/.
docs: install
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

run: install
	$(BIN)/python run.py method=lors sparsity=0.5

# Does the embedded model show the effects? The tables go to runs/margins/margins.md.
margins: install
	$(BIN)/python run.py -m experiment=margins
	$(BIN)/python -m analysis margins runs/margins

# The library's tests with the oldest torch, transformers and peft that pyproject.toml declares.
oldest:
	.ci/oldest
