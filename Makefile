# Everything runs inside .venv, which is made on first use and renewed when the project's requirements change.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-integration test-slow lint format bench docs models strategies build clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## Pretrain, finetune, analyse and report on a small language model (about 4 minutes)
	$(BIN)/goldy demo

# Workers, and the processes that tests start, read the bytecode that one of them compiled.
test: $(READY)  ## Run the fast tests and all doctests (below 5 minutes on 2 CPU cores)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile -q $(ARGS)

test-integration: $(READY)  ## Run the tests of processes, whole commands, whole trainings and the docs' blocks
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile -q -m integration $(ARGS)

test-slow: $(READY)  ## Run the tests that take longer
	$(BIN)/python -m pytest -q -m slow $(ARGS)

lint: $(READY)  ## Check style, formatting, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/house.py

format: $(READY)  ## Apply style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## Print speed and memory ratios against naive references
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

docs: $(READY)  ## Build the documentation into site/
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

build: $(READY)  ## Build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

models: $(READY)  ## Renew docs/models.md, the table of what works on which family
	$(BIN)/python -m tests.references.models_table

strategies: $(READY)  ## Renew docs/strategies.md, the table of what works under which strategy (some minutes)
	$(BIN)/python -m tests.references.strategies_table

clean:  ## Remove the environment and everything generated
	rm -rf $(VENV) dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
