# `make` without a target prints the list of targets. Each target first does the set-up that it needs.
SHELL := /usr/bin/env bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NEWEST_FIRST := python3.11 python3.12 python3.13 python3 python
PYTHON ?= $(shell for p in $(NEWEST_FIRST); do $(CLEAN) $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && { echo $$p; break; }; done)

# These variables make pip, uv or Python use another environment than .venv. uv prefers them to its own location.
MISLEADING := VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH PIP_PREFIX PIP_PYTHON PIP_ROOT PIP_TARGET PIP_USER \
	UV_PREFIX UV_PROJECT_ENVIRONMENT UV_PYTHON UV_SYSTEM_PYTHON UV_TARGET
unexport $(MISLEADING)
CLEAN := env $(addprefix -u ,$(MISLEADING))  # for $(shell ...), which ignores "unexport"
# The stamp file contains the path of .venv, because the scripts in .venv contain this path, too. The stamp is written
# after everything was installed. So .venv is created again after an interrupted set-up, after the folder was moved, and
# after the base Python was removed.
VENV_IS_VALID := $(shell test "$$(cat $(STAMP) 2>&1)" = "$$(cd $(VENV) 2>/dev/null && pwd -P)" \
	&& $(CLEAN) $(BIN)/python -c '' 2>/dev/null && echo yes)

# $(abspath ...) does not work here, because it splits a path at spaces.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# No tool sends usage statistics, Prefect's server may start slowly, and all state stays inside the project.
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS := 120
export PREFECT_HOME ?= $(CURDIR)/.onediff/prefect
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.onediff/torch_extensions
# uv does not read pip's settings, so pass pip's find-links to uv.
FIND_LINKS = $(shell echo "$${PIP_FIND_LINKS:-$$($(PIP) config get global.find-links 2>/dev/null)}" | tr -s ' \n' ',' | sed 's/,$$//')
LOCK_HEAD := '\# Every package and version; written by "make lock" from pyproject.toml.' \
	'\# torch has no local label and no hash, so that each machine takes the build it is configured for.'
PIP := $(BIN)/python -m pip --disable-pip-version-check
# uv fails if it cannot write its cache, for example in a home folder without write permission.
NO_CACHE = $(shell folder="$${UV_CACHE_DIR:-$${XDG_CACHE_HOME:-$$HOME/.cache}/uv}"; \
	mkdir -p "$$folder" 2>/dev/null && test -w "$$folder" || echo --no-cache)
UV = UV_FIND_LINKS="$(FIND_LINKS)" $(BIN)/uv $(NO_CACHE) pip
INTO := --python $(BIN)/python

.PHONY: help rebuild setup run test blender heic test-all lint services services-status services-stop deploy worker drills backup \
	restore upgrade gc lock deps backbones report ui clean

help:  ## print this list
	@echo "OneDiff describes in one sentence what changed between two images."
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

setup: $(STAMP)  ## create .venv with the locked packages; needed once, and again after the lock file changed

$(STAMP): requirements.lock pyproject.toml $(if $(VENV_IS_VALID),,rebuild)
	@test -n "$(PYTHON)" || { echo "onediff: Python 3.11 or newer must be installed, but was not found: install it, or run 'make PYTHON=/path/to/python3.11 ...'" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "onediff: Python must be 3.11 or newer, but $(PYTHON) is older: run 'make PYTHON=/path/to/python3.11 ...'" >&2; exit 1; }
	@echo "== installing into $(VENV) with $(PYTHON)"
	@$(if $(VENV_IS_VALID),,"$(PYTHON)" -m venv --clear $(VENV))
	@rm -f $@
	@$(PIP) install --quiet uv
	@$(UV) install $(INTO) -r requirements.lock || { echo "== uv failed; installing with pip, which takes some minutes"; $(PIP) install -r requirements.lock; }
	@$(UV) install $(INTO) --quiet --no-deps -e . || $(PIP) install --quiet --no-deps -e .
	@mkdir -p "$(PREFECT_HOME)"
	@$(BIN)/python -I -m onediff.ops.doctor || { echo "onediff: $(VENV) must contain the packages of requirements.lock, but does not (see above): solve that problem, then run 'make setup'" >&2; exit 1; }
	@$(BIN)/python -I -m onediff.git
	@cd $(VENV) && pwd -P > $(notdir $@)

params.yaml:
	@onediff preset tiny

run: setup params.yaml  ## run the pipeline: make data, train, score, register; then caption a test pair
	@python -m flows.retrain
	@onediff example

deploy: setup  ## create work pools, deployments, limits and automations on the Prefect server PREFECT_API_URL
	@python -m flows.deploy

worker: setup  ## start a worker of a Prefect work pool in this folder: make worker POOL=onediff-gpu
	@test -n "$(POOL)" || { echo "onediff: POOL must be a work pool, but is empty: run 'make worker POOL=onediff-cpu', or use a pool of 'prefect work-pool ls'" >&2; exit 1; }
	@mkdir -p .onediff
	@ONEDIFF_PROJECT="$(CURDIR)" PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30 python -c \
		'import flows, runpy; runpy.run_module("prefect", run_name="__main__")' worker start --type process --pool "$(POOL)"

drills: setup  ## failure drills: kill services, workers, flows and training, check the results; half an hour
	@python -m benchmarks.drills

test: setup  ## run the tests that take at most about a minute each; about 10 minutes in all
	@# One process per core, at most four. The tests of one file run in one process, because they share fixtures.
	@HF_HUB_OFFLINE=1 python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

blender: setup  ## install Blender for data.scenes.renderer (bpy, 360 MB)
	@# --no-deps, because bpy 5 requires NumPy 1 but also works with NumPy 2.
	@$(UV) install $(INTO) --quiet --no-deps "bpy==$$(sed -n 's/^bpy: "\(.*\)"$$/\1/p' packages.yaml)"

heic: setup  ## install the reader of HEIC photographs (pillow-heif, whose wheel contains x265 under the GPL)
	@$(UV) install $(INTO) --quiet "pillow-heif==$$(sed -n 's/^pillow-heif: "\(.*\)"$$/\1/p' packages.yaml)"

test-all: setup blender heic  ## run every test, including the slow ones
	@HF_HUB_OFFLINE=1 python -m pytest -m ""

lint: setup  ## check style (ruff), types (mypy) and the direction of imports
	@ruff check onediff flows tests benchmarks
	@mypy
	@lint-imports

lock: setup  ## write requirements.lock again from pyproject.toml; pins that still fit are kept
	@$(UV) compile $(INTO) --quiet --no-header --no-annotate --extra full --extra dev --extra ray -o requirements.lock pyproject.toml
	@# Only the CUDA build of torch needs these packages, and installs them itself.
	@sed -E -i.old -e '/^(nvidia-|cuda-|triton)/d' -e 's/^(torch==[0-9.]+)\+.*/\1/' requirements.lock
	@printf '%s\n' $(LOCK_HEAD) | cat - requirements.lock > requirements.lock.old && mv requirements.lock.old requirements.lock
	@python -m onediff.repro.dependencies

deps: setup  ## write the code and package versions that each stage depends on into dvc.yaml
	@python -m onediff.repro.dependencies

services: setup  ## start Prefect, MLflow, a worker and, if installed, PostgreSQL in the background
	@python -m flows.services start

services-status: setup  ## show whether each service works
	@python -m flows.services status

services-stop: setup  ## stop the services: workers first, the database last
	@python -m flows.services stop

backup: setup  ## copy both databases into a new folder, DIR=folder; the servers may run
	@test -n "$(DIR)" || { echo "onediff: DIR must be a new folder, but is empty: run 'make backup DIR=/path/to/new/folder'" >&2; exit 1; }
	@python -m flows.services backup "$(DIR)"

restore: setup  ## restore both databases from the backup DIR=folder
	@test -n "$(DIR)" || { echo "onediff: DIR must be the folder of a backup, but is empty: run 'make restore DIR=/path/to/backup'" >&2; exit 1; }
	@python -m flows.services restore "$(DIR)"

upgrade: setup  ## back up both databases, then migrate them to the installed Prefect and MLflow
	@python -m flows.services upgrade

gc: setup  ## list old files that no registered version needs (DAYS=30); YES=1 removes them
	@onediff gc $(if $(DAYS),--days $(DAYS)) $(if $(filter 1,$(YES)),--yes)

backbones: setup  ## train the vision encoder and language model of presets/backbones/tiny again
	@python -m onediff.train.pretrain.backbones

ui: setup  ## show MLflow's page with runs and versions until Ctrl-C (PORT=5000)
	@python -m onediff.tracking.ui $(PORT)

report: setup  ## open data/report.html in a browser
	@test -f data/report.html || { echo "onediff: data/report.html does not exist: 'make run' creates it" >&2; exit 1; }
	@echo "$(CURDIR)/data/report.html"
	@python -c 'import pathlib, webbrowser; webbrowser.open_new_tab(pathlib.Path("data/report.html").absolute().as_uri())' \
		> /dev/null 2>&1 || true

clean:  ## remove the caches of tools; data, models, runs and .venv stay
	@find onediff flows tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
