# The menu. Every target sets up .venv first when it is missing or out of date.
PY := .venv/bin/python
# EXTRAS=gpu,dev for CUDA builds; remembered in .venv, cpu,dev at first.
# Two spinning threads on a busy box are far slower than one; ranks use the cores.
export OMP_NUM_THREADS ?= 1
# A worker holds a model, an engine and up to two ranks: about 4 GiB.
TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-text test check bench bench-gpu chaos docs clean

help:  ## this menu
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 10

venv:  ## make .venv (EXTRAS=gpu,dev for CUDA builds); instant when up to date
	@scripts/setup_env.sh

demo: venv  ## train a small search agent on this machine, CPU only, and measure it before and after
	@scripts/demo.sh

demo-text: venv  ## train a pretrained language model of 135 M parameters to look things up (half an hour)
	@scripts/demo_text.sh

test: venv  ## run all tests, independent files side by side (TEST_WORKERS=2)
	$(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile

check: venv  ## style, types and import rules
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(PY) -m pytest -q tests/test_imports.py

bench: venv  ## measure speed and append to bench/results.jsonl
	@set -e; for script in scripts/bench_*.py; do echo "== $$script"; $(PY) $$script; done

bench-gpu: venv  ## measure an update of a 4 B model on a GPU (random weights)
	$(PY) scripts/bench_gpu.py

chaos: venv  ## train against search servers that misbehave, check it, write docs/reliability.md
	@scripts/chaos.sh

docs: venv  ## write docs/recipe.md from the code and the site into build/docs, links checked
	$(PY) scripts/write_recipe_reference.py
	$(PY) -m sphinx -q -W --keep-going docs build/docs
	@echo build/docs/index.html

clean:  ## remove caches (not .venv, not runs/)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
