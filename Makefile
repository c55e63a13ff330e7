# One virtual environment in .venv, set up once from requirements.lock; everything else runs inside it.
PYTHON ?= python3
BIN := .venv/bin
PIP := -m pip --disable-pip-version-check --quiet
WORKERS ?= 2
TORCH := $(shell grep '^torch==' requirements.lock)
INSTALLED := .venv/.installed

.PHONY: demo test test-slow lint notebook bench bench-check lock clean

demo: $(INSTALLED)
	$(BIN)/refusalscope run testbed --name demo

# A file's tests share what they have made, so a file stays with one worker, in the order of tests/conftest.py: by the
# number of tests, as is the default, the few long ones come last.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# Cells that did not change keep their ids.
notebook: $(INSTALLED)
	$(BIN)/jupytext --to ipynb --update notebooks/*.py

# Under 15 minutes on two idle cores. At its toy size the GPU's benchmark only shows that it runs.
bench: $(INSTALLED)
	$(call measured,benchmarks/results)
	$(BIN)/python benchmarks/gpu.py --size toy > /dev/null
	$(BIN)/python benchmarks/document.py

bench-check: $(INSTALLED)
	into=$$(mktemp -d) && trap 'rm -rf "$$into"' EXIT; \
	$(call measured,"$$into") && $(BIN)/python benchmarks/check.py "$$into"

BENCHMARKS := attribution generation scaling pipeline quadrature
measured = for name in $(BENCHMARKS); do \
	  $(BIN)/python benchmarks/$$name.py --size small --json $(1)/$$name.json || exit 1; done

# torch comes first and with its dependencies, since its build for a GPU brings packages that the lock doesn't name;
# after it the lock is complete, so nothing is left to resolve.
$(INSTALLED): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) install $(TORCH)
	$(BIN)/python $(PIP) install --no-deps --requirement requirements.lock
	$(BIN)/python $(PIP) install --no-deps --editable .
	$(BIN)/python $(PIP) check
	touch $@

# Resolves pyproject.toml afresh around the torch that the lock names; to move torch, edit its line first.
# What a torch build for a GPU adds, and the local part of a version, stay out of the lock.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(PIP) install $(TORCH)
	.venv-lock/bin/python $(PIP) install --editable '.[test]' $(TORCH)
	.venv-lock/bin/python $(PIP) check
	{ grep '^#' requirements.lock; echo '$(TORCH)'; \
	  .venv-lock/bin/python $(PIP) freeze --all --exclude-editable --exclude pip \
	  | sed 's/+.*//' | grep -Eiv '^(torch==|triton==|nvidia-|cuda-)' | LC_ALL=C sort -f; } > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-lock requirements.lock.new build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
