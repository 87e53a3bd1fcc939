# `make demo` and `make test` need only Python >= 3.11 with venv; everything else they install here.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint docs clean

demo: $(VENV)/.raster
	mkdir -p demo
	$(BIN)/geofm sample scene demo/scene.tif
	$(BIN)/geofm embed demo/scene.tif --weights starter --level L2A -o demo/embedding.tif
	@echo "See demo/embedding.png: true colour beside the embedding's first three components."

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --durations 15

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

$(VENV)/.raster: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[raster]"
	touch $@

$(VENV)/.dev: $(VENV)/.raster
	$(BIN)/python -m pip install --quiet -e ".[raster,train,dask,embeddings,dev]"
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -e ".[raster,docs]"
	touch $@

clean:
	rm -rf demo site build dist .mypy_cache .ruff_cache .pytest_cache
