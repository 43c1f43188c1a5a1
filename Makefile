# Two commands do everything on a fresh machine with Python 3.11+ and make: `make run` and `make test`.
.DEFAULT_GOAL := help
SHELL := /bin/sh

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin

# As the frontdesk command does for itself: waiting threads must not spin on cores that others need.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install run chat test test-slow lint starters bench bench-server clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(INSTALLED) ## set up: environment, packages, models (once; some gigabytes on disk)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Frontdesk needs Python 3.11 or newer; run make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing packages into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/frontdesk models pull
	@touch $(INSTALLED)

run: install ## run the service on 127.0.0.1:8080
	@exec $(BIN)/frontdesk serve

chat: install ## chat in the terminal with the running service (or one of its own)
	@exec $(BIN)/frontdesk chat

test: install lint ## run the tests
	@$(BIN)/python -m pytest -m 'not slow'

test-slow: install ## run the tests that take minutes each
	@$(BIN)/python -m pytest -m slow

lint: install ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

starters: install ## train the starter domains again from nothing (about 20 minutes)
	@$(BIN)/frontdesk train-starters

bench: install ## measure routing on the starters' test turns, and the prompt bank
	@$(BIN)/python -m tests.benchmarks.bench_routing
	@$(BIN)/python -m tests.benchmarks.bench_bank

bench-server: install ## measure the service without a model, and its log with a million turns (half an hour, 3 GB)
	@$(BIN)/python -m tests.benchmarks.bench_server
	@$(BIN)/python -m tests.benchmarks.bench_log

clean: ## remove the environment (fetched models and data stay)
	@rm -rf $(VENV)
