# make test ROOM=clipping runs the tests of one room, which is a folder of tests/.
.PHONY: install test lint docs

install:
	pip install -e ".[test]"

test:
	pytest $(if $(ROOM),tests/$(ROOM))

lint:
	ruff check .
	ruff format --check .
	mypy

docs:
	sphinx-build -W --keep-going -n docs build/html
