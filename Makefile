# Everything from a fresh clone; needs Python (3.11 or newer) and make.  `make help` lists the targets.

PYTHON ?= python3
# Optional dependencies to install: dev, or dev,cuda13 for a GPU.
EXTRAS ?= dev
# Test processes, and the threads XLA and BLAS use in each of them.
WORKERS ?= 2
THREADS ?= 1

VENV := .venv
BIN := $(VENV)/bin
comma := ,
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help install figures figures-full docs paper test test-all browser clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo "  variables:          PYTHON=$(PYTHON) EXTRAS=$(EXTRAS) WORKERS=$(WORKERS) THREADS=$(THREADS)"

install: $(INSTALLED) ## .venv with the package and the tested versions of what it needs

figures: $(INSTALLED) ## theory and simulations in the quick profile, drawn into figures/quick/
	@$(BIN)/python experiments/reproduce.py --quick

figures-full: $(INSTALLED) ## the same at publication sizes, into figures/
	@$(BIN)/python experiments/reproduce.py --full

docs: $(INSTALLED) ## the documentation as pages, into docs/_build/html/
	@test -x $(BIN)/sphinx-build || { \
	  echo "Sphinx is not installed: it comes with EXTRAS=dev, the default"; exit 1; }
	@$(BIN)/sphinx-build -q -W --keep-going -c docs -d docs/_build/doctrees . docs/_build/html
	@echo "The first page is docs/_build/html/docs/index.html"

paper: $(INSTALLED) ## the paper: its equations and numbers from the package, then LaTeX
	@$(BIN)/python experiments/write_paper.py

test: export NPROC := $(THREADS)
test: export OMP_NUM_THREADS := $(THREADS)
test: export OPENBLAS_NUM_THREADS := $(THREADS)
test: $(INSTALLED) ## linters, type checker and tests, the slow ones included
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "make fails: run '$(BIN)/ruff format .'"; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/pytest -q -n $(WORKERS) --dist loadfile -m "not exhaustive"

test-all: $(INSTALLED) ## the tests that take minutes each
	@$(BIN)/pytest -q -m exhaustive

browser: ## Chromium, for the tests of the explorer (Debian and Ubuntu; asks for rights by sudo)
	@command -v chromium > /dev/null || { \
	  SUDO=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$SUDO apt-get update -qq && $$SUDO apt-get install -qq -y --no-install-recommends chromium > /dev/null; }

clean: ## remove what was computed and built, except .venv and figures/
	@rm -rf paper/build paper/generated paper/lora_theory.pdf docs/_build figures/quick
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	@rm -rf $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing lora_theory and what it needs into $(VENV); the first time takes a few minutes."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { \
	  echo "$(PYTHON) is not there: install Python 3.11 or newer, or name one with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lora_theory needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version)." \
	       "Name another one, for example: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "$(PYTHON) cannot create virtual environments: install its venv module" \
	       "(on Debian and Ubuntu: apt install python3-venv)."; exit 1; }
	@$(PYTHON) -m venv $(VENV)
