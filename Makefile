# make quickstart   install, then run a whole study: two rounds and a promotion
# make check test   must pass before a change lands
# make coverage     how much of playbook, config, store and study their tests run; below 90% it fails
# make explore      new random examples for all tests that Hypothesis draws; reproduce one by what it prints
# make acceptance   what is too long for `make test`, in parts (`make acceptance-commands`), with dated results
# make smollm2 ROWS=alpaca.json   create model and rows of studies/alpaca-smollm2; without ROWS from the Hub
# make bench        packed training against PEFT and Trainer on this CPU; under ten minutes
# make gpu          what only a GPU shows; PARTS='doctor tests' for some, `make gpu-parts` for what each takes
# make docs         build the documentation into build/site, without the network
# make pictures     make the pictures of the documentation from the quickstart study; needs Chromium
# make image        build the container image with buildah or docker
# make fix          format, apply lint fixes, and regenerate docs/reference
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TUNER := $(BIN)/tuner
CLI_DOCS := $(BIN)/typer tuner.cli utils docs --name tuner --title 'The commands'
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

SHELL := bash
# Those of tests/commands and tests/faults would take over half an hour each: they have parts, by pytest's -k.
KEYWORDS.commands-rounds := not killed
KEYWORDS.commands-kills := killed
KEYWORDS.faults-local := local
KEYWORDS.faults-command := command
KEYWORDS.faults-postgres := postgres
KEYWORDS.faults-ray := ray
KEYWORDS.faults-fuzz := fuzz
PARTED := $(patsubst KEYWORDS.%,%,$(filter KEYWORDS.%,$(.VARIABLES)))
ACCEPTANCE := $(PARTED) $(filter-out commands faults,$(patsubst tests/%,%,$(shell grep -rl --include='test_*.py' 'mark\.acceptance' tests | xargs -n1 dirname | sort -u)))

.PHONY: setup acceptance coverage explore docs pictures image quickstart smollm2 bench gpu gpu-parts check test fix clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# In an environment of its own: contributors who do not build the site need not install it.
$(VENV)/docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/pip install --quiet --constraint constraints.txt 'mkdocs-material' 'mkdocstrings[python]'
	touch $@

docs: setup $(VENV)/docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict --quiet
	@echo 'wrote build/site/index.html'

pictures: setup
	$(BIN)/python docs/pictures.py

image:
	$(or $(shell command -v buildah),$(shell command -v docker)) build --file docker/Dockerfile --tag tuner .

quickstart: setup
	$(TUNER) -C studies/quickstart study run round1.yaml
	test -e studies/quickstart/round2.yaml || $(TUNER) -C studies/quickstart study promote --to round2
	$(TUNER) -C studies/quickstart study run round2.yaml
	$(TUNER) -C studies/quickstart study report
	$(TUNER) -C studies/quickstart trial show best

smollm2: setup
	$(BIN)/python studies/alpaca-smollm2/prepare.py $(if $(ROWS),--rows '$(ROWS)')

# Both sides of a benchmark use all cores; tests use one thread, which never stalls.
bench: setup
	OMP_NUM_THREADS=$$(env -u OMP_NUM_THREADS nproc) $(BIN)/python benchmarks/packing.py --trials 8 --repetitions 2

gpu: setup
	PYTHONPATH=. $(BIN)/python -m benchmarks.gpu $(PARTS)

gpu-parts: setup
	PYTHONPATH=. $(BIN)/python -m benchmarks.gpu --list

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m tuner.config docs/reference --check
	$(BIN)/python -m tuner.api docs/reference --check
	$(CLI_DOCS) --output $(VENV)/cli.md > /dev/null
	diff docs/reference/cli.md $(VENV)/cli.md || (echo 'docs/reference/cli.md is stale: make fix'; exit 1)

test: setup
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=20

# Apart from `make test`, since it makes Python half as fast.
coverage: setup
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder -q $(addprefix tests/,playbook config store study cli commands) --cov --cov-report=
	$(BIN)/coverage report --fail-under=90

explore: setup
	$(BIN)/pytest -m 'hypothesis and not acceptance' --hypothesis-profile explore --timeout 1800 -q

acceptance: explore coverage $(addprefix acceptance-,$(ACCEPTANCE))

# Each part writes which tests passed, and how long they took, to benchmarks/results.
acceptance-%: setup
	set -o pipefail; $(BIN)/pytest tests/$(firstword $(subst -, ,$*)) -m acceptance -k "$(KEYWORDS.$*)" --timeout 1800 --durations=0 -q -rA --tb=short --show-capture=no \
	  | tee benchmarks/results/acceptance_$*_$$(date +%F).txt

fix: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/python -m tuner.config docs/reference
	$(BIN)/python -m tuner.api docs/reference
	$(CLI_DOCS) --output docs/reference/cli.md

clean:
	rm -rf build dist *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis
