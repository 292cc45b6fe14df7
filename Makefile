PYTHON ?= python3
WORKERS ?= 2
TARGETS := sweep train verify codegen report test lint

VENV := .venv
READY := $(VENV)/.ready

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
