# Each target does its own set-up. `make release CHECKPOINT=…` releases your own checkpoint.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := lab,dev,embedded,postgres,openvino,train,fleet
PYTEST := -m pytest -n 3 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install release test test-all test-lowest test-newest bench bench-peers soak lab wheel test-wheel check format

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## Make the environment in .venv

# An environment while it is empty.
%/.made:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"Python 3.11, 3.12 or 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}; say which with PYTHON=…" if not (3, 11) <= v <= (3, 13) else 0)'
	$(PYTHON) -m venv $*
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.made
	@echo 'filling the environment in $(VENV), which takes some minutes'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
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
	$(BIN)/python $(PYTEST) $(OPTIONS)

test-all: $(VENV)/.installed ## Run those too that show the same of further models and faults, and measure coverage
	$(BIN)/python $(PYTEST) -m '' --cov --cov-report=term $(OPTIONS)

# Both make an environment anew each time, beside the one that is worked in. torch alone is the pinned
# one: older builds that do without a GPU's libraries are not on PyPI. It goes in first and by pip,
# which takes a build for CPUs where one is at hand.
test-lowest: ## Run the tests at the lowest versions that pyproject.toml allows, in .venv-lowest
test-newest: ## Run the tests at the newest versions that there are, in .venv-newest
test-lowest: CHOICE := --resolution lowest-direct
# What is old uses what its own requirements, which are the newest, deprecate.
test-lowest: WARNINGS := -W ignore::DeprecationWarning -W ignore::FutureWarning
test-lowest test-newest: test-%:
	rm -rf .venv-$*
	@$(MAKE) --no-print-directory .venv-$*/.made
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt torch uv
	grep '^torch==' constraints.txt >.venv-$*/torch.txt
	.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python $(CHOICE) -c .venv-$*/torch.txt -e '.[$(EXTRAS)]'
	.venv-$*/bin/python $(PYTEST) $(WARNINGS) $(OPTIONS)

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
