PYTHON ?= python3
WORKERS ?= 2
TARGETS := sweep train verify codegen codegen-triton report test lint

VENV := .venv
READY := $(VENV)/.ready
OTHER := .venvs/triton-$(VERSION)

.PHONY: help $(TARGETS)

help:
	@echo "targets: $(TARGETS)"

$(TARGETS): $(READY)

sweep:
	$(VENV)/bin/python -m bench.sweep --seq 8192

verify:
	$(VENV)/bin/python -m verify

codegen:
	$(VENV)/bin/python -m verify codegen --arch sm_90

# The same with another Triton, which serves this alone: make codegen-triton VERSION=3.6.0
codegen-triton:
	@test -n "$(VERSION)" || { echo "say which Triton: make codegen-triton VERSION=3.6.0" >&2; exit 2; }
	@test -d $(OTHER) || { $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OTHER).part triton==$(VERSION) && mv $(OTHER).part $(OTHER); }
	PYTHONPATH=$(CURDIR)/$(OTHER) $(VENV)/bin/python -m verify codegen --arch sm_90

train:
	$(VENV)/bin/python -m tvm_ref.train

report:
	$(VENV)/bin/python -m reports.build

test:
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, %s is %s: try make PYTHON=python3.12" % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
