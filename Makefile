# The whole house from one place; every target makes .venv first if it is missing or out of date.
PYTHON ?= python3
# TORCH=cpu (or cu126, …) takes torch from PyTorch's own index instead of PyPI.
TORCH ?=
BIN := .venv/bin
# The tests of one file share what is slow to start, and a chapter's cells their kernel.
ON_ALL_CORES := --numprocesses logical --maxprocesses 8 --dist loadfile
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help book test lint types notebooks lab serve live bench requirements clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(if $(TORCH),$(BIN)/pip install --quiet --index-url https://download.pytorch.org/whl/$(TORCH) torch==2.13.0)
	$(BIN)/pip install --quiet -r requirements.txt
	@touch $@

book: $(INSTALLED) ## execute every notebook and build the HTML, warnings as errors
	$(BIN)/jupyter-book build -W --keep-going .
	@echo "Open file://$(CURDIR)/_build/html/index.html"

# The build has executed every chapter with this machine's own settings; here once more with others,
# and what they print is compared with what is stored.
test: lint types book ## everything that must hold
	$(BIN)/pytest $(ON_ALL_CORES)
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(BIN)/pytest $(ON_ALL_CORES) --nbval book

lint: $(INSTALLED) ## style of the code, notebooks included
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## mypy on the library
	$(BIN)/mypy

notebooks: $(INSTALLED) ## execute the notebooks in place and normalize them for a commit
	$(BIN)/python book/_tools/notebooks.py

lab: $(INSTALLED) ## JupyterLab on the notebooks
	$(BIN)/jupyter lab book

serve: book ## the built book on http://localhost:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 -d _build/html

live: book ## the built book with Python behind it: edit and run every cell where it stands
	$(BIN)/python book/_tools/live.py

bench: $(INSTALLED) ## run the benchmarks, writing autograd_lib/report/records/
	@for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python $$script || exit 1; done

requirements: $(INSTALLED) ## resolve requirements.txt anew from pyproject.toml
	$(BIN)/pip install --quiet uv
	@{ echo "# Every package of the book and its tests, resolved by 'make requirements'; do not edit."; \
	  echo "# What a CUDA build of torch brings along is left to torch, which pins it exactly."; \
	  $(BIN)/uv pip compile --universal --python-version 3.11 --upgrade --upgrade-package torch==2.13.0 \
	    --extra test --no-header --no-annotate --quiet pyproject.toml | grep -Ev '^(nvidia-|cuda-|triton)'; \
	  echo "-e ."; } > requirements.new && mv requirements.new requirements.txt

clean: ## remove what was built; .venv stays
	rm -rf _build .mypy_cache .pytest_cache .ruff_cache .hypothesis
