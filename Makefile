# make run | test | lab | notebooks | bench. Run `make` for the list.
#
# Which Python: PYTHON=... if given, as it is; else an active virtual or conda environment, if it meets
# requirements.lock; else .venv here, made from the lock on first use (about 2 minutes with a fast line).
# On Linux the default torch wheel brings several GB of CUDA libraries. For the CPU wheel, set pip's own variable
# PIP_EXTRA_INDEX_URL to the CPU index that PyTorch's install page names before the first `make`.

SHELL := /bin/sh
VENV := .venv
STAMP := $(VENV)/.installed
HALF := $(VENV)/.installing
# PROFILE=smoke, laptop or gpu; without it `make run` takes what suits the machine and `make test` takes laptop.
PROFILE ?=

# One thread a process: two threads in each of two processes on two cores were many times slower.
export OMP_NUM_THREADS := 1
export PYTHONPATH := $(CURDIR)
export LIFECYCLE_STORE ?= $(CURDIR)/store
export HF_HUB_OFFLINE := 1

ifdef PYTHON
  PY := $(PYTHON)
  READY :=
else
  ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
  ifneq ($(ACTIVE),)
    ifeq ($(shell "$(ACTIVE)/bin/python" tests/check_env.py >/dev/null 2>&1 && echo whole),whole)
      PY := "$(ACTIVE)/bin/python"
      READY :=
    endif
  endif
  ifndef PY
    PY := $(VENV)/bin/python
    READY := $(STAMP)
  endif
endif
# The console script `lifecycle`, spelt so that it is always this checkout's.
LIFECYCLE := $(PY) -c 'import sys; from lifecycle_lib.lab.cli import main; sys.exit(main())'

.PHONY: help install run test unit lab notebooks papermill bench lint lock clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/make \1\t\2/p' Makefile | expand -t 18

install: $(READY)  ## make .venv from requirements.lock, unless an environment that meets it is active
	@echo using $(PY)

# HALF stands while an install is under way: one found at the start is what an interrupted install left, and .venv is
# then made anew. When pip itself reports a failure (no network, say) it has put things back: HALF goes, and the next
# `make` goes on from there. The stamp is written only when the environment meets the lock.
$(STAMP): requirements.lock pyproject.toml
	@trap 'exit 130' INT TERM HUP; base=python3.11; $$base -c '' 2>/dev/null || base=python3; \
	$$base -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed; neither python3.11 nor python3 is one"; exit 1; }; \
	if [ -e $(HALF) ]; then echo "the last install was interrupted: starting over"; rm -rf $(VENV); fi; \
	mkdir -p $(VENV) && rm -f $(STAMP) && touch $(HALF) && \
	if [ ! -x $(VENV)/bin/pip ]; then echo "[1/4] new environment in $(VENV)"; $$base -m venv $(VENV); fi && \
	pip="$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check" && \
	echo "[2/4] torch" && $$pip torch==$$(sed -n 's/.*"torch==\(.*\)".*/\1/p' pyproject.toml) && \
	echo "[3/4] the rest of requirements.lock" && $$pip -r requirements.lock && \
	echo "[4/4] this package" && $$pip --no-deps --no-build-isolation -e . && \
	$(VENV)/bin/python tests/check_env.py && \
	rm -f $(HALF) && touch $(STAMP) || \
	  { status=$$?; [ $$status -gt 128 ] || rm -f $(HALF); exit $$status; }

run: $(READY)  ## random weights to a released model: every stage, then the report
	$(LIFECYCLE) run $(if $(PROFILE),--profile $(PROFILE))

test: $(READY)  ## lint, unit tests, the whole lifecycle, every notebook compared with its committed outputs
	$(PY) tests/run_all.py --profile $(or $(PROFILE),laptop)

unit: $(READY)  ## lint and unit tests only (no training)
	$(PY) tests/run_all.py --only lint,unit

lint: $(READY)  ## ruff, and the rules for notebooks
	$(PY) -m ruff check .
	$(PY) notebooks/lint.py

lab: $(READY)  ## your own copies of the notebooks, exercises unsolved, in work/notebooks, opened in JupyterLab
	@$(PY) notebooks/student.py work/notebooks
	$(PY) -m jupyterlab --notebook-dir=work/notebooks

notebooks: $(READY)  ## rebuild and execute the notebooks from notebooks/src
	$(PY) notebooks/build.py --jobs 2

papermill: $(READY)  ## rerun every notebook in the smoke profile with another seed
	LIFECYCLE_PAPERMILL=1 $(PY) -m pytest -q -n 2 tests/test_notebooks.py -k papermill

bench: $(READY)  ## every benchmark, one after the other
	$(PY) benchmarks/run.py

lock:  ## write requirements.lock from .venv (after a deliberate change of a pin there)
	$(VENV)/bin/python -m pip freeze --all --exclude-editable | \
	  grep -viE '^((torch|pip|wheel|playwright|greenlet|pyee|lifecycle[-_]lib)==|triton|nvidia|cuda|.* @ )' \
	  | LC_ALL=C sort -f > requirements.lock.tmp
	mv requirements.lock.tmp requirements.lock

clean:  ## remove artifacts, runs and caches; keeps .venv and your copies in work/
	rm -rf store runs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
