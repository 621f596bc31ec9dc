# Two commands: `make train` and `make test`. Both make .venv when it is missing and do nothing about it when it is up to date.
# Only relative paths below: make cannot hold a space in a target, and the clone may lie anywhere.

TORCH ?= 2.13.0
PYTHON ?= $(shell for python in python3.11 python3.12 python3 python; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1 && echo "$$python" && break; done)
EXPERIMENT ?= gpt_moe_8e
ARGS ?=

STAMP := .venv/installed-torch-$(TORCH)
LINT_STAMP := .venv/installed-lint
# Bytecode is left to the first import: most of what is installed is never imported.
INSTALL := .venv/bin/python -m pip --quiet --disable-pip-version-check --no-input install --no-compile --constraint constraints.txt
SMALL_THREADS := OMP_NUM_THREADS=1 PYTHONHASHSEED=0

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow check clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@echo "  Variables: TORCH=$(TORCH) PYTHON=python3.12 EXPERIMENT=$(EXPERIMENT) ARGS='optim.lr=1e-3' (overrides for make train)"

setup: $(STAMP) ## Make .venv and install everything into it (torch first, the rest pinned by constraints.txt)

train: $(STAMP) ## Prepare the default corpus and train the small MoE on two processes; the same command again resumes
	@OMP_NUM_THREADS=1 .venv/bin/moetrain train --nproc 2 +experiment=$(EXPERIMENT) $(ARGS)

test: $(STAMP) ## Run every CPU test
	@$(SMALL_THREADS) .venv/bin/python -m pytest -n 3 --dist worksteal -m "not gpu and not slow" --coverage-map=docs/coverage.md tests

test-slow: $(STAMP) ## Run the CPU tests that take minutes
	@$(SMALL_THREADS) .venv/bin/python -m pytest -m "slow and not gpu" --timeout 1800

check: $(STAMP) $(LINT_STAMP) ## Lint, types and the floors of docs/design.md
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pyright
	.venv/bin/lint-imports

clean: ## Remove .venv and caches; runs, prepared corpora and exports stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find moetrain launch tests tools conf -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "moetrain needs Python 3.11 or 3.12 and found neither on PATH; name one with: make setup PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@if ! "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null; then \
		echo "$(PYTHON) cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; fi
	@echo "Making .venv with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv --clear .venv

# torch comes first and exactly: a looser requirement would let pip take a build for another device, gigabytes larger.
$(STAMP): .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing torch $(TORCH) and everything else into .venv (a few minutes the first time)"
	@$(INSTALL) "torch==$(TORCH)" hatchling
	@$(INSTALL) "torch==$(TORCH)" --no-build-isolation --editable ".[hf,wandb,dev]"
	@rm -f .venv/installed-torch-*
	@touch $(STAMP)

$(LINT_STAMP): $(STAMP)
	@$(INSTALL) "torch==$(TORCH)" --no-build-isolation --editable ".[lint]"
	@touch $(LINT_STAMP)
