# Every target makes or refreshes its own environment first: a virtual environment in $(VENV), with
# the exact versions of constraints.txt. It is refreshed only when pyproject.toml or constraints.txt
# have changed, so later runs start at once. uv is used where it is installed, pip otherwise.

PYTHON ?= python3
CONSTRAINTS = constraints.txt
VENV ?= .venv
# Processes keep the bytecode of what they import: without it each compiles all libraries anew, for
# some four seconds.
unexport PYTHONDONTWRITEBYTECODE
DEMO ?= runs/demo
NEW_PYTHON ?= python3.12

.DEFAULT_GOAL := help
.PHONY: help demo demo-clean docs dist test test-all test-fast test-full test-buckets test-slurm parity parity-full notebooks lint format install constraints clean

# $(call environment,EXTRA): $(VENV) holds the package, editable, with that extra (none when empty).
# The stamp in $(VENV) says for which PYTHON, folder, pyproject.toml and constraints.txt it was made.
define environment
set -e; \
stamp="$(VENV)/.installed$(if $(1),-$(1))"; \
state="$(PYTHON) $$PWD $$(cat pyproject.toml constraints.txt | cksum)"; \
if [ "$$(cat "$$stamp" 2>/dev/null)" != "$$state" ]; then \
	command -v "$(PYTHON)" >/dev/null || { \
		echo "There is no $(PYTHON) here; name a Python 3.11 or newer: make $@ PYTHON=/path/to/python" >&2; \
		exit 1; }; \
	"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
		echo "flax_transformers needs Python 3.11 or newer, and $(PYTHON) is $$("$(PYTHON)" --version 2>&1);" \
			"name another one: make $@ PYTHON=/path/to/python" >&2; \
		exit 1; }; \
	if [ -e "$(VENV)" ] && [ ! -f "$(VENV)/pyvenv.cfg" ]; then \
		echo "$(VENV) is there and is not a virtual environment; name another folder: make $@ VENV=.venv2" >&2; \
		exit 1; \
	fi; \
	echo "Installing flax_transformers$(if $(1), and what '$(1)' needs) into $(VENV)," \
		"with $$("$(PYTHON)" --version) (about a minute) ..."; \
	if [ "$$("$(VENV)/bin/python" --version 2>/dev/null)" != "$$("$(PYTHON)" --version)" ]; then \
		rm -rf "$(VENV)"; \
	fi; \
	if command -v uv >/dev/null; then \
		[ -d "$(VENV)" ] || uv venv --quiet --seed --python "$(PYTHON)" "$(VENV)"; \
		uv pip install --quiet --python "$(VENV)/bin/python" -c $(CONSTRAINTS) -e ".$(if $(1),[$(1)])"; \
	else \
		"$(VENV)/bin/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear "$(VENV)" || { \
			echo "$(PYTHON) cannot make virtual environments; install uv, or on Debian and Ubuntu" \
				"'apt install python3-venv'" >&2; \
			exit 1; }; \
		"$(VENV)/bin/python" -m pip install -qq --disable-pip-version-check --no-compile \
			-c $(CONSTRAINTS) -e ".$(if $(1),[$(1)])"; \
	fi; \
	printf '%s' "$$state" > "$$stamp"; \
fi
endef

# The environment of parity, with the last release that has the PPO of tests/parity/test_ppo.py.
define originals
$(call environment,parity); \
test -d "$(VENV)/trl-0.11.4" || if command -v uv >/dev/null; then \
	uv pip install --quiet --python "$(VENV)/bin/python" --no-deps --target "$(VENV)/trl-0.11.4" trl==0.11.4; \
else \
	"$(VENV)/bin/python" -m pip install -qq --no-deps --target "$(VENV)/trl-0.11.4" trl==0.11.4; \
fi
endef

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Train a tiny ModernBERT on text that is already on this machine (three minutes on two idle cores)
	@$(call environment,)
	@echo "Training configs/modernbert_tiny.py in $(DEMO) ..."
	@"$(VENV)/bin/flax-transformers" train configs/modernbert_tiny.py --workdir "$(DEMO)"
	@echo
	@echo "Next: $(VENV)/bin/flax-transformers fill-mask $(DEMO) --text 'Return [MASK] if the string is empty, False otherwise.'"
	@echo "      make demo-clean demo   starts afresh"

demo-clean: ## Remove what `make demo` trained
	rm -rf "$(DEMO)"

test: ## Run the whole test suite
	@$(call environment,test)
	@"$(VENV)/bin/python" -m pytest

test-full: ## Run what `make test` has only examples of, as every family on every mesh (ten minutes)
	@$(call environment,test)
	@"$(VENV)/bin/python" -m pytest -m full

test-all: ## Run the tests of test and test-full together
	@$(call environment,test)
	@"$(VENV)/bin/python" -m pytest -m ""

test-fast: ## Run the tests that are quick
	@$(call environment,test)
	@"$(VENV)/bin/python" -m pytest -m "not slow and not multi_process"

test-slurm: ## Test launch/slurm.sh on a SLURM of this machine: needs slurm-wlm and munge
	@$(call environment,test)
	@"$(VENV)/bin/python" launch/local_slurm.py

parity parity-full: VENV = .venv-parity
parity: ## Compare every family with the original, live: needs torch and transformers, which it installs
	@$(originals)
	@"$(VENV)/bin/python" -m pytest tests/parity

parity-full: ## Compare what `make parity` has only examples of
	@$(originals)
	@"$(VENV)/bin/python" -m pytest -m full tests/parity

test-buckets: VENV = .venv-buckets
test-buckets: CONSTRAINTS = .constraints-buckets.txt
test-buckets: ## Test workdirs and token stores in buckets, against emulators, which it installs
	@grep -v '^python-dateutil==' constraints.txt > $(CONSTRAINTS)
	@$(call environment,bucket-tests)
	@"$(VENV)/bin/python" -m pytest tests/buckets

notebooks: VENV = .venv-notebooks
notebooks: ## Run the notebooks, in few steps and with tiny models
	@$(call environment,notebooks)
	@"$(VENV)/bin/python" -m pytest -m "" tests/notebooks

docs: ## Build the documentation site into site/; a warning, such as a broken link, is an error
	@$(call environment,docs)
	@NO_MKDOCS_2_WARNING=1 "$(VENV)/bin/mkdocs" build --strict

dist: ## Build the wheel and the source distribution into dist/, and check both
	@$(call environment,release)
	@rm -rf dist
	@"$(VENV)/bin/python" -m build --outdir dist . >/dev/null
	@"$(VENV)/bin/twine" check --strict dist/*

lint: ## Check style, format, types, imports, sizes and retired terms
	@$(call environment,dev)
	@"$(VENV)/bin/ruff" check .
	@"$(VENV)/bin/ruff" format --check .
	@"$(VENV)/bin/lint-imports" --no-logo
	@"$(VENV)/bin/python" .ci/check_layout.py
	@"$(VENV)/bin/mypy"

format: ## Rewrite the code in the project's format
	@$(call environment,dev)
	@"$(VENV)/bin/ruff" check --fix-only --quiet .
	@"$(VENV)/bin/ruff" format .

install: ## Make the environment for working on the code, and the pre-commit hook
	@$(call environment,dev)
	@"$(VENV)/bin/pre-commit" install

constraints: ## Pin the newest releases: PYTHON is 3.11, NEW_PYTHON is 3.12 or newer
	"$(PYTHON)" .ci/pin_constraints.py "$(PYTHON)" "$(NEW_PYTHON)" > constraints.new || { rm -f constraints.new; exit 1; }
	mv constraints.new constraints.txt

clean: demo-clean ## Remove the environment and all caches, too
	rm -rf "$(VENV)" .venv-parity .venv-buckets .venv-notebooks site dist .constraints-buckets.txt .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
