# Everything from a fresh clone: `make demo` and `make test` create .venv, install with constraints.txt and run.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test types mutants docs models clean

demo: $(VENV)/.demo
	$(BIN)/dpft demo --output demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

types: $(VENV)/.dev
	$(BIN)/python -m mypy

mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants/run.py

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

models: $(VENV)/.dev
	$(BIN)/python benchmarks/models.py smollm2-135m minilm-l6 --output models

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) demo runs models
