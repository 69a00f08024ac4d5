# make demo     install, run the quickstart, say where its report is
# make test     install what the tests need, run them
# make check    linters, types, import floors, and that the documents fit the code
# make test-slow  the whole quickstart with its goals, and the other tests of minutes
# make docs     write the generated parts of README.md anew
# make clean    delete the environment, caches and runs

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow check docs clean
.DEFAULT_GOAL := demo

demo: $(VENV)/installed-core
	$(BIN)/capfilt run pipelines/quickstart.yaml
	@echo "open $(CURDIR)/runs/quickstart/report.html in a browser"

test: $(VENV)/installed-test
	$(BIN)/python -m pytest $(PYTEST)

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow $(PYTEST)

check: $(VENV)/installed-test $(VENV)/installed-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest tests/test_docs.py $(PYTEST)

docs: $(VENV)/installed-test
	$(BIN)/python tests/test_docs.py

clean:
	rm -rf $(VENV) runs build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A file in the environment says that an installation is done; pyproject.toml makes it old.
$(VENV)/installed-core: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/installed-test: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet -e ".[test,inspect]"
	@touch $@ $(VENV)/installed-core

$(VENV)/installed-check: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet -e ".[check]"
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("capfilt needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
