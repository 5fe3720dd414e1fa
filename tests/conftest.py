"""Fixtures that cost something: compiled kernels, shared through the build cache, and models, made once a session."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: the kernels' threads need the cores

from collections.abc import Callable, Iterator
from functools import cache as memoize
from pathlib import Path
from typing import Any

import cubins
import kinds
import pytest
from checkpoints import CASES, make_case, make_checkpoint
from hypothesis import HealthCheck, settings

from xlpk import toolchain
from xlpk.backends.cpu import CpuLibrary
from xlpk.model import Model, load_model
from xlpk.toolchain import build_cpu_library

SMALL = {  # checkpoints for tests of the control plane: a step takes well under a millisecond
    "alphabet": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": 17,
        "dtype": "float32",
    },
    "race": {
        "hidden_size": 96,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 131,
    },
}


# The same examples each time and on every machine, however slow it is.
settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")

_build_cubin = toolchain.build_cubin


@functools.wraps(_build_cubin)
def _build_and_record(source: str, cache: Path, **options: Any) -> toolchain.Build:
    cubins.record(source, cache, **options)
    return _build_cubin(source, cache, **options)


toolchain.build_cubin = _build_and_record  # before anybody imports it by name


@pytest.fixture(scope="session", autouse=True)
def few_cubins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails a session that asked nvcc for more than it may, cached or not, in this process or a child."""
    os.environ[cubins.RECORD] = str(tmp_path_factory.mktemp("cubins") / "names")
    yield
    if kinds.real_driver():
        return  # where each model has cubins of its own
    asked = sorted(cubins.recorded())
    allowed = f"{len(asked)} cubins, and tests/cubins.py allows {cubins.MOST}"
    assert len(asked) <= cubins.MOST, "\n".join([allowed, *asked])


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where builds are kept: the checkout's own, so that tests and runs share them."""
    return Path(__file__).parents[1] / "outputs" / "cache"


@pytest.fixture(scope="session")
def cpu_library(cache: Path) -> CpuLibrary:
    return CpuLibrary(build_cpu_library(cache))


@pytest.fixture(scope="session")
def tiny() -> Model:
    """The model that ships."""
    return load_model("tiny")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name in SMALL or in checkpoints.CASES -> its folder, made at first use."""
    root = tmp_path_factory.mktemp("checkpoints")

    @memoize
    def make(name: str) -> Path:
        if name in CASES:
            return make_case(root / name, name)
        return make_checkpoint(root / name, seed=1 + list(SMALL).index(name), **SMALL[name])

    return make


@pytest.fixture(scope="session")
def small(checkpoint: Callable[[str], Path]) -> Callable[[str], Model]:
    """Name of a checkpoint -> the model."""

    @memoize
    def load(name: str) -> Model:
        return load_model(name, checkpoint(name))

    return load
