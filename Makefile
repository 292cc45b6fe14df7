PYTHON ?= python3
WORKERS ?= 2
# all, or fast: the part of the long tests that tests/tiers.py chooses.
TIER ?= all
TARGETS := sweep measure-this-gpu train verify codegen codegen-cards codegen-triton report test test-all lint
# What another release of torch can break: the derivatives' wiring, the public functions, torch.compile.
WIRING_TESTS := tests/flashjvp/dispatch tests/test_readme.py $(addprefix tests/flashjvp/, test_api.py test_autocast.py \
	test_passed_on.py test_errors.py test_explain.py test_support.py test_performance.py kernels/test_replay.py kernels/test_driver.py \
	test_norms.py test_checkpoint.py $(addprefix integrations/test_, replaced.py models.py batch_norm.py packages.py report.py))

VENV := .venv
READY := $(VENV)/.ready
VENVS := .venvs
OTHER := $(VENVS)/triton-$(VERSION)
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(WORKERS) --dist worksteal --tier $(TIER)
NEW_ENOUGH = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, %s is %s: try make PYTHON=python3.12" % (sys.executable, sys.version.split()[0]))'
INSTALL = -m pip install --quiet --disable-pip-version-check

.PHONY: help test-torch test-torch-wiring test-clients $(TARGETS)

help:
	@echo "targets: $(TARGETS)"
	@echo "networks of timm, diffusers, transformers and others: test-clients"
	@echo "with another torch: test-torch, test-torch-wiring VERSION=2.14.1 [TIER=fast] [TESTS=\"tests/flashjvp/test_api.py ...\"]"

$(TARGETS): $(READY)

sweep:
	$(VENV)/bin/python -m bench.sweep --seq 8192

# On a card that nobody measured: leaves a folder card-<name> to send in. Stopped, it goes on where it was.
measure-this-gpu:
	$(VENV)/bin/python -m bench measure-card

verify:
	$(VENV)/bin/python -m verify

codegen:
	$(VENV)/bin/python -m verify codegen --arch sm_90

# For cards that nobody ran them on, some of the sample, others at each commit; CARDS_SAMPLE=1000 is all of it.
CARDS_SAMPLE ?= 12
codegen-cards:
	$(VENV)/bin/python -m verify codegen --arch sm_80,sm_86,sm_89,sm_100,sm_120 --of-sample $(CARDS_SAMPLE)

# As codegen, with another Triton, which serves this alone: make codegen-triton VERSION=3.6.0 [OF_SAMPLE=48, others at
# each commit]
codegen-triton:
	@test -n "$(VERSION)" || { echo "say which Triton: make codegen-triton VERSION=3.6.0" >&2; exit 2; }
	@test -d $(OTHER) || { $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OTHER).part triton==$(VERSION) && mv $(OTHER).part $(OTHER); }
	PYTHONPATH=$(CURDIR)/$(OTHER) $(VENV)/bin/python -m verify codegen --arch sm_90 $(if $(OF_SAMPLE),--of-sample $(OF_SAMPLE))

train:
	$(VENV)/bin/python -m tvm_ref.train

report:
	$(VENV)/bin/python -m reports.build

test: TIER = fast
test test-all:
	$(call PYTEST,$(VENV)) $(TESTS)

lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Each release of torch has an environment of its own, made on first use: constraints.txt with another torch.
ifdef VERSION
test-torch: $(VENVS)/torch-$(VERSION)/.ready
	$(call PYTEST,$(<D)) $(TESTS)
else
test-torch:
	@echo "expected a release of torch, got none: make test-torch VERSION=2.14.1" >&2; exit 2
endif

# Networks of other packages, in an environment of their own, so that the main one stays small.
test-clients: TIER = clients
test-clients: $(VENVS)/clients/.ready
	$(call PYTEST,$(<D)) tests/clients

test-torch-wiring: TESTS = $(WIRING_TESTS)
test-torch-wiring: test-torch

$(READY): pyproject.toml constraints.txt
	@$(NEW_ENOUGH)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

# On top of the main environment, whose packages it sees: torch alone is 5 GB.
$(VENVS)/clients/.ready: pyproject.toml constraints.txt | $(READY)
	$(PYTHON) -m venv $(@D)
	ls -d $(CURDIR)/$(VENV)/lib/python3*/site-packages > $$(ls -d $(@D)/lib/python3*/site-packages)/main.pth
	$(@D)/bin/python $(INSTALL) -c constraints.txt -e '.[dev,clients]'
	@touch $@

# === is PyPI's own build, which brings the Triton it was released with; == would take a build for CPUs, too.
$(VENVS)/torch-%/.ready: pyproject.toml constraints.txt
	@$(NEW_ENOUGH)
	$(PYTHON) -m venv $(@D)
	grep -v '^torch==' constraints.txt > $(@D)/constraints.txt
	echo 'torch===$*' >> $(@D)/constraints.txt
	$(@D)/bin/python $(INSTALL) -c $(@D)/constraints.txt -e '.[dev]'
	@touch $@
