# Everything a newcomer needs: each target sets up what it uses.
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test lint format setup

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt tools/setup.sh
	bash tools/setup.sh $(VENV)

demo: setup
	bash examples/demo.sh $(PY)

test: setup
	$(PY) -m pytest

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck $$(git ls-files '*.sh') .ci/run

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
