# Each verb works alone on a fresh clone: it first makes .venv and installs everything into it.

PYTHON ?= python3
TEST_ARGS ?= -n auto
# Digits of 8x8 pixels are too small to pack, hence the factor, and bear little compression; found on
# held-out training images.
DEMO_ARGS ?= --data digits --network convnet1 --factor 1 --ipc 1 --width 32 --outer 11 --inner 25 \
	--epochs 300 --methods random,herding,herding+compress=2,representative,idc,dream_plus --out runs/demo
SHRINK_DEMO_ARGS ?= --data digits --network convnet1 --factor 1 --ipc 10 --width 32 --outer 12 --inner 10 \
	--steps 300 --methods mdc,prefix,k-means --compile never --out runs/demo/shrink
MATCHING_GATE := --gate --recipes idc --widths 32 --ipc 5 --classes 3 --images 100 --network-images 320 \
	--exact 2 --rounds 3 --out runs/speed/matching
REPLAY_GATE := --gate --model one-layer --images 640 --rounds 3 --out runs/speed/replay

BIN := .venv/bin
INSTALLED := .venv/.installed
OLDEST := .venv-oldest

LONG_OUT ?= runs/long

.PHONY: demo test test-long test-oldest speed report docs check format

demo: $(INSTALLED)  ## compare the methods, and ways to shrink, on handwritten digits; see runs/demo
	$(BIN)/python -m benchmarks.class_incremental $(DEMO_ARGS)
	$(BIN)/python -m benchmarks.shrink $(SHRINK_DEMO_ARGS)

test: check  ## everything that has to pass
	$(BIN)/python -m pytest $(TEST_ARGS)
ifeq ($(origin TEST_ARGS),file)  # not where only some tests are asked for
	$(MAKE) speed
endif

test-long: $(INSTALLED)  ## bad input by the thousand, 50 kills, 1,000 experiences; about half an hour
	DC_REPLAY_LONG=1 DC_REPLAY_LONG_OUT=$(LONG_OUT)/bad_input $(BIN)/python -m pytest $(TEST_ARGS) tests/campaigns
	$(BIN)/python -m benchmarks.kills --kills 50 --out $(LONG_OUT)/kills
	$(BIN)/python -m benchmarks.kills --kills 50 --avalanche --out $(LONG_OUT)/kills_avalanche
	$(BIN)/python -m benchmarks.long_stream --experiences 1000 --gate --out $(LONG_OUT)/long_stream

test-oldest:  ## the tests with the oldest PyTorch that is supported, in an environment of its own
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check 'torch==2.11.*' --editable '.[dev]'
	$(OLDEST)/bin/python -m pytest $(TEST_ARGS)

speed: $(INSTALLED)  ## that what is meant to be fast is not slow; alone on the machine, a minute or two
	$(BIN)/python -m benchmarks.matching_speed $(MATCHING_GATE)
	$(BIN)/python -m benchmarks.replay_throughput $(REPLAY_GATE)

report: $(INSTALLED)  ## write the tables and plots from the committed results
	$(BIN)/python -m benchmarks.readme

docs: $(INSTALLED)  ## the documentation, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: $(INSTALLED)  ## lint, format, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED)  ## mend what can be mended without thought
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
