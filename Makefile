# Everything a newcomer needs: each target sets up what it uses.
VENV := .venv
PY := $(VENV)/bin/python
# vLLM has an environment of its own: it pins older versions of what the project uses.
VENV_VLLM := .venv-vllm

.PHONY: demo test test-vllm test-cluster lint format setup setup-vllm setup-cluster

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml kernels/pyproject.toml constraints.txt tools/setup.sh
	bash tools/setup.sh $(VENV)

demo: setup
	bash examples/demo.sh $(PY)

# Three workers, a file at a time each: most files start processes and wait for them. The order of the
# files is that of tests/conftest.py.
test: setup
	$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

$(VENV_VLLM)/.installed: kernels/pyproject.toml constraints-vllm.txt tools/setup_vllm.sh $(VENV)/.installed
	bash tools/setup_vllm.sh $(VENV_VLLM) $(PY)

setup-vllm: setup $(VENV_VLLM)/.installed

test-vllm: setup-vllm
	$(PY) -m pytest -m vllm tests/vllm

# A real SLURM on this machine (tests/cluster/slurm.sh), which apt-get installs if it is missing.
setup-cluster:
	bash tests/cluster/slurm.sh install

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
