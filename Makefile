# Everything a newcomer needs: each target sets up what it uses.
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-cluster lint format setup

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt tools/setup.sh
	bash tools/setup.sh $(VENV)

demo: setup
	bash examples/demo.sh $(PY)

test: setup
	$(PY) -m pytest

# A real SLURM on this machine (tests/cluster/slurm.sh), which apt-get installs if it is missing.
test-cluster: setup
	@[ "$$(id -u)" = 0 ] || { echo "error: make test-cluster needs root" >&2; exit 2; }
	$(PY) -m pytest -m cluster tests/cluster

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck $$(git ls-files '*.sh') .ci/run

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
