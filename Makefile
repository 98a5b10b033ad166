# `make demo` and `make test` set themselves up; PYTHON names the interpreter to make the environment with.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check compat clean

demo: .venv/ready-imdb
	$(BIN)/layerfold study
	$(BIN)/layerfold study recipes/recovery.yaml

test: .venv/ready-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# Another generation of transformers reads what this one wrote; the other packages are those of the environment.
compat: .venv/ready-dev
	test -d .venv/compat/transformers || $(BIN)/python -m pip install --disable-pip-version-check -q --no-deps \
	  --target .venv/compat -r compat/requirements.txt
	READER=.venv/compat PYTHONPATH=tests $(BIN)/python -m pytest compat

.venv/ready-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf .venv
