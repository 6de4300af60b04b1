# Everything a reader or a contributor runs. Each target makes what it needs and repeats no step that is done.
#
#   make tour        the main job: raw text in, generated text out, and a report
#   make test        every test: pytest, each lesson's stored outputs, the exported modules
#   make lab         the lessons in JupyterLab
#   make docs        the book: a website of all lessons; make docs-serve shows it
#
# TORCH_INDEX=URL takes torch from that package index (see docs/start.md: CPU builds for Linux, CUDA builds).

PYTHON ?= python3
BIN := $(if $(filter Windows_NT,$(OS)),.venv/Scripts/python,.venv/bin/python)
SETUP := $(PYTHON) tools/setup_venv.py
LESSON ?=
# Two workers of one thread each keep two cores busy without getting in each other's way.
WORKERS ?= 2
export TORCH_INDEX
# macOS ends a process that forks after a framework of Apple's was loaded; lessons and tests fork ranks. Else unused.
export OBJC_DISABLE_INITIALIZE_FORK_SAFETY := YES
PYTEST := OMP_NUM_THREADS=1 $(BIN) -m pytest -n $(WORKERS) --dist loadfile -q

.PHONY: help tour test fast lab setup notebooks export check lint format docs docs-serve clean

help:
	@sed -n '3,8s/^# \{0,1\}//p' Makefile

tour:
	@$(SETUP)
	@$(BIN) -m llama_edu.cli.main tour $(ARGS)

lab:
	@$(SETUP) notebooks
	@$(BIN) -m llama_edu.cli.main lab

setup:
	@$(SETUP) notebooks test docs dev

# What fails fastest comes first.
test:
	@$(SETUP) notebooks test docs dev
	@$(BIN) tools/lessons.py check
	@$(BIN) -m ruff check -q .
	@$(PYTEST) tests
	@$(PYTEST) --nbval --nbval-current-env --nbval-cell-timeout 300 notebooks

fast:
	@$(SETUP) notebooks test docs dev
	@$(PYTEST) -m "not slow" tests

docs:
	@$(SETUP) notebooks docs
	@$(BIN) tools/docs.py

docs-serve:
	@$(SETUP) notebooks docs
	@$(BIN) tools/docs.py serve

# Execute lessons and store their outputs: all, or `make notebooks LESSON="10 11"`.
notebooks:
	@$(SETUP) notebooks
	@$(BIN) tools/lessons.py run $(LESSON)

export:
	@$(SETUP) notebooks
	@$(BIN) tools/lessons.py export $(LESSON)

check:
	@$(SETUP) notebooks
	@$(BIN) tools/lessons.py check

lint:
	@$(SETUP) notebooks test docs dev
	@$(BIN) -m ruff check .

format:
	@$(SETUP) notebooks test docs dev
	@$(BIN) -m ruff format conftest.py tools tests benchmarks notebooks/*.ipynb
	@$(BIN) -m ruff check --fix-only -q .

clean:
	rm -rf .venv build dist *.egg-info
