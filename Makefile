# Everything a developer or a newcomer runs. Each target does its own set-up: the stamp files make
# a second run install nothing.

# The first interpreter on the PATH that is new enough.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint bench bench-sequential bench-winner bench-scaling bench-full-size \
  bench-record bench-replay bench-report bench-scripts bench-overhead dashboard docs docs-serve \
  docs-figures docs-reference postgres postgres-stop clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## Search the bundled model for its upper bound: about 3 minutes on 2 cores
	$(BIN)/accelsearch bounds studies/shapes-demo.toml
	$(BIN)/accelsearch export studies/shapes-demo.toml --out storage/exports

# A file's tests run in one process, and one thread each: two of torch on one core slow each other.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile

test: $(VENV)/installed-dev ## Run the tests: no network, no GPU
	$(TESTS) -m "not slow and not gpu"

test-slow: $(VENV)/installed-dev ## Run the slow tests
	$(TESTS) -m "slow and not gpu"

lint: $(VENV)/installed-dev ## ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

dashboard: $(VENV)/installed-dashboard ## Watch the studies of storage/ in a browser
	$(BIN)/accelsearch dashboard

docs: $(VENV)/installed-docs ## Build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs-serve: $(VENV)/installed-docs ## Show it in a browser while it is written: http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

docs-reference: $(VENV)/installed ## Write the reference tables of docs/ anew from the code
	$(BIN)/python docs/scripts/reference.py

docs-figures: $(VENV)/installed-docs ## Draw the figures of docs/statistics.md anew
	$(BIN)/python docs/scripts/figures.py

bench: $(VENV)/installed ## Measure this project itself: the A/A control
	$(BIN)/python benchmarks/control.py

bench-scaling: $(VENV)/installed-dev ## Measure up to 64 workers on one PostgreSQL
	$(BIN)/python benchmarks/scaling.py

bench-overhead: $(VENV)/installed ## Measure what a search of the bundled model costs beside its measurements
	$(BIN)/python benchmarks/overhead.py

bench-sequential: $(VENV)/installed ## Simulate the test of the budgets: its error rates, and the prompts it takes
	$(BIN)/python benchmarks/sequential.py

bench-winner: $(VENV)/installed ## Simulate the interval of the fastest setting, which its own pairs chose
	$(BIN)/python benchmarks/winner.py

bench-full-size: $(VENV)/installed ## Measure the methods on full-size architectures: 18 minutes on one large GPU
	$(BIN)/python benchmarks/full_size.py --pipeline StableDiffusionPipeline --profile --bundled --minutes 8
	$(BIN)/python benchmarks/full_size.py --pipeline StableDiffusionXLPipeline --profile --minutes 8

postgres: $(VENV)/installed-postgres ## Start a PostgreSQL server in storage/pg, and print its URL
	@storage/postgres.sh start

postgres-stop: ## Stop it; its data stay
	storage/postgres.sh stop

bench-record: $(VENV)/installed ## Record the tables that searches are replayed against: some 40 minutes on one GPU
	$(BIN)/python benchmarks/record.py --methods compile,deepcache
	$(BIN)/python benchmarks/record.py --methods compile,deepcache,tgate

bench-scripts: $(VENV)/installed ## Generate the demo's scripts, and run each beside what was measured
	$(BIN)/accelsearch run studies/shapes-demo.toml --out storage/demo
	$(BIN)/python benchmarks/generated.py storage/demo

bench-report: $(VENV)/installed ## Make the report of 500 trials: its seconds and its size
	$(BIN)/python benchmarks/report.py

bench-replay: $(VENV)/installed ## Replay searches against the recorded tables: some 110 minutes of one core
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/replay.py --out docs/images/replay.svg

clean: ## Remove the virtual environment and all caches, but no results
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "accelsearch needs Python 3.11 or newer on the PATH, found none; \
	install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

# torch comes first and by itself: resolved together with others, pip may try several builds of it.
# It is the large one, so its download is shown.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-postgres: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[postgres]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,dashboard,docs,notebook]'
	@touch $@

$(VENV)/installed-dashboard: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dashboard]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@
