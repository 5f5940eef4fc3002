# make baseline     a first tracked run; pass flags with ARGS="--max-iters 200"
# make test         the tests; make test-slow: the long ones; make lint: style and types
# make bench        the measured comparisons; make UV_COMPILE := $(BIN)/uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url
lock: $(VENV)/.installed-dev
	$(BIN)/pip install -q uv
	(echo "# Compiled from requirements.in by make lock."; $(UV_COMPILE) requirements.in \
	  | sed -E -e '/^(nvidia|cuda)-/d; /^triton==/d; s/^(torch==[0-9.]+).*/\1/' | uniq) > requirements.new
	mv requirements.new requirements.txt
	(echo "# Compiled from requirements-dev.in by make lock."; $(UV_COMPILE) requirements-dev.in) > requirements-dev.new
	mv requirements-dev.new requirements-dev.txt

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
