# make run | bench | bench-peers | test | test-all | soak | lint | clean
# Each makes .venv if there is none and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: run bench bench-peers test test-all soak lint clean

# Where there are NVIDIA's driver and compiler, PyCUDA is installed too (docs/cuda.md); the run says which backend it takes.
HAS_CUDA := $(shell command -v nvcc >/dev/null 2>&1 && ldconfig -p 2>/dev/null | grep -q 'libcuda\.so\.1' && echo yes)

run: $(VENV)/.installed
	$(PY) -m xlpk.run -m backend=auto mode=serial_decode,speculative_decode

bench: $(VENV)/.installed-peers
	$(PY) -m xlpk.bench

bench-peers: $(VENV)/.installed-bench-peers
	$(PY) -m xlpk.bench --peers transformers,llama.cpp

test: $(VENV)/.installed-dev
	$(PY) -m pytest -m "not heavy and not peers and not gpu"

test-all: $(VENV)/.installed-peers $(VENV)/.installed-launchers $(VENV)/.installed-browser
	$(PY) -m pytest

# The control plane under random play, on all cores; goes on where it was. EVENTS=1e8 make soak: fewer.
soak: $(VENV)/.installed
	$(PY) -m xlpk.soak --events $(or $(EVENTS),1e9)

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf outputs/cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --editable .
ifeq ($(HAS_CUDA),yes)
	$(PY) -m pip install --quiet --editable '.[cuda]' || echo 'PyCUDA could not be installed: see docs/cuda.md'
endif
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

# torch is pinned to a release that has a CPU build; unpinned it brings gigabytes of CUDA.
$(VENV)/.installed-peers: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --editable '.[dev,peers]'
	touch $@ $(VENV)/.installed-dev $(VENV)/.installed

# Launchers of sweeps: joblib, submitit and Ray, which is 400 MB.
$(VENV)/.installed-launchers: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --editable '.[dev,launchers]'
	touch $@ $(VENV)/.installed-dev $(VENV)/.installed

# The browser itself is the system's (apt-get install chromium); without it its tests are skipped.
$(VENV)/.installed-browser: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --editable '.[dev,browser]'
	touch $@ $(VENV)/.installed-dev $(VENV)/.installed

# llama.cpp is compiled for this machine's instructions; that takes minutes.
$(VENV)/.installed-bench-peers: pyproject.toml | $(PY)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" $(PY) -m pip install --quiet --editable '.[dev,bench-peers]'
	touch $@ $(VENV)/.installed-peers $(VENV)/.installed-dev $(VENV)/.installed
