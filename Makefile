# make quickstart and make test do all set-up on a machine with Python 3.11+, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# As many processes as the machine has cores; `make test PYTEST_ARGS="-n 0 -x tests/merging"` runs a part of it in one.
PYTEST = $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

.PHONY: quickstart test check lint clean

quickstart: $(VENV)/installed
	$(BIN)/pe-dpo quickstart

test: $(VENV)/installed-test
	$(PYTEST) $(PYTEST_ARGS)

# The quick part of the tests, for the loop of work.
check: $(VENV)/installed-test
	$(PYTEST) -m "not slow and not peer and not real" $(PYTEST_ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint,peer,trackers,ray]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist
