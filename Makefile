# make baseline     a first tracked run; pass flags with ARGS="--max-iters 200"
# make test         the tests; make test-slow: the long ones; make lint: style and types
# make docs         the documentation as a site in site/; a broken link is an error
# make bench        the measured comparisons; make schema, make lock: the generated files
# make mutants      would the tests notice? small mutations of the core modules; every tenth with ARGS="'*7'"
# make completion   flags, settings and names of runs in bash, zsh and fish
# make fuzz         odd command lines, files and run directories, by the thousand
# Each target first sets up what it needs, unless that has been done already.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=

.PHONY: setup baseline test test-slow lint docs bench bench-training mutants fuzz completion schema lock clean

setup: $(VENV)/.installed

baseline: $(VENV)/.installed
	$(BIN)/python train.py --run-tag baseline $(ARGS)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup $(ARGS)  # threads of several workers would fight for the cores

test-slow: $(VENV)/.installed-dev $(VENV)/.installed-bench
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --dist loadgroup $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.experiments
	$(BIN)/python -m benchmarks.tracking
	$(BIN)/python -m benchmarks.shakespeare
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.checkpoints
	$(BIN)/python -m benchmarks.loading
	$(BIN)/python -m benchmarks.crash_test
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.speedrun
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.bisect

bench-training: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.training $(ARGS)

mutants: $(VENV)/.installed-mutants  # all of them take hours on all cores
	OMP_NUM_THREADS=1 nice $(BIN)/python -m mutmut run $(ARGS)
	$(BIN)/python -m mutmut results  # those that no test noticed

fuzz: $(VENV)/.installed
	nice $(BIN)/python -m benchmarks.fuzz $(ARGS)

completion: $(VENV)/.installed
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	$(BIN)/python -m utils.terminal.completion $(VENV)/completion
	@echo "bash, zsh: source $(CURDIR)/$(VENV)/completion/bash (or zsh); fish: source $(CURDIR)/$(VENV)/completion/fish"

schema: $(VENV)/.installed
	$(BIN)/python -m utils.config.fields > docs/config.schema.json

# uv resolves for every platform, so that Aim's own dependencies carry Aim's marker. torch brings the GPU packages that
# fit its build by itself: they, and torch's local version suffix, are left out.
UV_COMPILE = $(BIN)/uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url

lock: $(VENV)/.installed-dev
	$(BIN)/pip install -q uv
	(echo "# Compiled from requirements.in by make lock."; $(UV_COMPILE) requirements.in \
	  | sed -E -e '/^(nvidia|cuda)-/d; /^triton==/d; s/^(torch==[0-9.]+).*/\1/' | uniq) > requirements.new
	mv requirements.new requirements.txt
	(echo "# Compiled from requirements-dev.in by make lock."; $(UV_COMPILE) requirements-dev.in | sed -E 's/^triton==[0-9.]+/triton/') \
	  > requirements-dev.new
	mv requirements-dev.new requirements-dev.txt

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(BIN)/pip install -q -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

$(VENV)/.installed-bench: requirements-bench.txt $(VENV)/.installed
	$(BIN)/pip install -q -r requirements-bench.txt
	touch $@

$(VENV)/.installed-mutants: requirements-mutants.txt $(VENV)/.installed-dev
	$(BIN)/pip install -q -r requirements-mutants.txt
	touch $@

clean:
	rm -rf $(VENV) mutants site .pytest_cache .mypy_cache .ruff_cache
