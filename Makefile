# make demo     the main job on the small checkpoints that ship, without network (two minutes after installing)
# make test     the quick tests, about 13 minutes on two cores; TESTS="tests/test_loss.py -k area" chooses among them
# make test-all all tests, the slow ones too
# make check    lint, formatting, types
# make bench    measurements; writes benchmarks/results/

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all check bench clean

# A file's tests share what is expensive, so they stay together. The C library keeps memory that is freed: clearing it
# anew would take as long as an encoding of a photo.
PYTEST = OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1073741824 \
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

demo: .venv/ready
	rm -rf outputs/demo
	$(BIN)/persam-dreambooth demo --output_dir outputs/demo

test: .venv/ready
	$(PYTEST) $(TESTS)

test-all: .venv/ready
	$(PYTEST) -m 'not gpu and not network' $(TESTS)

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m benchmarks.scale_weights
	$(BIN)/python -m benchmarks.segmentation
	$(BIN)/python -m benchmarks.picture_size
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.binding
	$(BIN)/python -m benchmarks.task
	$(BIN)/python -m benchmarks.twins

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=python3.11 ..."; exit 2; }
	@echo "installing into .venv; the first time this takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv outputs build *.egg-info
