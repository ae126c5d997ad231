# Every target makes its own environment in .venv first (scripts/setup.py); only Python 3.11 or later has to be there.
# Override on the command line: make demo DATA=~/recordings PRESET=full VARIANT=audioldm2-ljs WORK=outputs/mine

DATA    ?=
PRESET  ?=
VARIANT ?=
WORK    ?=
PORT    ?=
TESTS   ?=
JOBS    ?= 2

BIN := .venv/bin
PY  := $(BIN)/python

# Where it is set, as in many containers, every process compiles every library anew: ten seconds each, and Ray starts dozens.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick soak lint format types check serve mlflow clean


help:
	@echo "make demo     recordings -> shards -> seven trained stages -> sound, on a small corpus that it makes itself"
	@echo "                DATA=DIR      on your own recordings, or on the corpora's published layouts"
	@echo "                PRESET=full   longer training, for sound worth hearing"
	@echo "                VARIANT=NAME  another system, such as audioldm2-ljs for speech"
	@echo "                WORK=DIR      where everything goes"
	@echo "make test     the whole test suite          make quick    without its slow tests"
	@echo "                JOBS=N        so many test files at a time (2)"
	@echo "make soak     kills, fuzzing and repeats at length: once or twice each in make test, dozens of times here"
	@echo "make lint     ruff                          make types    mypy"
	@echo "make check    lint, types and test          make format   let ruff rewrite"
	@echo "make serve    the trained bundle over HTTP, with a page to try it"
	@echo "make mlflow   the pages of what was trained"
	@echo "make setup    only the environment          make clean    remove it, and the caches"

# The first interpreter that is new enough; python3 before the named ones, because it is the one people chose.
setup:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then exec $$python scripts/setup.py; fi; \
	done; \
	echo "setup: loa needs Python 3.11 or later, and none of these is: $(or $(PYTHON),python3 python3.11 ... python3.14)." >&2; \
	echo "  Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1

demo: setup
	@$(BIN)/loa demo $(if $(DATA),--data "$(DATA)") $(if $(PRESET),--preset $(PRESET)) $(if $(VARIANT),--variant $(VARIANT)) $(if $(WORK),--work "$(WORK)")

# Much of the suite waits for Ray: two files at a time take three quarters of the time (docs/log.md). Each has its own Ray.
test: setup
	@$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

quick: setup
	@$(PY) -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(TESTS)

soak: setup
	@LOA_SOAK=1 $(PY) -m pytest -m soak $(TESTS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: setup
	@$(BIN)/mypy

check: lint types test

serve: setup
	@$(BIN)/loa serve $(if $(WORK),--bundle "$(WORK)/bundle") $(if $(PORT),--port $(PORT))

mlflow: setup
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui \
	  --backend-store-uri "sqlite:///$(abspath $(or $(WORK),outputs/demo))/mlflow.db" --host 127.0.0.1 --port $(or $(PORT),5000) --workers 1

clean:
	rm -rf .venv .setup.log .pytest_cache .mypy_cache .ruff_cache build dist loa.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
