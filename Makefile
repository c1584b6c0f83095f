PYTHON ?= python3
BIN := .venv/bin
EXTRAS := .[dev,docs,export,sweeps,dashboards]
# One thread a process: two processes with two threads each on two cores run several times slower than one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help setup demo sweep-demo test test-versions lint types format docs campaign mutants bench bench-runtimes test-slow test-data gpu test-gpu test-peers bench-peers clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: .venv/.stamp  ## make .venv with the pinned versions (the other targets do this by themselves)

# uv, not pip: it takes torch and torchvision from one place, as the pair they must be.
# The stamp is written last, so that a set-up that fails half-way is done again.
.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -c constraints.txt -e '$(EXTRAS)'
	@touch $@

demo: setup  ## grow and prune a network on images that need no download: make demo ARGS='seed=1'
	$(BIN)/python -m experiments.train experiment=digits $(ARGS)

test: setup  ## the default suite, warnings are errors
	$(PYTEST) -n 2 --dist worksteal

# uv's two ways to choose: the oldest versions that pyproject.toml allows, and the newest that there are.
test-versions: setup  ## the default suite with the oldest and with the newest versions, not the pinned ones
	for versions in lowest-direct highest; do \
		$(BIN)/uv venv -q --clear --python $(BIN)/python build/$$versions && \
		$(BIN)/uv pip install -q --python build/$$versions/bin/python --resolution $$versions -e '$(EXTRAS)' && \
		OMP_NUM_THREADS=1 build/$$versions/bin/python -m pytest -n 2 --dist worksteal || exit 1; \
	done

lint: setup  ## ruff check, ruff format --check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

# mypy looks for packages where their names say: it gets the tree as it is installed, made of links.
TYPES := build/types/elastic
types: setup  ## mypy on the package as it is installed
	rm -rf build/types && mkdir -p $(TYPES)/experiments
	ln -s $(CURDIR)/elastic/* $(CURDIR)/callbacks $(CURDIR)/conf $(TYPES)/
	ln -s $(CURDIR)/experiments/*.py $(CURDIR)/experiments/tools $(TYPES)/experiments/
	MYPYPATH=build/types $(BIN)/mypy -p elastic
	$(BIN)/mypy docs

format: setup  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sweep-demo: setup  ## 24 small runs on two cores, and a page about them: multirun/demo/report.html
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m experiments.train -m sweep=demo
	$(BIN)/python -m experiments.compare runs='multirun/demo/*-seed*' html=multirun/demo/report.html

docs: setup  ## tutorials, how-tos and the API as pages: site/index.html
	$(BIN)/python -m mkdocs build --strict

campaign: setup  ## try the library from outside, at random: make campaign ARGS='seed=1 scale=10'
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m experiments.campaign $(ARGS)

mutants: setup  ## change the code at random, and see whether tests notice: make mutants ARGS='--seed 1 --count 400'
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[mutants]'
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/mutants.py $(ARGS)

bench: setup  ## what elasticity costs and saves, beside the plain way
	$(BIN)/python -m experiments.bench

test-slow: setup  ## tests that train for longer, and the further cases of others
	$(PYTEST) -n 2 --dist worksteal -m "slow and not data and not gpu and not peers"

test-data: setup  ## tests on real data sets under ELASTIC_DATA
	$(PYTEST) -m data

test-gpu: setup  ## tests that need a CUDA device
	$(PYTEST) -m gpu

gpu: setup  ## the trainings on CIFAR-10 that tables are made of, on one GPU: make gpu ARGS='only=gnap_cifar10/*'
	$(BIN)/python -W ignore -m experiments.plan file=experiments/cifar10.yaml runs=experiments workers=12 $(ARGS)

test-peers: setup  ## comparisons with other pruning libraries; installs them first
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[peers]'
	$(PYTEST) -m peers

bench-runtimes: setup  ## skipping and levels beside ONNX Runtime and OpenVINO; installs it first: docs/runtimes.md
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[openvino]'
	$(BIN)/python -W ignore -m experiments.runtimes

bench-peers: setup  ## switching and discovery beside once-for-all, ModelOpt, Torch-Pruning; installs them first
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[peers]'
	$(BIN)/python -W ignore -m experiments.switching
	$(BIN)/python -W ignore -m experiments.discovery

clean:  ## remove what runs and builds leave behind (.venv stays)
	rm -rf outputs multirun wandb site build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find conf docs elastic callbacks experiments tests -name __pycache__ -prune -exec rm -rf {} +
