# `make demo` and `make test` need only Python >= 3.11 with venv and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 2
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test check format lock bench clean

help:  ## Show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

# Debian's python3 has the module venv; ensurepip, which venv calls, comes with the package python3-venv.
$(VENV)/.run: requirements.txt requirements-build.txt pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python >= 3.11 with venv is needed (Debian, Ubuntu: apt-get install python3-venv); $(PYTHON) is" \
		"$$($(PYTHON) --version 2>/dev/null || echo missing). For another one: make PYTHON=python3.13 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --require-hashes -r requirements-build.txt -r requirements.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(PIP_INSTALL) --require-hashes -r requirements-dev.txt
	@touch $@

demo: $(VENV)/.run  ## Run the main job end to end on this machine (ARGS="--keep" leaves it running)
	$(BIN)/receiver demo $(ARGS)

# Tests make thousands of databases and flush each commit: if there is enough memory, this takes half of the time there.
# Use a folder below /dev/shm, because the health check reads /dev/shm itself.
test: export TMPDIR ?= $(shell findmnt -nbo AVAIL,OPTIONS /dev/shm 2>/dev/null | \
	awk '$$1 > 6e9 && $$2 !~ /noexec/ {print "/dev/shm/clipia-receiver-tests"; exit}')
test: $(VENV)/.dev  ## Run the tests (ARGS="-k name" selects some)
	@[ -z "$$TMPDIR" ] || mkdir -p "$$TMPDIR"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/.dev  ## Format, lint, types, layers, migration drift, tests with branch coverage (at least 92 % without the acceptance tests)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test ARGS="tests/unit tests/contracts tests/integration --cov --cov-report=term --durations=20 $(ARGS)"
	# Without coverage: these tests start hundreds of processes, and each would take twice as long.
	$(MAKE) test WORKERS=3 ARGS="tests/acceptance --durations=20 --ignore=tests/acceptance/test_race.py $(ARGS)"
	# On its own: 128 requests at once need the whole machine.
	$(BIN)/python -m pytest tests/acceptance/test_race.py

bench: $(VENV)/.dev  ## Measure ingest, latency, growth, memory, downloads, the outbox, and the cost of frozen brokers and replays
	$(BIN)/python benchmarks/ingest.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/growth.py --events 1_000_000 --sqlite-events 500_000
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/download.py
	$(BIN)/python benchmarks/publish.py
	$(BIN)/python benchmarks/drain.py backlog
	$(BIN)/python benchmarks/drain.py beside
	$(BIN)/python benchmarks/isolation.py

format: $(VENV)/.dev  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Extras stay in the pins: if a newer release exists, pip below 23.3 rejects `coverage[toml]` beside a pin of plain `coverage`.
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-strip-extras --no-emit-index-url --no-emit-find-links --upgrade

# Resolve the development pins first and constrain the others by them, so that a package has one version in all files.
lock: $(VENV)/.dev  ## Resolve the dependencies anew and pin them with hashes
	$(BIN)/python -m pip install --quiet uv
	$(LOCK) --extra all --group dev --group build -o requirements-dev.txt pyproject.toml
	$(LOCK) --extra all -c requirements-dev.txt -o requirements.txt pyproject.toml
	$(LOCK) -c requirements-dev.txt --group pyproject.toml:build -o requirements-build.txt

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
