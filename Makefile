# `make demo` trains, blends and merges on the embedded base model; `make test` checks everything. Both create .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Waiting threads must not take CPU time from other processes, and nothing may be downloaded from the Hugging Face Hub.
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test browser lint format clean

demo: $(STAMP)
	$(BIN)/lora-diffusion demo

test: lint
	$(MAKE) browser
	$(BIN)/python -m pytest

# The browser tests use Chromium. Only root on a Debian system gets it installed; elsewhere they are skipped.
browser:
	@if command -v chromium >/dev/null; then echo "browser tests: using $$(command -v chromium)"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "browser tests: installing the system package chromium with apt-get"; \
		apt-get install -qq -y chromium >/dev/null 2>&1 || { apt-get update -qq && apt-get install -qq -y chromium >/dev/null; } || \
		echo "browser tests: chromium could not be installed; they will be skipped"; \
	else echo "browser tests: no chromium found; they will be skipped"; fi

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[ui,dev]' -c constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo runs
