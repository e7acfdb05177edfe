# Two commands on a fresh machine: `make pretrain` and `make test`. Each sets up .venv once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS ?= runs
export RANKS ?= 2
# DeepSpeed compiles its operators with the ninja on the PATH: let it be the environment's.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: pretrain chromium test test-all test-hosts study study-quick lint setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[pretrain,test,lint]'
	touch $@

# A short run that balances nothing, then the run itself, whose report shows both.
# On the CPU also where there is a GPU: two ranks need two devices.
pretrain: export DS_ACCELERATOR := cpu
pretrain: setup
	launch/pretrain.sh --config tiny_cpu --output $(RUNS)/softmax --overwrite --set deepspeed.ssr.rule=none --set steps=200
	launch/pretrain.sh --no-preflight --config tiny_cpu --output $(RUNS)/ssr --overwrite --compare $(RUNS)/softmax

# The tests that look at pages need a browser. As root it is installed; without it they are skipped.
chromium:
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } > /dev/null \
	  || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
	    && { apt-get install -qq --no-install-recommends chromium || { apt-get update -qq \
	      && apt-get install -qq --no-install-recommends chromium; }; } > /dev/null 2>&1; } \
	  || echo "There is no Chromium, and it could not be installed: the browser tests will be skipped."

# Two files of tests at a time. What is slow is alone: some of it makes networks, or waits for time to pass.
test: setup chromium
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: test
	$(BIN)/python -m pytest -m slow

# Other versions of the hosts, each beside the environment's own and with compiled operators of its own.
# DeepSpeed before 0.16 loads its checkpoints as torch did before 2.6.
HOSTS := deepspeed-0.15.4 deepspeed-0.16.9 deepspeed-0.17.6 deepspeed-0.19.3 transformers-5.23.0
test-hosts: export TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD := 1
test-hosts: setup
	for host in $(HOSTS); do \
	  home=$(CURDIR)/$(VENV)/$$host; \
	  test -d $$home || $(BIN)/python -m pip install --quiet --no-deps --target $$home $${host%-*}==$${host##*-} || exit; \
	  echo "$$host"; \
	  TORCH_EXTENSIONS_DIR=$$home/extensions PYTHONPATH=$$home:$$PYTHONPATH $(BIN)/python -m pytest tests/hosts tests/patches || exit; \
	done

# The study of balancing rules: hours of two cores, resumed where it was. The quick one reruns a part
# on smaller models and fails where it contradicts the results in the repository.
RESULTS := benchmarks/results
QUICK := $(RUNS)/study-quick
study study-quick: export DS_ACCELERATOR := cpu
study: setup
	$(BIN)/python -m benchmarks.lm_study --results $(RESULTS)/lm_study.jsonl --tables main sizes corpora micro search
	$(BIN)/python -m benchmarks.image_study --results $(RESULTS)/image_study.jsonl --tables main
	$(BIN)/python -m benchmarks.study.tables --results $(RESULTS)

study-quick: setup
	$(BIN)/python -m benchmarks.lm_study --results $(QUICK)/lm_study.jsonl --tables quick
	$(BIN)/python -m benchmarks.image_study --results $(QUICK)/image_study.jsonl --tables quick
	$(BIN)/python -m benchmarks.study.tables --results $(QUICK)
	$(BIN)/python -m benchmarks.study.agreement $(QUICK)/lm_study.jsonl $(RESULTS)/lm_study.jsonl
	$(BIN)/python -m benchmarks.study.agreement $(QUICK)/image_study.jsonl $(RESULTS)/image_study.jsonl

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(RUNS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
