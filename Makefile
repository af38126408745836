# On a fresh machine: `make demo`, `make test` and `make chaos`. Each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test chaos lint lint-infra format clean

setup: $(VENV)/.installed

# constraints.txt is a set of versions that was installed together and passes `pip check`.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip check
	$(BIN)/python infra/runpod/overlay.py $(VENV)/runpod
	touch $@

demo: setup
	$(BIN)/scail demo

# Every test is run by one of these two; `pytest` alone runs them all. More at a time than there are cores: some wait
# while others compute, most of all those that wait for processes to die and to come back.
test: setup
	$(BIN)/python -m pytest -n 4 --no-loadscope-reorder -m "not chaos"

# Three at a time, each with a cluster of its own. They lie in one folder: the others need not be collected three times.
chaos: setup
	$(BIN)/python -m pytest tests/chaos -n 3 --no-loadscope-reorder -m chaos

lint: setup lint-infra
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# What infra/ says, checked by the tools of each language. tests/infra checks that it says the same as the program.
lint-infra: setup
	$(BIN)/hadolint infra/Dockerfile
	$(BIN)/shellcheck infra/*.sh infra/runpod/*.sh
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec infra/compose.yaml
	$(BIN)/kubernetes-validate --strict --quiet $(filter-out %/kustomization.yaml,$(wildcard infra/k8s/*.yaml))
	$(BIN)/python infra/terraform/check.py infra/terraform

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) out build *.egg-info .pytest_cache .ruff_cache .mypy_cache
