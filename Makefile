# Every daily command; `make help` lists them. Needs Python 3.11 or newer and a C++ compiler, nothing else:
# CMake and Ninja come as wheels. nvcc, where it is found, adds the CUDA kernels.

PYTHON ?= python3
ARGS ?=

# The environment is the one made here, whatever else is active in the caller's shell.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PYTHONSAFEPATH := 1

RUN := .venv/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
VENV := .venv/.installed
BUILT := lowprec/_lib/.built
KERNELS := $(wildcard cuda/*.cpp cuda/*.cu cuda/include/lowprec/*.h)
PEERS := ml_dtypes qtorch torchao pychop microxcaling
STRICT := $(if $(CI),-DCMAKE_COMPILE_WARNING_AS_ERROR=ON)

.DEFAULT_GOAL := help
.PHONY: help venv build test test-gpu sanitize lint types format peers study wheel check ci clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '%-18s%s\n' "$$name" "$$text"; done
	@echo 'ARGS="..." is passed on to pytest and to the study; PYTHON=... picks the interpreter of .venv.'

venv: $(VENV) ## make .venv with the pinned requirements and lowprec itself, editable

$(VENV): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "lowprec needs Python 3.11 or newer; this is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(PIP) scikit-build-core cmake ninja
	$(PIP) --no-build-isolation --editable '.[test,dev,studies]'
	@touch $@

build: $(BUILT) ## compile the kernels into lowprec/_lib (CUDA too where nvcc is found)

$(BUILT): $(VENV) cuda/CMakeLists.txt $(KERNELS)
	cmake -S cuda -B build/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(CURDIR)/$(RUN)" $(STRICT)
	cmake --build build/cmake
	rm -f lowprec/_lib/*.so  # a library that a process has loaded must not change under it
	cmake --install build/cmake --prefix .
	@mkdir -p $(@D) && touch $@

test: build ## the whole test suite
	$(RUN) -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal $(ARGS)

test-gpu: build ## only the tests that need a GPU
	$(RUN) -m pytest -m gpu $(ARGS)

sanitize: build ## the kernels under compute-sanitizer: memory, races, what is read before it is written
	for tool in memcheck racecheck initcheck; do \
		only="--kernel-name kns=lowprec"; test $$tool != initcheck || only=; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool $$only --error-exitcode 1 \
			$(RUN) -m pytest -m "sanitize and gpu" -x -q $(ARGS) || exit; done

lint: $(VENV) ## ruff and clang-format, changing nothing
	ruff check
	ruff format --check
	clang-format --dry-run --Werror $(KERNELS)

types: $(VENV) ## mypy, strict
	mypy

format: $(VENV) ## put every file into the house's form
	ruff check --fix
	ruff format
	clang-format -i $(KERNELS)

peers: $(VENV) ## install the peers that `lowprec bench` compares with, where the index has them
	@for peer in $(PEERS); do \
		if $(PIP) --no-deps $$peer 2>/dev/null; then echo "installed: $$peer"; else echo "not to be had: $$peer"; fi; done

study: build ## the quick capacity study: a table, a picture and its data under runs/
	$(RUN) -m lowprec study capacity --quick $(ARGS)

wheel: $(VENV) ## one wheel for every Python, into dist/
	$(RUN) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

check: lint types test ## what a change must pass

ci: ## what CI runs
	.ci/run

clean: ## remove everything built, keeping .venv
	rm -rf build dist lowprec/_lib .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
