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

# Four processes on two cores: many tests wait for processes that they have started. In the order of tests/conftest.py.
test: setup
	$(RUN) -m pytest --numprocesses 4 --dist loadgroup --no-loadscope-reorder

# One process: what they measure is not for sharing the cores.
faults: setup
	FAULTS=full $(RUN) -m pytest tests -m faults --verbose --durations=0 --durations-min=1 -rP

# The types of Linux in full, and those of the standard library as macOS and Windows have it.
lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy & status=0; \
	for system in darwin win32; do $(VENV)/bin/mypy pipeline --config-file tests/mypy_systems.ini \
		--platform $$system --cache-dir .mypy_cache/$$system || status=1; done; \
	wait $$! && exit $$status

bench: setup
	$(PIP) --editable '.[bench]'
	$(RUN) -m bench

clean:
	rm -rf $(VENV) data_cache outputs mlruns mlflow.db build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
