# Two commands do everything: `make demo` and `make test`. Both make what they need and can be run again.
SHELL := /bin/bash
TRAINER := build/venv-trainer/bin

.PHONY: help setup deb demo test test-long mutants soak crash powercut lint types imports unit clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## make both environments and install what is missing
	@packaging/setup.sh device trainer

demo: setup ## run the closed loop on this machine; options: make demo ARGS="--help"
	@$(TRAINER)/python -m bench.demo $(ARGS)

test: setup lint types imports ## lint, types, import rules and all tests that CI runs on every change
	@packaging/setup.sh tests
	$(TRAINER)/python -m tests.support.beside -m "not long"

deb: ## build the Debian packages edged and edged-llm in build/deb; options: make deb ARGS="--help"
	@packaging/setup.sh device
	@build/venv-device/bin/python packaging/deb/build.py $(ARGS)

test-long: setup ## the tests that take minutes: the demo and its ablations, booted Debians, kills in the middle of work
	@packaging/setup.sh tests
	$(TRAINER)/python -m tests.support.beside -m long

mutants: setup ## leave each fsync out of the product, one at a time: the simulation must notice every one
	$(TRAINER)/python -m pytest -m long tests/sim

soak: setup ## 20 minutes of mixed load and disturbances; its report is docs/soak.md; options: make soak ARGS="--minutes 2"
	@$(TRAINER)/python -m bench.soak $(ARGS)

crash: setup ## kill a working device 200 times, its broker too, on a full disk and under a wrong clock; ARGS="--kills 20"
	@packaging/setup.sh tests
	@$(TRAINER)/python -m bench.crash $(ARGS)

powercut: setup ## cut the power of a virtual machine 20 times (as root, half an hour); its report is docs/powercut.md; ARGS="--cuts 3"
	@packaging/setup.sh tests powercut
	@$(TRAINER)/python -m bench.powercut $(ARGS)

lint: setup
	$(TRAINER)/ruff check .
	$(TRAINER)/ruff format --check .

types: setup
	$(TRAINER)/mypy

imports: setup
	$(TRAINER)/lint-imports --no-logo

clean: ## remove build/: environments, caches, the demo's models
	rm -rf build
