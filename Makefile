# The commands that people and CI share. They use the activated Python, or the one given: make test PYTHON=...
PYTHON ?= python

.PHONY: build test native suite graphs agents lint bench nightly dist

build: # the package, editable and compiled, with what the other commands need
	$(PYTHON) -m pip install --upgrade 'pip>=25.1'
	BGTASKS_BUILD=require $(PYTHON) -m pip install --editable '.[uvloop]' --group dev

test: # on both twins
	PYTHON='$(PYTHON)' scripts/test_twins

# What the choice between records and native coroutines concerns.
NATIVE = create_task errors fire introspection leaks limits loops shutdown state_machine task_factory threads waiting

native: # the compiled registry with native coroutines, as from Python 3.14 on
	BGTASKS_IMPLEMENTATION=cython $(PYTHON) -m pytest --twin cython --native $(NATIVE:%=tests/test_%.py)

suite: # CPython's own asyncio tests, on tracked tasks
	BGTASKS_IMPLEMENTATION=cython $(PYTHON) -X faulthandler tests/cpython_asyncio.py

graphs: # LangGraph's own tests, on its executors and on ours
	BGTASKS_IMPLEMENTATION=cython $(PYTHON) tests/langgraph_suite.py

agents: # the agent frameworks' own tests, on their managers and on ours, each in an environment of its own
	$(PYTHON) tests/framework_suites.py

lint:
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy
	scripts=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))') && \
		PATH="$$scripts:$$PATH" cython-lint src # which calls pycodestyle by its name

bench:
	BGTASKS_IMPLEMENTATION=cython $(PYTHON) benchmarks/compare.py

nightly: # the tests that take minutes, on both twins
	PYTHON='$(PYTHON)' scripts/test_twins -m nightly

dist: # the sdist, and the wheel from it
	$(PYTHON) -m pip install --upgrade build
	BGTASKS_BUILD=require $(PYTHON) -m build
