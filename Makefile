# `make demo` and `make test` are the only two commands needed; each sets up .venv first.
# Overridable: PYTHON (makes the environment), VENV, MODEL (pocket or pocket-dit), JOBS (test processes), DEMO_FLAGS,
# PYTEST_FLAGS, BENCH_FLAGS, COMMANDS_FLAGS, FULL_SIZE_FLAGS, INTERCHANGE_FLAGS, FUZZ_FLAGS, PAYLOADS_FLAGS,
# CHAOS_FLAGS, BENCH_TRAIN_FLAGS, GPU_FLAGS.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
MODEL ?= pocket
DEMO_FLAGS ?=
PYTEST_FLAGS ?=
JOBS ?= $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')
BENCH_FLAGS ?=
COMMANDS_FLAGS ?=
FULL_SIZE_FLAGS ?=
INTERCHANGE_FLAGS ?=
FUZZ_FLAGS ?=
PAYLOADS_FLAGS ?=
CHAOS_FLAGS ?=
BENCH_TRAIN_FLAGS ?=
GPU_FLAGS ?=
# Dozens of tests start a process of their own: each would compile the whole package where this is set.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-quantised families bench bench-train gpu bench-commands interchange fuzz chaos payloads full-size check format docs release-check browser

setup: $(READY)

# torch first and alone: a CPU build of it that is installed in $(VENV) already is kept.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "setup: Python 3.11 or newer is needed (diffusers asks for it), got " + sys.version.split()[0] + "; choose one with PYTHON=python3.12")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt torch
	$(PY) -m pip install --quiet -c constraints.txt -e '.[ui,dev,docs,pretrain]'
	@touch $@

demo: setup
	$(PY) examples/demo.py --model $(MODEL) $(DEMO_FLAGS)

# A process a core and one more, since many tests wait for a browser or a process of their own; no more than four: each
# may hold a pipeline and a Chromium. JOBS=0 runs all in one.
test: setup browser
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

# The quantisation libraries are no part of setup: they are large, and diffusers imports them once they are there.
test-quantised: setup
	$(PY) -m pip install --quiet -c constraints.txt -e '.[quantised]'
	$(PY) -m pytest tests/unit/layers/test_quantisation.py tests/unit/pipelines/test_disk.py tests/unit/pipelines/test_quantise.py $(PYTEST_FLAGS)
	$(PY) -m pytest tests/unit/training/test_optimisers.py tests/e2e/test_optimisers.py -k adamw8bit $(PYTEST_FLAGS)

# What each model family can do, from its tests' outcomes -> docs/families.md
families: setup
	FAMILIES_TABLE=docs/families.md $(PY) -m pytest tests/families $(PYTEST_FLAGS)

# Beside PEFT and LyCORIS; about twenty minutes on two cores. Leave the machine alone meanwhile.
bench: setup
	$(PY) -m benchmarks.peers $(BENCH_FLAGS)

# A training step beside diffusers' own recipe and PEFT's LoRA -> docs/results/training.md; some twenty minutes on one
# core. Leave the machine alone meanwhile.
bench-train: setup
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.training $(BENCH_TRAIN_FLAGS)

# What only a GPU can tell -> docs/results/gpu.md; under ten minutes. GPU_FLAGS='--device cpu --tiny --output DIR' runs
# it without one.
gpu: setup
	$(PY) -m benchmarks.gpu $(GPU_FLAGS)

# Quick commands beside `import torch` -> docs/results/commands.md
bench-commands: setup
	$(PY) -m benchmarks.commands $(COMMANDS_FLAGS)

# Prints which layouts of which families are read and written (INTERCHANGE_FLAGS=--table: only that, in seconds);
# files and conversions of a full-size adapter -> docs/results/interchange.md
interchange: setup
	$(PY) -m benchmarks.interchange $(INTERCHANGE_FLAGS)

# More than ten thousand broken adapter files, read under watch -> docs/results/fuzz.md
fuzz: setup
	$(PY) -m benchmarks.fuzz $(FUZZ_FLAGS)

# Training runs killed 200 times, half of them while they save, and given full disks -> docs/results/chaos.md
chaos: setup
	$(PY) -m benchmarks.chaos $(CHAOS_FLAGS)

# Hostile requests and files against a served app -> docs/results/payloads.md
payloads: setup
	$(PY) -m benchmarks.app.payloads $(PAYLOADS_FLAGS)

# The published models at their real size, without weights; some twenty minutes on one core.
full-size: setup
	$(PY) -m benchmarks.full_size $(FULL_SIZE_FLAGS)

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Guides and reference -> site/index.html. A broken link or anchor, or a docstring at odds with its signature, fails.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# The mechanical part of docs/releasing.md: sdist and wheel of HEAD, installed in an empty environment and used there.
release-check: setup
	.ci/release-check $(PY)

# Browser tests need a Chromium. Without one, and without the right to install it, they skip and say so.
browser:
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; then :; \
	else echo "browser: no Chromium here and none could be installed; the browser tests will be skipped"; fi
