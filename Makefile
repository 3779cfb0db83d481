# Every target sets up what it needs: a virtual environment in .venv, from nothing but Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.ready-for-demo
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help install demo playground test stress bench bench-peers gallery docs dist check lint types imports prose format clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(READY) ## make the environment (torch included: some gigabytes, some minutes)

# The demo needs less than the checks do, which touch its mark as well. Sizes on Linux.
$(READY): EXTRAS := dev
$(READY): SIZE := 7.5 GB on disk (torch and CUDA 5.3), of which about 4 GB are fetched: 6 minutes at 100 Mbit/s
$(DEMO_READY): EXTRAS := audio
$(DEMO_READY): SIZE := 5.7 GB on disk (torch and CUDA 5.3), of which 3 GB are fetched: 4 minutes at 100 Mbit/s
$(READY) $(DEMO_READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "The venv module is missing: install it (Debian: apt-get install python3-venv)"; exit 1; }
	@echo "Installing .[$(EXTRAS)] into $(VENV)."
	@echo "  $(SIZE)"
	@echo "  Once: later runs need no network. pip's output is in $(VENV)/install.log"
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[$(EXTRAS)]' > $(VENV)/install.log 2>&1 || \
	  { tail -n 20 $(VENV)/install.log; echo "The install failed; all of it is in $(VENV)/install.log"; exit 1; }
	@touch $@ $(DEMO_READY)

demo: $(DEMO_READY) ## the whole main job on a small dataset made here: extract, read, train
	@echo "Loading torch takes some seconds"
	@$(BIN)/python tools/demo.py

playground: $(DEMO_READY) ## a folder in which the code of the documents runs, without data or network
	@$(BIN)/python tools/playground.py playground

test: $(READY) ## all tests but the long ones
	@VENV=$(VENV) tools/install_test_programs.sh
	$(BIN)/python -m pytest -n 2 --dist worksteal

stress: $(READY) ## the long tests
	$(BIN)/python -m pytest -m stress --timeout 3600

bench: $(READY) ## measure, and write the tables of docs/benchmarks.md
	$(BIN)/python tools/bench.py

bench-peers: $(READY) ## compare with memmap, tensordict, safetensors and others on this machine
	$(BIN)/python tools/bench_peers.py

gallery: $(READY) ## run the notebooks of docs/gallery again, and keep their outputs
	$(BIN)/python tools/run_gallery.py

docs: $(READY) ## build the documentation's site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -f .mkdocs.yml

dist: $(READY) ## build the sdist, and the wheel from it, in dist/: docs/releasing.md
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

check: lint types imports prose ## what CI checks beside the tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

prose: $(READY)
	$(BIN)/python tools/check_prose.py

format: $(READY) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and what the demo made
	rm -rf $(VENV) .demo playground .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site *.egg-info
