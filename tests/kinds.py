"""The kinds of backend that one suite runs on: the CPU's, and the GPU's three, on a GPU or through the stand-in."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import cache as memoize
from pathlib import Path
from typing import Any

import pytest

from xlpk.backends.cpu import CpuBackend
from xlpk.toolchain import find_nvcc

CACHE = Path(__file__).resolve().parents[1] / "outputs" / "cache"
GPU = ("persistent", "launched", "graph")
HEAVY_GPU = [pytest.param(name, marks=pytest.mark.heavy) for name in GPU]
KINDS = ["cpu", *HEAVY_GPU]

current = "cpu"


@memoize
def real_driver() -> bool:
    """Whether the machine has NVIDIA's driver and a device. Initialises nothing."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return not hasattr(library, "xlpk_standin_counters") and os.path.exists("/dev/nvidiactl")


def why_not() -> str:
    """Why GPU backends cannot run here; empty: they can."""
    if importlib.util.find_spec("pycuda") is None:
        return "PyCUDA is not installed: python tests/standin/build_pycuda.py"
    if find_nvcc() is None:
        return "nvcc is not on PATH"
    return ""


@memoize
def _ready() -> None:
    """Puts this process on the stand-in where there is no GPU."""
    if not real_driver() and "pycuda.driver" not in sys.modules:
        from standin.hook import install

        install(CACHE)


@contextlib.contextmanager
def on(kind: str) -> Iterator[None]:
    """Backends made inside are of this kind. Skips where it cannot run."""
    global current
    if kind in GPU:
        if reason := why_not():
            pytest.skip(reason)
        _ready()
    before, current = current, kind
    try:
        yield
    finally:
        current = before


def environment() -> dict[str, str]:
    """Of a child process that may use the current kind."""
    if current == "cpu" or real_driver():
        return dict(os.environ)
    from standin.hook import environment as of_standin

    return of_standin(CACHE)


def make(**options: Any) -> Any:
    """A backend of the current kind. `threads`: teams. `orchestration`: the CPU's."""
    options.setdefault("cache", CACHE)
    if current == "cpu":
        return CpuBackend(**options)
    options.pop("orchestration", None)
    options["teams"] = options.pop("threads", 0)
    options.setdefault("spin_deadline_s", 30.0)
    if current == "persistent":
        from xlpk.backends.persistent import PersistentBackend

        return PersistentBackend(**{"watch": False} | options)  # a process a test; test_gpu_faults has it
    if current == "launched":
        from xlpk.backends.launched import LaunchedBackend

        return LaunchedBackend(**options)
    from xlpk.backends.graph import GraphBackend

    return GraphBackend(**options)
