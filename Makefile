# Each target does its own set-up. `make release CHECKPOINT=…` releases your own checkpoint.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install release test test-all bench bench-peers soak lab wheel test-wheel check format

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## Make the environment in .venv

# The environment while it is empty.
$(VENV)/.made:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"Python 3.11, 3.12 or 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}; say which with PYTHON=…" if not (3, 11) <= v <= (3, 13) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.made
	@echo 'filling the environment in $(VENV), which takes some minutes'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lab,dev,embedded,postgres,openvino,train,fleet]'
	@touch $@

# Options of the release: CHECKPOINT=model.ckpt OPTIONS='--eval-data data.npz --profile audit'
release: $(VENV)/.installed ## Release CHECKPOINT, or a small demo trained on the spot
ifdef CHECKPOINT
	$(BIN)/heimdall-onnx release '$(CHECKPOINT)' $(OPTIONS)
else
	$(BIN)/heimdall-onnx demo $(OPTIONS)
endif

# Three at once on two processors: half of the time they wait for services and kernels.
test: $(VENV)/.installed ## Run the tests on real services
	$(BIN)/python -m pytest -n 3 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder $(OPTIONS)

test-all: $(VENV)/.installed ## Run those too that show the same of further models and faults, and measure coverage
	$(BIN)/python -m pytest -n 3 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder -m '' --cov --cov-report=term $(OPTIONS)

# Parts can be chosen: OPTIONS='startup steps tiny large growth training variants-tiny variants-large fleet evaluation pages cases --pairs 3'
# Cases can be chosen: OPTIONS='cases --only models "*lstm*" --whole 2'
bench: $(VENV)/.installed ## Measure what a release costs, on services of its own
	$(BIN)/python tests/bench $(OPTIONS)

# Rows can be chosen: OPTIONS='PyTorch optimum Olive --model large'
bench-peers: $(VENV)/.installed ## Measure what one would take instead, in environments of its own
	$(BIN)/python tests/bench/peers $(OPTIONS)

# Parts can be chosen: OPTIONS='kills services disk clock concurrency fuzz --count 300 --seed 1'
soak: $(VENV)/.installed ## Kill, cut off, fill up, race and mutate for hours; count what survives
	$(BIN)/python tests/soak $(OPTIONS)

lab: $(VENV)/.installed ## Open the notebook in JupyterLab
	HEIMDALL_HOME="$$($(BIN)/python -c 'import heimdall_onnx; print(heimdall_onnx.Settings.load().home)')" \
	  $(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 notebooks/release.ipynb

wheel: $(VENV)/.made ## Build the wheel into dist
	rm -f dist/*.whl
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

test-wheel: wheel ## Release from the wheel, in an empty environment
	tests/wheel.sh dist/*.whl constraints.txt $(BIN)/python

check: $(VENV)/.installed ## Lint, check types and who imports whom, look the packages up among known vulnerabilities
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tests/support/audit.py constraints.txt

format: $(VENV)/.installed ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
