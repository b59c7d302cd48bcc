PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test lint run

install: $(BIN)/python

$(BIN)/python: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[bench,test]'

test: install
	$(BIN)/pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

run: install
	$(BIN)/python run.py method=lors sparsity=0.5

# Does the embedded model show the effects? The table goes to runs/margins/margins.md.
.PHONY: margins
margins: install
	$(BIN)/python run.py -m experiment=margins
	$(BIN)/python -m analysis margins runs/margins
