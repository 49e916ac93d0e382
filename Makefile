# make demo and make test each set up .venv and build on their own; a second run does what changed. TORCH is what pip
# is asked for: the newest torch may bring gigabytes of CUDA libraries.
PYTHON ?= $(firstword $(foreach python,python3 python3.13 python3.12 python3.11,$(shell \
  $(python) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" 2>/dev/null && echo $(python))) python3)
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The PyPI package that the tests compare with; its own dependencies clash with everything, so it comes without them.
PEER := dualcodec==0.4.2 einops easydict
CMAKE := $(shell command -v cmake || echo $(abspath $(BIN))/cmake)
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)

# A torch with CUDA, to build and check the CUDA code with; it needs nvcc of the same major version, and no GPU.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV ?= .venv-cuda
CUDA_ARCHS ?= 8.0;9.0a
ALL_CUDA_ARCHS := 7.5;8.0;8.6;8.9;9.0a;10.0;12.0+PTX

PACKAGING := setup.py pyproject.toml dualcodec_ext/_version.py
SOURCES := $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.json')
CPP := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) $(shell find tests/cpp tests/simt -name '*.cpp' -o -name '*.h')

# extra NAME: the packages of an extra, one a line, to install them without building anything.
extra = $(BIN)/python -c "import sys, tomllib; \
  print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'][sys.argv[1]], sep='\n')" $(1)

.PHONY: build demo test pytest ctest emulated browser cuda cuda-archs gpu-check neon bench bench-cpu lint wheel sdist peers clean
.DELETE_ON_ERROR:

build: $(VENV)/.built

demo: $(VENV)/.built
	$(BIN)/python -m dualcodec_ext.demo

test: ctest pytest

# Many tests keep one core busy: two processes share the files, and threads that wait leave the cores to the other's.
TEST_PROCESSES ?= 2
pytest: $(VENV)/.built $(VENV)/.test
	$(BIN)/python tests/simt_cases.py
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile

ctest: $(CMAKE) $(VENV)/.torch
	$(CMAKE) -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release >/dev/null
	$(CMAKE) --build build/cmake -j $(JOBS)
	$(dir $(CMAKE))ctest --test-dir build/cmake --output-on-failure

# The kernels for AVX-512 and AMX, compiled for AVX2 with their instructions emulated; nothing to do where the CPU has
# both.
emulated: $(VENV)/.built $(VENV)/.test
	$(BIN)/python tests/emulated.py

# The CUDA code, built for CUDA_ARCHS with a CUDA torch in an environment of its own and checked there without a GPU:
# it imports, registers, keeps its registers and spills nothing, and every kernel has run on the CPU.
cuda: $(CUDA_VENV)/.torch $(VENV)/.test
	DUALCODEC_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST='$(CUDA_ARCHS)' \
	  $(CUDA_VENV)/bin/python -m pip install -q --no-build-isolation --no-deps --force-reinstall .
	$(CUDA_VENV)/bin/pytest -q tests/test_cuda_module.py
	DUALCODEC_EXT_CUDA_MODULE=$$(cd / && $(abspath $(CUDA_VENV))/bin/python -c 'import dualcodec_ext._C as c; print(c.__file__)') \
	  $(BIN)/python -m pytest -q -rs tests/test_zz_simt_coverage.py

# As `cuda`, for every architecture.
cuda-archs:
	$(MAKE) cuda CUDA_ARCHS='$(ALL_CUDA_ARCHS)'

# The kernels for 64-bit Arm, by a cross compiler, their tests under QEMU: Debian's g++-aarch64-linux-gnu and qemu-user.
ARM := aarch64-linux-gnu-g++ -std=c++20 -O2 -ffp-contract=off -Wall -Wextra -DDCX_ISA=0 -static -Ikernels
UNITS = $(shell python3 -c "import json; d = json.load(open('kernels/sources.json')); \
  print(*('kernels/' + unit for unit in d['per_isa'] + d['once']))")
neon:
	mkdir -p build/neon
	for name in test_runtime test_kernels; do $(ARM) tests/cpp/$$name.cpp $(UNITS) -o build/neon/$$name -lpthread \
	  && qemu-aarch64 build/neon/$$name || exit 1; done

# Debian's browser and its driver, for the test of the web page; without them that test is skipped, and says so.
BROWSER := chromium chromium-driver
browser:
	@if [ -x /usr/bin/chromium ] && [ -x /usr/bin/chromedriver ]; then :; \
	elif [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	  echo "$(BROWSER): root installs them with apt; until then the test of the web page is not run"; \
	else { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(BROWSER); } \
	  >/dev/null || echo "$(BROWSER) could not be installed: the test of the web page is not run"; fi

bench: $(VENV)/.built
	$(BIN)/python -m bench decode
	$(BIN)/python -m bench encode
	$(BIN)/python -m bench ops

# What the README quotes of a CPU: the runs, their goals, the chart, the README's tables. Piece by piece: make bench-cpu
# PIECES=decode-12hz_v1,encode-12hz_v1; the last three steps take the results that are there.
PIECES ?=
bench-cpu: $(VENV)/.built $(VENV)/.bench
	$(BIN)/python -m bench.cpu_runs $(if $(PIECES),--only $(PIECES))
	$(BIN)/python -m bench.goals bench/results/cpu-*.json
	$(BIN)/python -m bench.chart bench/results/cpu-*.json --out docs/cpu-speed.png
	$(BIN)/python -m bench.readme

# On a machine with a GPU, torch, nvcc, ninja and pytest; nothing is installed. Within nine minutes, or part by part:
# make gpu-check PART=test,bench RESULTS=/tmp/results; PART=tuned: peers that torch.compile tunes for minutes
PART ?= build,test,sanitize,bench
RESULTS ?= bench/results
LOGS ?= build/gpu-check
gpu-check:
	$(PYTHON) -m bench.gpu_check --parts $(PART) --results $(RESULTS) --logs $(LOGS)

# The PyPI package, to be carried to a machine without network; gpu-check finds it there, others by DUALCODEC_EXT_PEERS.
peers:
	rm -rf build/peers
	$(PYTHON) -m pip --disable-pip-version-check install -q --no-deps --target build/peers $(PEER)

# With the tests' packages there, so that mypy sees the same types on every machine.
lint: $(VENV)/.lint $(VENV)/.built $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy dualcodec_ext

wheel: $(VENV)/.torch
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .

sdist: $(VENV)/.torch
	$(PIP) install -q build
	$(BIN)/python -m build --sdist --no-isolation --skip-dependency-check

clean:
	rm -rf build dist $(VENV) $(CUDA_VENV) dualcodec_ext/_C*.so dualcodec_ext/_build_record.json *.egg-info

$(VENV)/.python:
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit( \
	  f'Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.python
	$(PIP) install -q $(TORCH) 'setuptools>=77' ninja numpy
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(PACKAGING)
	$(PIP) install -q --no-build-isolation -e .
	touch $@

# Editable, so that only C++ needs a second build.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(call extra,test) > $@.txt
	$(PIP) install -q -r $@.txt
	$(PIP) install -q --no-deps $(PEER) || echo "the PyPI package could not be had: the tests that compare with it are skipped"
	touch $@

# zentorch comes for one minor version of torch, and not for every machine.
$(VENV)/.bench: $(VENV)/.test
	$(call extra,bench) > $@.txt
	$(PIP) install -q -r $@.txt
	$(PIP) install -q "zentorch==$$($(BIN)/python -c 'import torch; print(torch.__version__.rsplit(".", 1)[0])').*" \
	  || echo "zentorch could not be had: its rows stay empty"
	touch $@

$(CUDA_VENV)/.torch: $(VENV)/.test
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip --disable-pip-version-check install -q $(CUDA_TORCH) 'setuptools>=77' ninja numpy
	$(CUDA_VENV)/bin/python -m pip --disable-pip-version-check install -q pytest pytest-benchmark hypothesis safetensors
	touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(call extra,lint) > $@.txt
	$(PIP) install -q -r $@.txt
	touch $@

$(abspath $(BIN))/cmake: $(VENV)/.torch
	$(PIP) install -q 'cmake>=3.20'
