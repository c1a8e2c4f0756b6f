# Two targets do everything from a clean clone: `make serve` and `make test`.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
CONFIG ?= configs/default.yaml
# Parallel test processes; each may run an engine of its own.
TEST_PROCESSES ?= 2

.PHONY: help serve test lint setup setup-dev python clean
help:
	@echo 'make serve   set up, then serve CONFIG (default: $(CONFIG)) on http://127.0.0.1:8000/v1'
	@echo 'make test    set up, then pass the tests'
	@echo 'make lint    style, types and import rules'
	@echo 'make clean   remove .venv'
	@echo 'Variables: PYTHON=python3.12  CONFIG=my.yaml  RIGSERVE_BUILD=auto|cpu|cuda'

serve: setup
	@exec .venv/bin/rigserve serve $(CONFIG)

test: setup-dev
	.venv/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

lint: setup-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

setup: python
	@$(PYTHON) tools/setup.py

setup-dev: python
	@$(PYTHON) tools/setup.py --dev

python:
	@test -n '$(PYTHON)' || { echo 'error: no Python 3.11 or newer found; run: make PYTHON=/path/to/python3' >&2; exit 1; }

clean:
	rm -rf .venv
