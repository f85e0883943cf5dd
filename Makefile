# make run    the main job: does SVAG converge, and does SGD match its limit? (ARGS="--seeds 1" passes options on)
# make test   the tests
# Both make the environment $(VENV) first, from nothing but Python >= 3.10 and a C++ compiler, and reuse it later.

VENV ?= .venv
ARGS ?=
export PYTHON ?= python3
export CXX

ifneq ($(words $(VENV)),1)
$(error VENV=$(VENV): make takes no folder whose name has a space)
endif

python := $(VENV)/bin/python
# A file's tests stay in one process, which builds their fixtures once. pyproject.toml doesn't ask for this: one file
# alone is done sooner without.
workers := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
sources := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: run test nightly bench gpu-report lint clean

run: $(VENV)/.installed
	$(VENV)/bin/svag-fast run $(ARGS)

test: $(VENV)/.installed
	$(python) -m pytest $(workers) $(ARGS)

nightly: $(VENV)/.installed
	$(python) -m pytest -m nightly --timeout 3600 $(ARGS)

bench: $(VENV)/.installed $(VENV)/.peers
	$(python) -m pytest bench --benchmark-only $(ARGS)

# With $(PYTHON), whose torch must see the GPU; DRY=1: on a CPU, with the environment's.
gpu-report: $(if $(DRY),$(VENV)/.installed)
	$(if $(DRY),$(python),$(PYTHON)) bench/gpu/gpu_report.py $(if $(DRY),--dry) $(ARGS)

lint: $(VENV)/.installed
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

clean:
	rm -rf $(VENV) $(VENV).unfinished build dist *.egg-info svag_fast/_C.*.so

$(VENV)/.packages: requirements/dev.txt
	requirements/environment.sh packages $(VENV)

$(VENV)/.installed: $(VENV)/.packages $(sources)
	requirements/environment.sh install $(VENV)

$(VENV)/.peers: requirements/bench.txt | $(VENV)/.installed
	requirements/environment.sh peers $(VENV)
