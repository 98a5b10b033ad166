# `make demo` and `make test` set themselves up; PYTHON names the interpreter to make the environment with.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check compat figures figures-status docs-figures clean

demo: .venv/ready-imdb
	$(BIN)/layerfold study

test: .venv/ready-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python -m figures fill --check

# What README and docs show: runs what is missing or out of date, in the background. JOBS=2 for two processes at a time,
# DEVICE=cuda for a GPU, SMOLLM2=path for the file of SmolLM2-135M, ONLY="merge prune" for some experiments.
JOBS ?= 1
DEVICE ?= cpu
figures: .venv/ready-dev
	$(BIN)/python -m figures run $(ONLY) --jobs $(JOBS) --device $(DEVICE) --background

figures-status: .venv/ready-dev
	$(BIN)/python -m figures status

docs-figures: .venv/ready-dev
	$(BIN)/python -m figures fill

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
