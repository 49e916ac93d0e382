# make demo and make test each set up .venv and build on their own. TORCH picks the torch to build with; the default is a
# CPU build, since the newest one brings gigabytes of CUDA libraries.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
BUILD_TOOLS := 'setuptools>=77' wheel ninja numpy
# The PyPI package that the tests compare with; its own dependencies clash with everything, so it comes without them.
PEER := dualcodec==0.4.2 einops easydict

SOURCES := setup.py pyproject.toml kernels/sources.json $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test bench lint ctest wheel sdist clean
.DELETE_ON_ERROR:

$(VENV)/.python:
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f'Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.python
	$(BIN)/pip install -q $(TORCH) $(BUILD_TOOLS)
	touch $@

# Editable, so Python files need no second build.
$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e .
	touch $@

$(VENV)/.test: $(VENV)/.built
	$(BIN)/pip install -q --no-build-isolation -e '.[test]'
	$(BIN)/pip install -q --no-deps $(PEER) || echo "the PyPI package could not be had: the tests that compare with it are skipped"
	touch $@

$(VENV)/.lint: $(VENV)/.torch
	$(BIN)/pip install -q 'ruff>=0.9' 'mypy>=1.14' 'clang-format>=19'
	touch $@

demo: $(VENV)/.built
	$(BIN)/python -m dualcodec_ext.demo

test: $(VENV)/.test ctest
	$(BIN)/python -m pytest -q

ctest: $(VENV)/.torch
	@if command -v cmake >/dev/null; then \
	  cmake -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release >/dev/null && cmake --build build/cmake -j 2 && ctest --test-dir build/cmake --output-on-failure; \
	else echo "cmake was not found: the C++ tests are not run"; fi

bench: $(VENV)/.built
	$(BIN)/python -m bench decode
	$(BIN)/python -m bench encode
	$(BIN)/python -m bench ops

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc kernels tests/cpp -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy dualcodec_ext

wheel: $(VENV)/.torch
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .

sdist: $(VENV)/.torch
	$(BIN)/pip install -q build
	$(BIN)/python -m build --sdist --no-isolation --skip-dependency-check

clean:
	rm -rf build dist $(VENV) dualcodec_ext/_C*.so dualcodec_ext/_build_record.json *.egg-info
