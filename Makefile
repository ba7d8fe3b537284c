# Needs Python 3.11 or newer, pip and make. Everything else is installed by pip into $(VENV).

VENV ?= .venv
# Test processes. Each holds eight virtual devices and its own compiled programs: about 2 GB.
WORKERS ?= 2
# More words for pytest, e.g. PYTEST_ARGS='tests/test_merge.py -k bfloat16'.
PYTEST_ARGS ?=
# What the parity tests compare with; `make test TORCH=` goes without, and they skip. One exact version, so that a
# local file or an index of CPU builds that pip has been told of (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL; PyTorch's
# installation page names theirs) wins with its `2.13.0+cpu` over the several GB of the default build for Linux.
TORCH ?= torch==2.13.0

python := $(VENV)/bin/python
tested := $(VENV)/.test-$(or $(subst ==,-,$(TORCH)),no-torch)
comma := ,
pip_install := $(python) -m pip install --quiet --no-compile --editable
# By file, because tests of one file share what they compute, and a module's compiled programs are forgotten after it.
# A worker that is gone fails the test it ran; with another in its place, the rest of its file would be waited for, for ever.
pytest := $(python) -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart=0 --durations=15 -rs
# What another version of JAX or Python can break while the oldest ones pass; PyTorch is not needed. A subject is one file or
# several that begin with its name.
# Jaxprs, which every version of JAX writes in its own way, and what it says of meshes.
newest := dropout explain explicit frameworks llama_itself lorafy merge method model_starts quant_programs recompile sharding stack transform uses views
# Imports, examples whose output shows JAX's own texts, and Optax under strict promotion.
newest += docstrings imports optim.
# Files, which Python's, NumPy's and Orbax's own readers and writers handle.
newest += check hf interop_fuzz interop_imports other_tools safetensors torch
newest_tests = tests/methods tests/test_quant.py $(foreach subject,$(newest),$(or $(wildcard tests/test_$(subject)*py),$(error no test is about $(subject))))
# Grids, whole runs and other people's tools: each test is quick, and together they take half of the time.
wide := checkpoint_average checkpoint_damage decode encoders_hf encoders_lora experiments_train gpt2_lora guards
wide += methods_composed other_tools plan precision quant_formats quant_programs sharding transform
# `python3` unless it is too old or does not run (a version manager's shim for a version that is not active).
find_python = found=; for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.14 python3.13 python3.12 python3.11); do \
	if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found="$$candidate"; break; fi; \
	done

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-fast notebooks test-newest lint format docs clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.experiments  ## Fetch SmolLM2-135M (98 MB), train LoRA on it and write demo_run/
	$(python) -m experiments fetch smollm2-135m
	HF_HUB_OFFLINE=1 $(python) -m experiments run --config experiments/configs/demo.json --workdir demo_run
	@$(python) -m experiments report demo_run experiments/results/demo/full
	@echo "demo_full is full fine-tuning, a stored run: its seconds are of another machine."
	@echo "demo_run/report.md compares the costs on yours."

test: $(tested)  ## Run all tests (TORCH= leaves PyTorch out)
	$(pytest) $(PYTEST_ARGS)

test-fast: $(tested)  ## Run the quick tests, without PyTorch and the wide grids, in three minutes
	$(pytest) -m "not slow and not pytorch" $(wide:%=--ignore=tests/test_%.py) $(PYTEST_ARGS)

notebooks: $(tested)  ## Run the notebooks anew and store what they print and show
	$(python) tests/notebooks.py

test-newest: $(VENV)/.test-newest  ## Run the tests that a newer JAX or Python can break, without the slow ones
	$(pytest) -m "not slow" $(newest_tests) $(PYTEST_ARGS)

lint: $(VENV)/.lint  ## Check the format, ruff's rules and the types of lora_jax
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy

format: $(VENV)/.lint  ## Rewrite the code in ruff's format, its imports sorted
	$(python) -m ruff check --fix --exit-zero --quiet .
	$(python) -m ruff format .

docs: $(VENV)/.docs  ## Build the site of these pages in site/; a broken link or an undocumented name fails
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict
	@echo "$(python) -m http.server --directory site shows it at http://localhost:8000"

clean:  ## Remove the virtual environment, the demo's results and every cache
	rm -rf $(VENV) demo_run dist site .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# A stamp each, so that a second `make` starts at once. A changed pyproject.toml starts a new environment: pip would
# keep what is no longer asked for, and a test that passes only because of it says nothing.
$(VENV)/.created: pyproject.toml
	@$(find_python); \
	if [ -z "$$found" ]; then \
		echo "lora_jax needs Python 3.11 or newer: $(or $(PYTHON),python3) is older or does not run. Install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi; \
	echo "Creating $(VENV) with $$("$$found" --version)"; \
	if "$$found" -c 'import ensurepip' 2>/dev/null; then \
		"$$found" -m venv --clear $(VENV); \
	else \
		"$$found" -m venv --clear --without-pip $(VENV) && "$$found" -m pip --python $(python) install --quiet pip; \
	fi
	@touch $@

# Editable, so that what runs is what is in the working tree. Not compiled: pip would spend half its time on the bytecode
# of some 17,000 files, and Python compiles the few that are imported when they are.
$(VENV)/.experiments: $(VENV)/.created
	@echo "Installing what the experiments need into $(VENV)"
	@$(pip_install) '.[experiments]'
	@touch $@

$(VENV)/.lint: $(VENV)/.created
	@echo "Installing what the linters need into $(VENV)"
	@$(pip_install) '.[lint]'
	@touch $@

$(VENV)/.docs: $(VENV)/.created
	@echo "Installing what the site is built with into $(VENV)"
	@$(pip_install) '.[docs]'
	@touch $@

$(VENV)/.test-newest: $(VENV)/.created
	@echo "Installing what the newest JAX is tested with into $(VENV)"
	@$(pip_install) '.[test-newest]'
	@touch $@

# With PyTorch in one call, so that pip cannot meet PEFT's plain `torch` before the version that is asked for here.
$(tested): $(VENV)/.created
	@echo "Installing what the tests need into $(VENV)$(if $(TORCH), with $(TORCH))"
	@$(pip_install) '.[test$(if $(TORCH),$(comma)torch)]' $(if $(TORCH),'$(TORCH)') || { \
		echo "pip failed, see above.$(if $(TORCH), If it is PyTorch that it cannot install: 'make test TORCH=' runs all but the parity tests.)" >&2; exit 1; }
	@touch $@
