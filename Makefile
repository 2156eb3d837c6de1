SHELL := /bin/bash
PYTHON ?= python3
CODE := setup.py icefall_kd benchmarks egs tests tools

.PHONY: check docs format test

check:
	$(PYTHON) -m black --check -q $(CODE)
	$(PYTHON) -m isort --check -q $(CODE)
	$(PYTHON) -m ruff check $(CODE)

format:
	$(PYTHON) -m isort -q $(CODE)
	$(PYTHON) -m black -q $(CODE)

test:
	bash tests/run.sh
docs:
	$(PYTHON) -m sphinx -W --keep-going -q -b html -c docs . docs/build
	$(PYTHON) tools/check_links.py docs/build
