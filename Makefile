# Two commands do everything: `make demo` and `make test`. Both make what they need and can be run again.
SHELL := /bin/bash
TRAINER := build/venv-trainer/bin

.PHONY: help setup demo test test-long lint types imports unit clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## make both environments and install what is missing
	@packaging/setup.sh device trainer

demo: setup ## run the closed loop on this machine; options: make demo ARGS="--help"
	@$(TRAINER)/python -m bench.demo $(ARGS)

test: setup lint types imports ## lint, types, import rules and all tests that CI runs on every change
	$(TRAINER)/python -m pytest -m "not long" tests

test-long: setup ## the tests that take minutes: the demo at a reduced size and its ablations
	$(TRAINER)/python -m pytest -m long tests

lint: setup
	$(TRAINER)/ruff check .
	$(TRAINER)/ruff format --check .

types: setup
	$(TRAINER)/mypy

imports: setup
	$(TRAINER)/lint-imports --no-logo

clean: ## remove build/: environments, caches, the demo's models
	rm -rf build
