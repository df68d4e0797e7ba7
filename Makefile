# `make` alone prints what there is. Every target does its own set-up.
SHELL := /usr/bin/env bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NEWEST_FIRST := python3.11 python3.12 python3.13 python3 python
PYTHON ?= $(shell for p in $(NEWEST_FIRST); do $(CLEAN) $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && { echo $$p; break; }; done)

# Variables that lead pip, uv or Python to another environment than .venv. uv reads them before it looks at its own place.
MISLEADING := VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH PIP_PREFIX PIP_PYTHON PIP_ROOT PIP_TARGET PIP_USER \
	UV_PREFIX UV_PROJECT_ENVIRONMENT UV_PYTHON UV_SYSTEM_PYTHON UV_TARGET
unexport $(MISLEADING)
CLEAN := env $(addprefix -u ,$(MISLEADING))  # for $(shell ...), which "unexport" does not reach
# The stamp holds the path of .venv, because the scripts in it name their interpreter by that path. It is written when
# everything is installed, so an interrupted set-up, a moved folder or a removed base Python makes .venv anew.
WELL := $(shell test "$$(cat $(STAMP) 2>&1)" = "$$(cd $(VENV) 2>/dev/null && pwd -P)" \
	&& $(CLEAN) $(BIN)/python -c '' 2>/dev/null && echo yes)

# Not $(abspath ...), which splits a path at its spaces.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Nothing phones home; servers wait long enough on a slow machine; state stays inside the project.
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS := 120
export PREFECT_HOME ?= $(CURDIR)/.onediff/prefect
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.onediff/torch_extensions
# uv does not read pip's settings: hand them on.
FIND_LINKS = $(shell echo "$${PIP_FIND_LINKS:-$$($(PIP) config get global.find-links 2>/dev/null)}" | tr -s ' \n' ',' | sed 's/,$$//')
LOCK_HEAD := '\# Every package and version; written by "make lock" from pyproject.toml.' \
	'\# torch has no local label and no hash, so that each machine takes the build it is configured for.'
PIP := $(BIN)/python -m pip --disable-pip-version-check
# uv stops where it cannot keep its downloads, as in a home without write permission.
NO_CACHE = $(shell folder="$${UV_CACHE_DIR:-$${XDG_CACHE_HOME:-$$HOME/.cache}/uv}"; \
	mkdir -p "$$folder" 2>/dev/null && test -w "$$folder" || echo --no-cache)
UV = UV_FIND_LINKS="$(FIND_LINKS)" $(BIN)/uv $(NO_CACHE) pip
INTO := --python $(BIN)/python

.PHONY: help anew setup run test blender test-all lint services services-status services-stop deploy worker drills backup \
	restore upgrade gc lock deps backbones report ui clean

help:  ## this list
	@echo "OneDiff: two images in, one sentence about what changed out."
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

setup: $(STAMP)  ## virtual environment with the locked packages (once; again when the lock changes)

$(STAMP): requirements.lock pyproject.toml $(if $(WELL),,anew)
	@test -n "$(PYTHON)" || { echo "onediff: Python 3.11 or newer not found: install it, or name it with 'make PYTHON=/path/to/python3.11 ...'" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "onediff: $(PYTHON) is not Python 3.11 or newer: 'make PYTHON=/path/to/python3.11 ...'" >&2; exit 1; }
	@echo "== installing into $(VENV) with $(PYTHON)"
	@$(if $(WELL),,"$(PYTHON)" -m venv --clear $(VENV))
	@rm -f $@
	@$(PIP) install --quiet uv
	@$(UV) install $(INTO) -r requirements.lock || { echo "== uv could not; trying pip, which takes some minutes"; $(PIP) install -r requirements.lock; }
	@$(UV) install $(INTO) --quiet --no-deps -e . || $(PIP) install --quiet --no-deps -e .
	@mkdir -p "$(PREFECT_HOME)"
	@$(BIN)/python -I -m onediff.ops.doctor || { echo "onediff: $(VENV) does not hold what requirements.lock lists (see above), so the set-up is not complete: mend that, then 'make setup'" >&2; exit 1; }
	@$(BIN)/python -I -m onediff.git
	@cd $(VENV) && pwd -P > $(notdir $@)

params.yaml:
	@onediff preset tiny

run: setup params.yaml  ## run the pipeline: data, two training phases, scores, registry; then caption a test pair
	@python -m flows.retrain
	@onediff example

deploy: setup  ## pools, deployments, limits and automations on the Prefect server of PREFECT_API_URL
	@python -m flows.deploy

worker: setup  ## work for a Prefect pool from this folder: make worker POOL=onediff-gpu
	@test -n "$(POOL)" || { echo "onediff: which pool? 'make worker POOL=onediff-cpu' or another that 'prefect work-pool ls' lists" >&2; exit 1; }
	@mkdir -p .onediff
	@ONEDIFF_PROJECT="$(CURDIR)" PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30 python -c \
		'import flows, runpy; runpy.run_module("prefect", run_name="__main__")' worker start --type process --pool "$(POOL)"

drills: setup  ## kill each service, worker, flow and training during retrainings, and print the table (about half an hour)
	@python -m benchmarks.drills

test: setup  ## tests that need about a minute each at most, micro pipeline included
	@# One process a core, four at most; the tests of one file stay together, because they share what was made once.
	@HF_HUB_OFFLINE=1 python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

blender: setup  ## Blender for data.scenes.renderer (bpy, 360 MB)
	@# Without its own wishes: bpy 5 asks for NumPy 1 and runs with NumPy 2.
	@$(UV) install $(INTO) --quiet --no-deps "bpy==$$(sed -n 's/^bpy: "\(.*\)"$$/\1/p' packages.yaml)"

test-all: setup blender  ## every test, slow ones included
	@HF_HUB_OFFLINE=1 python -m pytest -m ""

lint: setup  ## ruff, mypy, and the direction of imports
	@ruff check onediff flows tests benchmarks
	@mypy
	@lint-imports

lock: setup  ## resolve pyproject.toml again into requirements.lock, keeping pins that still fit
	@$(UV) compile $(INTO) --quiet --no-header --no-annotate --extra full --extra dev --extra ray -o requirements.lock pyproject.toml
	@# Packages that only the CUDA build of torch asks for come with it where it is installed.
	@sed -E -i.old -e '/^(nvidia-|cuda-|triton)/d' -e 's/^(torch==[0-9.]+)\+.*/\1/' requirements.lock
	@printf '%s\n' $(LOCK_HEAD) | cat - requirements.lock > requirements.lock.old && mv requirements.lock.old requirements.lock
	@python -m onediff.repro.dependencies

deps: setup  ## write what each stage depends on into dvc.yaml: its code by the imports, its packages at their versions
	@python -m onediff.repro.dependencies

services: setup  ## Prefect server, MLflow server and worker in the background, PostgreSQL behind them where it is installed
	@python -m flows.services start

services-status: setup  ## whether each of them is well
	@python -m flows.services status

services-stop: setup  ## end them: workers first, the database last
	@python -m flows.services stop

backup: setup  ## both databases into DIR=folder, also while the servers run
	@test -n "$(DIR)" || { echo "onediff: name a new folder: make backup DIR=..." >&2; exit 1; }
	@python -m flows.services backup "$(DIR)"

restore: setup  ## both databases as they were in the backup DIR=folder
	@test -n "$(DIR)" || { echo "onediff: name the folder of a backup: make restore DIR=..." >&2; exit 1; }
	@python -m flows.services restore "$(DIR)"

upgrade: setup  ## both databases to the schemas of the installed Prefect and MLflow, after a backup
	@python -m flows.services upgrade

gc: setup  ## what is old and no registered version needs: shown, and with YES=1 removed (DAYS=30)
	@onediff gc $(if $(DAYS),--days $(DAYS)) $(if $(filter 1,$(YES)),--yes)

backbones: setup  ## train the tiny pretrained tower and language model of presets/backbones/tiny again
	@python -m onediff.train.pretrain.backbones

ui: setup  ## MLflow's page with the runs and versions of this project, until Ctrl-C (PORT=5000)
	@python -m onediff.tracking.ui $(PORT)

report: setup  ## open data/report.html
	@test -f data/report.html || { echo "onediff: data/report.html not found: 'make run' makes it" >&2; exit 1; }
	@echo "$(CURDIR)/data/report.html"
	@python -c 'import pathlib, webbrowser; webbrowser.open_new_tab(pathlib.Path("data/report.html").absolute().as_uri())' \
		> /dev/null 2>&1 || true

clean:  ## remove caches of tools; data, models, runs and .venv stay
	@find onediff flows tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
