# Everything works from a fresh clone: the first target that needs it makes .venv with plain venv and pip.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
SEEDS ?= 0
JOBS ?= 2
# Without the last option pytest-xdist hands out first what has most tests, and not what comes first in our order.
SHARED := -n $(JOBS) --no-loadscope-reorder
SCORES = $(CURDIR)/_build/smoke/scores
PY := .venv/bin/python
STAMP := .venv/.installed
FRESH := $(CURDIR)/_build/fresh

.PHONY: help install book pdf test smoke models notebooks lint audit bench clean

# After the install nothing needs the network, and nothing may quietly use it.
book pdf test smoke lint bench: export HF_HUB_OFFLINE := 1

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv, install the locked packages, fetch and convert the default model

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, \
	%s is %s. Name another one: make PYTHON=python3.11" % (sys.executable, sys.version.split()[0]))'
	@echo "Installing into .venv (a few minutes, about 2 GB) ..."
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(PY) -m kncore fetch
	$(PY) -m kncore fetch minilm-mlm
	@touch $@

book: $(STAMP)  ## run the notebooks and render the book into _build/html; leaves the tree as it was
	$(PY) -m kncore book

pdf: $(STAMP)  ## print the book, from the stored notebooks, into _build/book.pdf; needs Chromium
	$(PY) -m kncore pdf

test: lint  ## lint, unit tests, stored notebooks against fresh runs, the rendered book and its pages
	OMP_NUM_THREADS=1 $(PY) -m pytest tests --ignore tests/test_book.py --ignore tests/test_browser.py \
		$(SHARED) --dist loadgroup
	rm -rf $(FRESH)
	OMP_NUM_THREADS=1 KNCORE_SCORES=$(FRESH)/scores KNCORE_RESULTS=$(FRESH)/results \
		$(PY) -m pytest notebooks --nbval --nbval-current-env --nbval-cell-timeout=1800 $(SHARED) --dist loadfile
	$(MAKE) smoke SCORES=$(FRESH)/scores
	$(PY) -m kncore render
	KNCORE_COMPUTED=$(FRESH)/results:$(CURDIR)/_build/smoke/results KNCORE_BOOK=required \
		$(PY) -m pytest tests/test_book.py tests/test_browser.py $(SHARED) --dist loadgroup

smoke: $(STAMP)  ## every notebook, computed anew on the smallest controlled model, in a few minutes
	rm -rf _build/smoke
	KNCORE_SCORES=$(SCORES) OMP_NUM_THREADS=1 $(PY) -m kncore run --model controlled-gpt2 --out _build/smoke \
		--jobs $(JOBS)

models: $(STAMP)  ## train the controlled models anew (about a quarter of an hour each; SEEDS="0 1 2" for all)
	for seed in $(SEEDS); do for kind in gpt2 llama bert; do \
		OMP_NUM_THREADS=1 $(PY) training/controlled.py $$kind --seed $$seed || exit 1; done; done

notebooks: $(STAMP)  ## for maintainers: refresh the stored notebooks and records (MODEL=... for another model)
	$(PY) -m kncore run $(if $(MODEL),--model $(MODEL))
	$(PY) -m kncore readme

lint: $(STAMP)  ## ruff, check and format; imports go one way
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports --no-cache

audit: $(STAMP)  ## look up known weaknesses of the locked packages; where that cannot be asked, say so and go on
	@rm -rf _build/audit && mkdir -p _build/audit
	@if ! { $(PYTHON) -m venv _build/audit/venv && _build/audit/venv/bin/python -m pip install --quiet \
	  --disable-pip-version-check "$$($(PY) -c 'import tomllib; print(tomllib.load(open("pyproject.toml", \
	  "rb"))["project"]["optional-dependencies"]["audit"][0])')"; } >_build/audit/log 2>&1; then \
	  echo "not audited: pip-audit could not be installed (_build/audit/log)"; \
	elif _build/audit/venv/bin/python -m pip_audit --no-deps --disable-pip --progress-spinner off --timeout 60 \
	  -r requirements.lock >>_build/audit/log 2>&1; then \
	  echo "no known weakness; packages that could not be looked up: $$(grep -c 'could not be audited' _build/audit/log)"; \
	elif grep -q '^Found [0-9]* known' _build/audit/log; then \
	  cat _build/audit/log; exit 1; \
	else echo "not audited: $$(tail -1 _build/audit/log)"; fi

bench: $(STAMP)  ## measure speed, faults, kinds of input, shards and scale, into book/benchmark-*.md (BENCH=... for options)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -r requirements-bench.lock
	$(PY) benchmarks/attribution.py --out book/benchmark-table.md $(BENCH)
	$(PY) benchmarks/effects.py --out book/benchmark-effects.md
	$(PY) benchmarks/tracing.py --stride 3 --out book/benchmark-tracing.md
	$(PY) benchmarks/pages.py --out book/benchmark-pages.md
	$(PY) benchmarks/faults.py --out book/benchmark-faults.md
	$(PY) benchmarks/kinds.py --out book/benchmark-kinds.md
	$(PY) benchmarks/shards.py --out book/benchmark-shards.md
	$(PY) benchmarks/long.py --out book/benchmark-long.md
	$(PY) benchmarks/scale.py --out book/benchmark-scale.md
	$(PY) benchmarks/deviations.py --n 6 --out book/benchmark-deviations.md
	$(PY) benchmarks/gpu.py --out book/benchmark-gpu.md

clean:  ## remove what was built; .venv and the model cache stay
	rm -rf _build .pytest_cache .ruff_cache .hypothesis kncore.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
