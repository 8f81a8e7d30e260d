# `make demo` and `make test` need nothing prepared: each makes the virtual environment .venv if there is none.
# CPU only, without the CUDA wheels:  make test TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
RUN := $(VENV)/bin/python
OUT ?= outputs/gpu

.PHONY: demo test test-all test-cpus report gpu gpu-check gpu-tune gpu-bench lint format types extension clean
.DEFAULT_GOAL := test

demo: $(VENV)/.ready extension
	$(RUN) -m examples.demo

# `make test` leaves out the tests that are marked `slow` (pyproject.toml); `make test-all` runs everything. Both use one
# worker process for each core, and one thread in each.
# Two pytest runs: Triton's interpreter, in which every kernel runs on the CPU, is on for all of a process or not at all,
# and nothing can be compiled where it is on.
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile
APART := $(addprefix tests/,bench/test_resources.py bench/test_compiled.py bench/test_resources_ptx.py bench/test_tune.py \
	triton/test_specialization.py)
test: SELECTION := -m "not slow"
test-all: SELECTION := --hostile-cases 10000
test-all: $(VENV)/.engines
test test-all: $(VENV)/.ready extension
	@interpreted=0; compiled=0; \
	TRITON_INTERPRET=1 $(PYTEST) $(SELECTION) $(APART:%=--ignore=%) || interpreted=$$?; \
	$(PYTEST) $(SELECTION) $(APART) || compiled=$$?; \
	if [ $$interpreted != 0 ] || [ $$compiled != 0 ]; then \
		echo "make $@: pytest ended with $$interpreted under Triton's interpreter, and with $$compiled for $(APART)" >&2; \
		exit 1; \
	fi

# The tests that depend on the kind of CPU, on the other kinds that this CPU can pass for (tests/cpus.py): held back, and
# simulated. Programs that tests start are not held back further, so those tests are left to `make test`.
CPU_TESTS := tests/tiled tests/backends/test_compaction.py tests/contract/test_sparsify.py \
	tests/contract/test_pool_values.py::test_small_whole_numbers_are_exact
test-cpus: $(VENV)/.ready extension
	@failed=; \
	for kind in ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 "PYTEST_ADDOPTS=--cpu plain" "PYTEST_ADDOPTS=--cpu vnni" \
		"PYTEST_ADDOPTS=--cpu vnni --cpu bf16 --cpu plain"; do \
		echo "make test-cpus: $$kind"; \
		env "$$kind" TRITON_INTERPRET=1 $(PYTEST) -q --hostile-cases 100 \
			-k "not held_back and not triton" $(CPU_TESTS) || \
			failed="$$failed [$$kind]"; \
	done; \
	if [ "$$failed" ]; then echo "make test-cpus: failed with$$failed" >&2; exit 1; fi

# Every document that is made from result files or tables, again.
report: $(VENV)/.ready
	$(RUN) -m bench.report bench/results/*.json --readme README.md --screening docs/screening.md \
		--numerics docs/numerics.md --figures docs/bench
	$(RUN) -m bench.short_sequences --document docs/kernels.md
	$(RUN) -m tests.tf_models --document docs/transformers.md
	$(RUN) -m tests.cli.help_page --document docs/command-line.md
	$(RUN) -m tests.encoding.bad_input --document docs/encoding.md
	$(RUN) -m tests.export_formats --document docs/formats.md

# On a GPU, into $(OUT): what runs and what it costs (4.6 minutes), the tuner (3.4), the benchmarks (4.6), or all. docs/gpu.md.
# Downloads nothing: it takes $(PYTHON) when that has a PyTorch that sees the GPU, else the virtual environment.
gpu gpu-check gpu-tune gpu-bench:
	@for python in $(PYTHON) $(RUN); do \
		if $$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
			exec $$python -m bench.gpu --output $(OUT) $(if $(filter gpu,$@),check tune bench,$(@:gpu-%=%)); \
		fi; \
	done; \
	echo "make $@: no PyTorch that sees a CUDA device, neither in $(PYTHON) nor in $(RUN)" >&2; exit 1

# Optional: without a compiler this says so and succeeds, and everything runs on PyTorch's own operations.
extension: $(VENV)/.ready
	$(RUN) setup.py -q build_ext --inplace

lint: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports

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

# Engines that the tests of encoding and of exports run, gigabytes with what they need: `make test` skips these tests
# where they are missing. ciff-toolkit is installed alone, since it asks for a protobuf older than onnx does; it works
# with this one.
$(VENV)/.engines: $(VENV)/.ready
	$(RUN) -m pip install --constraint constraints.txt --editable ".[dev,engines]"
	$(RUN) -m pip install --constraint constraints.txt --no-deps ciff-toolkit
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info splade_kernels/*.so outputs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
