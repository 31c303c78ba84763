# make test, make demo, make bench: each sets up .venv by itself, once, and again when a file that decides its content changes.
#
#   PYTHON       interpreter that makes the environment (3.11 or later)     make test PYTHON=python3.12
#   VENV         where the environment lies                                 make test VENV=.venv312
#   TORCH_INDEX  extra package index for torch, e.g. the CPU wheels         make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   ARGS         passed on to pytest, the demo or the benchmark             make test ARGS="-k retrieval"

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
# The environment of the oldest supported triton, whose interpreter needs an older numpy.
VENV_TRITON36 ?= .venv-triton36

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The pin is written once, in requirements.txt.
TORCH := $(shell grep -m 1 '^torch==' requirements.txt)
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
BIN36 := $(VENV_TRITON36)/bin
PIP36 := $(BIN36)/python -m pip --disable-pip-version-check
# $(call check,PIP): torch's CUDA builds pin one triton, and the tests choose theirs. No other conflict may stand.
check = found="$$($(1) check)"; test -n "$$found" && ! printf '%s\n' "$$found" | grep -Ev \
    '^No broken requirements found|^torch [^ ]+ has requirement triton==[^,]*, but you have triton [^ ]+$$' >&2

.PHONY: help setup check-packages peers extension demo test test-long test-triton36 test-sanitizers lint bench clean \
    distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo       train N-pair and GCA-HNG on rendered letters, write demo/report.html"
	@echo "make test       lint and run the tests"
	@echo "make test-long  the same, with the tests that take minutes"
	@echo "make test-triton36  interpret and compile the GPU kernels with triton 3.6.0, in $(VENV_TRITON36)"
	@echo "make test-sanitizers  run the C++ kernels under address, undefined-behavior and thread sanitizers"
	@echo "make bench      measure what this machine's results file lacks, then write tables and figures (ARGS=--list)"
	@echo "make peers      install the libraries that the benchmarks set gcng beside"
	@echo "make setup      only make the environment ($(VENV))"
	@echo "make clean      remove what builds and tests leave; make distclean: the environments too"

setup: $(READY)

# torch comes first, and alone, so that nothing else decides which build of it is installed; the requirements and the project
# then find it in place. Triton comes without its resolver: torch from PyPI pins one version, and no test needs just that one.
# The project is installed editable and with the pinned setuptools, so this step resolves nothing.
$(READY): pyproject.toml setup.py requirements.txt requirements-dev.txt requirements-triton.txt
	@command -v $(PYTHON) >/dev/null || { \
	    echo "gcng: no interpreter '$(PYTHON)'. Install Python 3.11 or later, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "gcng: '$(PYTHON)' is $$($(PYTHON) --version 2>&1); Python 3.11 or later is needed." >&2; \
	    echo "      Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "gcng: '$(PYTHON)' cannot make virtual environments." >&2; \
	    echo "      Debian, Ubuntu: sudo apt install python3-venv (or python3.12-venv for python3.12)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH) --constraint requirements.txt $(INDEX)
	$(PIP) install --requirement requirements-dev.txt
	$(PIP) install --no-deps --requirement requirements-triton.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@$(call check,$(PIP))
	@touch $@

$(VENV_TRITON36)/.ready: pyproject.toml setup.py requirements.txt requirements-dev.txt requirements-triton36.txt
	test -x $(BIN36)/python || $(PYTHON) -m venv $(VENV_TRITON36)
	$(PIP36) install $(TORCH) --constraint requirements.txt $(INDEX)
	$(PIP36) install --requirement requirements-dev.txt
	$(PIP36) install --no-deps --requirement requirements-triton36.txt
	$(PIP36) install --no-deps --no-build-isolation --editable .
	@$(call check,$(PIP36))
	@touch $@

check-packages: $(READY)
	@$(call check,$(PIP))

# Without what they ask for: all of it is there, and none of them may choose another torch or triton.
peers: $(READY)
	$(PIP) install --no-deps --requirement requirements-peers.txt
	@$(call check,$(PIP))

# Compiles what changed in csrc/ since $(READY) did; does nothing where there is no compiler.
extension: $(READY)
	@$(BIN)/python -m gcng.build

# Threads sleep while they wait instead of spinning: small ops stay fast where other work shares the cores.
demo: export OMP_WAIT_POLICY ?= PASSIVE
demo: extension
	$(BIN)/python -m demo $(ARGS)

lint: $(READY)
	$(BIN)/python -m ruff check .

test: lint extension
	$(BIN)/python -m pytest $(ARGS)

test-long: lint extension
	$(BIN)/python -m pytest --long $(ARGS)

test-triton36: $(VENV_TRITON36)/.ready
	$(BIN36)/python -m pytest tests/test_triton_*.py $(ARGS)

test-sanitizers: $(READY)
	$(BIN)/python -m tests.native.sanitize

bench: extension
	$(BIN)/python -m benchmarks.measure $(ARGS)
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.tables

clean:
	rm -rf build dist gcng/_native *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './.venv*' -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VENV_TRITON36)
