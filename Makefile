# Everything a user runs. `make` alone lists the targets.
VENV ?= .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.packages
INSTALLED := $(VENV)/.installed
FOR_TESTS := $(VENV)/.for-tests
FOR_DOCS := $(VENV)/.for-docs
PEERS := $(VENV)/.for-peers
DEMO_DIR ?= data/demo
DEMO_ARGS ?=
TEST_ARGS ?=
BREAKS_ARGS ?=
# Two for each of two cores: a test that waits leaves its core to another.
TEST_WORKERS ?= 4
# All tests of a file run in one process, which makes what they share once; in the order of tests/conftest.py.
IN_PARALLEL = $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
# What needs several hosts, many ranks, or kills hosts, ranks and workers; to look through all other files would take each worker
# half a minute.
CLUSTER_TESTS := tests/cluster tests/deploy tests/security tests/pipeline/features tests/trainer/daily tests/trainer/test_main.py tests/trainer/supervise tests/trainer/runs/resumed
BROWSER_TESTS := tests/explorer/browser
BENCH_DIR ?= data/bench
GPU_DEVICE ?= cuda
CLUSTER_DIR ?= data/cluster
DOCS_DIR ?= data/docs-site
BROWSER_DIR ?= data/browser
VERSIONS_DIR ?= data/versions
# Syntax of the oldest supported Python is held by ruff (target-version), both by `make test-versions`.
NEWEST_PYTHON := 3.13
OLDEST_PYTHON := 3.11
OLDEST_TORCH := torch==2.13.0 torchvision==0.28.0
PACKAGES := featurestore pipeline trainer serving explorer jobs crossmedia benchmarks tools
# horovodrun and dask-submit are looked for on the path.
ON_PATH := PATH="$(abspath $(BIN)):$$PATH"

# The tests start a hundred processes: compiled modules are kept, also where the environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install demo demo-features test-fast test test-slow test-cluster test-versions test-browser screenshots lint breaks simulate simulate-bugs fuzz fuzz-guided format docs tree bench gpu-check clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# PYTHON, HOROVOD_GPU_OPERATIONS and HOROVOD=no choose the environment. Where they say something else than the last time,
# the script runs again; where they say nothing, what is installed is kept.
ASKED := PYTHON=$(PYTHON) HOROVOD_GPU_OPERATIONS=$(HOROVOD_GPU_OPERATIONS)$(if $(HOROVOD), HOROVOD=$(HOROVOD))
ifneq ($(PYTHON)$(HOROVOD_GPU_OPERATIONS)$(HOROVOD),)
ifneq ($(ASKED),$(shell cat $(INSTALLED) 2>/dev/null))
.PHONY: $(BASE) $(INSTALLED)
endif
endif

install: $(INSTALLED) ## Make the virtual environment; builds Horovod once per machine (four minutes), or not: HOROVOD=no

$(BASE): setup.cfg pyproject.toml tools/install.sh
	tools/install.sh $(VENV) packages

$(INSTALLED): $(BASE) tools/build_horovod.sh
	tools/install.sh $(VENV) horovod

# What other targets need beyond that comes with the first of them.
$(FOR_TESTS): $(INSTALLED) tools/install_for.sh tools/requirements-s3-server.txt tools/requirements-deploy.txt
	tools/install_for.sh $(VENV) tests

$(FOR_DOCS): $(FOR_TESTS) tools/install_for.sh
	tools/install_for.sh $(VENV) docs

$(PEERS): $(FOR_TESTS)
	tools/install_for.sh $(VENV) peers

# Horovod, where it has not been built on this machine, is built while pictures are drawn and features extracted.
demo: ## Draw images, extract, build samples, train four models under horovodrun -np 2, score, write the explorer's pages
	@$(MAKE) --no-print-directory --jobs=2 $(INSTALLED) demo-features
	$(ON_PATH) $(BIN)/python -m crossmedia demo --part rest --dir $(DEMO_DIR) $(DEMO_ARGS)

demo-features: $(BASE)
	$(ON_PATH) $(BIN)/python -m crossmedia demo --part features --dir $(DEMO_DIR) $(DEMO_ARGS)

# None of them waits, so two workers are enough: each begins with ten seconds of imports.
test-fast: TEST_WORKERS := 2
test-fast: $(FOR_TESTS) ## Run the tests that start no ranks, no cluster and no server: before each commit
	$(ON_PATH) $(IN_PARALLEL) -m "not slow and not services and not long and not cluster and not browser and not pages" $(TEST_ARGS)

# Some of them wait, and each worker imports as long: three keep two cores busy.
test: TEST_WORKERS := 3
test: $(FOR_TESTS) ## Run all that guards a promise, but for test-cluster and test-browser; TEST_ARGS="tests/trainer -k stores"
	$(ON_PATH) $(IN_PARALLEL) -m "not slow and not cluster and not browser and not pages" $(TEST_ARGS)

test-slow: $(PEERS) ## Run the large numbers: 500 kills of writers, eight ranks, benchmarks at a tiny size
	$(ON_PATH) $(BIN)/python -m pytest -m "slow and not cluster" $(TEST_ARGS)

test-versions: ## Run `make test` on the newest Python and torch, then on the oldest, each in a new environment: weekly
	rm -rf $(VERSIONS_DIR)
	$(MAKE) test VENV=$(VERSIONS_DIR)/newest PYTHON=python$(NEWEST_PYTHON)
	$(MAKE) test VENV=$(VERSIONS_DIR)/oldest PYTHON=python$(OLDEST_PYTHON) TORCH="$(OLDEST_TORCH)"

# Debian's sshd and Slurm are unpacked below data/cluster; the machine itself stays as it is. What takes longest is marked
# slow as well: TEST_ARGS="-m 'cluster and not slow'" leaves it out.
# A test waits for daemons most of the time, so two run side by side.
test-cluster: TEST_WORKERS := 2
test-cluster: $(FOR_TESTS) ## Run what needs root, network namespaces, sshd, Slurm or many ranks, or kills hosts, ranks and workers; it says what it could not run, and why
	tools/cluster_packages.sh $(CLUSTER_DIR) || true
	$(ON_PATH) CLUSTER_PACKAGES=$(abspath $(CLUSTER_DIR)) $(IN_PARALLEL) -m cluster $(CLUSTER_TESTS) $(TEST_ARGS)

# Debian's Chromium is unpacked below data/browser; CHROMIUM=/path/to/chromium takes another one.
test-browser: $(FOR_TESTS) ## Look at the explorer's pages in Chromium; it says so where there is none
	tools/browser_packages.sh $(BROWSER_DIR) || true
	$(ON_PATH) BROWSER_PACKAGES=$(abspath $(BROWSER_DIR)) $(IN_PARALLEL) --dist loadgroup -m browser $(BROWSER_TESTS) $(TEST_ARGS)

screenshots: $(FOR_TESTS) ## Take the pictures of the explorer for README and docs, of the demo that is there
	tools/browser_packages.sh $(BROWSER_DIR)
	$(ON_PATH) BROWSER_PACKAGES=$(abspath $(BROWSER_DIR)) $(BIN)/python -m tools.browser.screenshots --dir $(DEMO_DIR)

lint: $(FOR_TESTS) ## Check style, types, import rules, first lines and sizes of files, and the generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(addprefix -p ,$(PACKAGES))
	$(BIN)/lint-imports
	$(BIN)/python tools/tree.py --check
	$(BIN)/python tests/breaks.py --check
	$(BIN)/python -m tools.settings --check

breaks: $(FOR_TESTS) ## Plant small faults in a copy, one at a time, and see that the tests notice each; BREAKS_ARGS="--only 3,7"
	$(ON_PATH) $(BIN)/python -m tests.breaks $(BREAKS_ARGS)

simulate: $(FOR_TESTS) ## Play 1,000 simulated histories of the store's protocols; SEEDS=10000 FIRST=1000 plays others
	$(BIN)/python -m tests.simulated play --seeds $(or $(SEEDS),1000) --first $(or $(FIRST),0)

simulate-bugs: $(FOR_TESTS) ## Plant bugs in those protocols, one at a time, and see that a history finds each
	$(BIN)/python -m tests.simulated bugs --seeds $(or $(SEEDS),200) --first $(or $(FIRST),0)

fuzz: $(FOR_TESTS) ## Run each parser on 2,000 damaged inputs; EXAMPLES=50000 FIRST=1 runs others
	$(BIN)/python -m tests.fuzz play --examples $(or $(EXAMPLES),2000) --first $(or $(FIRST),0)

fuzz-guided: $(FOR_TESTS) ## The same with inputs that coverage chooses (libFuzzer by atheris, which it installs); EXAMPLES, FIRST
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "atheris>=3"
	$(BIN)/python -m tests.fuzz guided --examples $(or $(EXAMPLES),2000) --first $(or $(FIRST),0)

format: $(FOR_TESTS) ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(FOR_DOCS) ## Build docs/ as a site with search, in data/docs-site, and run the tutorial and the notebook
	$(BIN)/python -m tools.site --out $(DOCS_DIR)
	$(ON_PATH) $(IN_PARALLEL) -m pages tests/tools

tree: ## Print every file with the line that says what it is for
	@python3 tools/tree.py

bench: $(PEERS) ## Run the benchmarks; the figures go to data/bench/*.json
	mkdir -p $(BENCH_DIR)
	$(ON_PATH) $(BIN)/python -m benchmarks.store --json $(BENCH_DIR)/store.json
	$(ON_PATH) $(BIN)/python -m benchmarks.extract --json $(BENCH_DIR)/extract.json
	$(ON_PATH) $(BIN)/python -m benchmarks.train --dir $(BENCH_DIR)/workload --json $(BENCH_DIR)/train.json
	$(ON_PATH) $(BIN)/python -m benchmarks.growth --dir $(BENCH_DIR)/growth --json $(BENCH_DIR)/growth.json
	$(ON_PATH) $(BIN)/python -m benchmarks.serve --dir $(BENCH_DIR)/serve --json $(BENCH_DIR)/serve.json

gpu-check: $(FOR_TESTS) ## Compare training on a GPU with the CPU, and measure it; GPU_DEVICE=cpu runs the same without one
	mkdir -p $(BENCH_DIR)
	$(ON_PATH) PYTHONPATH=. $(BIN)/python tests/trainer/equivalence/on_device.py --device $(GPU_DEVICE)
	$(ON_PATH) $(BIN)/python -m benchmarks.gpu --device $(GPU_DEVICE) --dir $(BENCH_DIR)/gpu --json $(BENCH_DIR)/gpu.json

clean: ## Remove the virtual environment, the caches and the demo; features and runs of your own stay
	rm -rf $(VENV) $(VERSIONS_DIR) $(DEMO_DIR) $(DOCS_DIR) $(BENCH_DIR) $(CLUSTER_DIR) $(BROWSER_DIR) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
