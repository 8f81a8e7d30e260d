# `make demo` and `make test` need nothing prepared: each makes the virtual environment .venv if there is none.
# CPU only, without the CUDA wheels:  make test TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
RUN := $(VENV)/bin/python

.PHONY: demo test lint format types clean
.DEFAULT_GOAL := test

demo: $(VENV)/.ready
	$(RUN) -m examples.demo

# Two processes: Triton's interpreter, in which every kernel runs on the CPU, is on for all of a process or not at all,
# and nothing can be compiled where it is on.
test: $(VENV)/.ready
	TRITON_INTERPRET=1 $(RUN) -m pytest --ignore=tests/test_resources.py --ignore=tests/test_triton_specialization.py --ignore=tests/test_tune.py
	$(RUN) -m pytest tests/test_resources.py tests/test_triton_specialization.py tests/test_tune.py

lint: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.ready
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(VENV)/.ready
	$(RUN) -m mypy

$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: install python3-venv (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info outputs .pytest_cache .mypy_cache .ruff_cache
