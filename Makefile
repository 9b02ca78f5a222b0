# Every target sets up what it needs: on a fresh clone `make test` is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

IMAGE ?= shardline:dev
TARGET ?= cpu
WHEELHOUSE ?=
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REVISION = $(shell git rev-parse HEAD 2> /dev/null || echo unknown)

.DEFAULT_GOAL := help
.PHONY: help install demo test faults integration image check protos monitoring bench stragglers train wheelhouse clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  %-10s %s\n", $$1, $$2 }'

install: $(INSTALLED) ## create .venv with pinned versions of everything

# torch goes first and alone: whichever build of it (CPU or CUDA) the machine's package index
# offers is then in place, and the second resolve has nothing left to choose.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("shardline needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## train on two shards and two workers on this machine
	$(BIN)/shardline run --shards 2 --workers 2 examples/digits.py

test: $(INSTALLED) ## run the tests, but for the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

faults: $(INSTALLED) ## run the slow tests: whole runs that are killed, stopped and joined
	$(BIN)/python -m pytest -m slow

integration: $(INSTALLED) ## run in containers with Docker, break things, and look at Prometheus
	$(BIN)/python -m tests.integration

image: ## build the image IMAGE [shardline:dev], TARGET [cpu] or gpu, from WHEELHOUSE if it is given
	docker build --target $(TARGET) --tag $(IMAGE) --build-arg WHEELHOUSE=$(WHEELHOUSE) \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) .

check: $(INSTALLED) ## format, lint, types, generated files, layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/python scripts/check_protos.py
	$(BIN)/python -m scripts.write_monitoring --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

protos: $(INSTALLED) ## write ps_core/v1 again from protos/
	rm -f ps_core/v1/*_pb2.py ps_core/v1/*_pb2.pyi
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --pyi_out=. protos/ps_core/v1/*.proto

monitoring: $(INSTALLED) ## write docs/metrics.md, dashboards and Kubernetes' rules again
	$(BIN)/python -m scripts.write_monitoring

bench: $(INSTALLED) ## measure the exchange
	$(BIN)/python benchmarks/exchange.py

stragglers: $(INSTALLED) ## measure every mode beside DDP with a straggler
	$(BIN)/python benchmarks/stragglers.py

train: $(INSTALLED) ## measure whole training loops beside DDP, and what a worker holds
	$(BIN)/python benchmarks/train.py

wheelhouse: $(INSTALLED) ## collect wheels for an image without internet; on Linux, with Python 3.11
	rm -rf wheelhouse
	$(BIN)/python -m pip wheel --quiet -w wheelhouse -c constraints.txt torch==2.13.0 'setuptools>=77' '.[plots,examples]'
	rm -f wheelhouse/shardline-*.whl

clean: ## remove everything that can be made again
	rm -rf $(VENV) wheelhouse build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
