# make demo: the main job on the embedded default.  make test: the fast tests.  make slow: the long ones.
# TORCH_INDEX: where PyPI's torch would bring CUDA (Linux, several GB), take the CPU build from an index of yours:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   make demo RECIPE=smollm2-cpu OUT=runs/full      another shipped recipe (recipes/): this one infills
PYTHON ?= python3
MINUTES ?= 5
RECIPE ?= smollm2-block
OUT ?= runs/demo
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test slow lint install install-test clean

demo: install
	$(BIN)/diffulm adapt smollm2-135m-instruct-q4 --recipe $(RECIPE) --minutes $(MINUTES) --out $(OUT)

test: install-test
	$(BIN)/python -m pytest -q

slow: install-test
	$(BIN)/python -m pytest -q -m slow

lint: install-test
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

# torch by itself and first: asked for by another package it may come in another build.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("diffulm needs Python 3.11 or newer: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(INDEX) torch==2.13.0
	$(PIP) install --quiet --constraint constraints.txt --editable '.[plot]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[lora,plot,eval,track,test,lint]'
	touch $@

clean:
	rm -rf $(VENV) runs dist
