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
SWEEP = $(BIN)/python run.py -m experiment=margins
.PHONY: margins
margins: install
	$(SWEEP) method=none prune=wanda,sparsegpt,magnitude sparsity=0.5,0.6,0.7
	$(SWEEP) method=none prune=wanda,sparsegpt,magnitude pattern=2:4
	$(SWEEP) method=lors prune=none sparsity=0 seed=0,1,2
	$(SWEEP) method=lors sparsity=0.5,0.7 seed=0,1,2
	$(SWEEP) method=lors pattern=2:4 seed=0,1,2
	$(BIN)/python -m analysis margins runs/margins
