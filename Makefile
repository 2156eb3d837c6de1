SHELL := /bin/bash
PYTHON ?= python3
CODE := setup.py icefall_kd benchmarks egs tests tools

.PHONY: check format test

check:
	$(PYTHON) -m black --check -q $(CODE)
	$(PYTHON) -m isort --check -q $(CODE)
	$(PYTHON) -m ruff check $(CODE)

format:
	$(PYTHON) -m isort -q $(CODE)
	$(PYTHON) -m black -q $(CODE)

test:
	bash tests/run.sh
