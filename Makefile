# Every target sets itself up on a fresh clone: .venv holds the tools, the dependencies and the checkout, installed
# editable. Python files are used where they are; the stamps rebuild the C++ when its sources change.
MAKEFLAGS += --no-print-directory
python := .venv/bin/python
# Most tests use one core.
pytest := $(python) -m pytest -q -n 2 --dist worksteal
cpp_sources := $(shell find plugins runtime/csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test test-all check format sanitize bench-cpu clean

demo: .venv/built  ## builds an engine from the repository's model, serves it and asks it something
	@$(python) examples/demo.py

test: check  ## what CI runs
	@$(pytest)
	@$(pytest) tests/interpreted
	@$(python) examples/demo.py

test-all: check  ## the heavy tests too, those of GPU kernels as far as an interpreter runs them, and the sanitizers
	@$(pytest) -m "not gpu"
	@$(pytest) -m "not gpu" tests/interpreted
	@TRITON_INTERPRET=1 $(pytest) -m gpu tests/gpu/test_kernels_*.py
	@$(python) examples/demo.py
	@ci/sanitize.sh
	@ci/sanitize.sh thread

check: .venv/tested  ## lint, formatting and types
	@ci/check.sh

format: .venv/tested
	@ci/check.sh --fix

sanitize: .venv/tested  ## the tests that run C++, under Address-, UndefinedBehavior- and ThreadSanitizer
	@ci/sanitize.sh
	@ci/sanitize.sh thread

bench-cpu: .venv/built  ## enginery beside every CPU rival on this machine; ARGS="--help" tells what else it can
	@$(python) -m benchmarks.cpu $(ARGS)

clean:  ## back to a fresh clone
	rm -rf .venv build dist .mypy_cache .ruff_cache .hypothesis

.venv/built: ci/setup.sh CMakeLists.txt pyproject.toml $(cpp_sources)
	@ci/setup.sh build

.venv/tested: ci/setup.sh pyproject.toml | .venv/built
	@ci/setup.sh test
