# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test test-all lint format bench gpu gpu-quick wheel check-wheel clean help

help:
	@echo "make demo        train a captioner on real pictures, MLE against SMILE, and draw what it says"
	@echo "make test        the tests (make test-all: the slow ones too)"
	@echo "make bench       the benchmarks of this machine's CPU"
	@echo "make gpu         tests and benchmarks on a CUDA machine, from the source tree, without network (gpu-quick: in 3 minutes)"
	@echo "make lint format wheel check-wheel clean"

# The environment, the pinned dependencies and the compiled extension; again when any of these changes.
$(READY): pyproject.toml setup.py constraints.txt $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/fastcap demo --out build/demo

# A process a core, on one core each: most tests are small, and two of them at a time take half the time.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n auto --dist worksteal

test-all: $(READY)
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

bench: $(READY)
	$(BIN)/fastcap bench

# Uses the machine's own python3 and torch, installs nothing, and writes at most 8 files into $$OUT or build/gpu.
gpu:
	$(PYTHON) benchmarks/gpu.py

gpu-quick:
	$(PYTHON) benchmarks/gpu.py --quick

wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m build --outdir dist

# The wheel and the sdist, each installed into an empty environment and used.
check-wheel: wheel
	for kind in whl tar.gz; do \
	  rm -rf build/empty && $(PYTHON) -m venv build/empty && \
	  build/empty/bin/pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.$$kind && \
	  (cd build && empty/bin/python -c "import fastcap, torch; \
	  print(fastcap.__file__); assert fastcap.backends()['cpp'], fastcap.backends()['cpp'].reason; \
	  x = torch.randn(2, 5, 50, requires_grad=True); \
	  fastcap.functional.subset_cross_entropy(x, torch.randint(50, (2, 5))).backward(); print('loss and gradient: ok')") || exit 1; \
	done

clean:
	rm -rf build dist .venv *.egg-info fastcap/*.so
