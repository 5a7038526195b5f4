# Another Python has another folder: make setup PYTHON=python3.12 VENV=.venv312
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
# Python compiles the modules that are imported when it first needs them: half of the time of an installation.
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile
PORT ?= 5000
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup demo ui notebook test faults lint bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	touch $@

demo: setup
	$(RUN) -m pipeline main

ui: setup
	$(RUN) -m pipeline ui --port $(PORT)

notebook: setup
	$(PIP) --editable '.[notebooks]'
	$(VENV)/bin/jupyter lab notebooks

# Six processes on two cores: many tests wait for processes that they have started.
test: setup
	$(RUN) -m pytest --numprocesses 6 --dist loadgroup

# One process: what they measure is not for sharing the cores.
faults: setup
	FAULTS=full $(RUN) -m pytest tests -m faults --verbose --durations=0 --durations-min=1 -rP

# Types are checked as each system has them; a cache for each, since mypy would start anew with every other system.
lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	for system in linux win32 darwin; do $(VENV)/bin/mypy --platform $$system --cache-dir .mypy_cache/$$system || exit 1; done

bench: setup
	$(PIP) --editable '.[bench]'
	$(RUN) -m bench

clean:
	rm -rf $(VENV) data_cache outputs mlruns mlflow.db build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
