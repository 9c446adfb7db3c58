# Every target works alone on a fresh clone: `setup` makes .venv when it is missing or out of date.
.PHONY: setup demo test test-long check format bench clean
PYTHON ?= python3
BIN := .venv/bin
# Each test process computes with one thread. Tests of one file share what they trained; files come in their own order, for
# xdist would leave the long ones of a single test to the end
PROCESSES ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lucidetr needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/lucidetr demo

test: setup
	$(BIN)/pytest $(PROCESSES) -m 'not slow and not record'

test-long: setup
	$(BIN)/pytest $(PROCESSES) -m 'slow and not record'

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/pytest -q $(PROCESSES) -m 'not slow and not record'

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build dist .pytest_cache .hypothesis .ruff_cache .import_linter_cache
