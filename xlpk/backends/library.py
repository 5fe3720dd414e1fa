"""The compiled kernels of the CPU with their C signatures: the loop's teams, its rings, its control, hash weights."""

from __future__ import annotations

import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from xlpk.backends.memory import WEIGHT_TYPES
from xlpk.dtypes import OUR_DTYPE
from xlpk.toolchain import Build

_FILL_PART = 1 << 20  # elements of hash weights a thread makes at a time; a multiple of 4


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CpuLibrary:
    """`kernels/cpu.cpp` as ctypes functions. Every backend uses its rings; the host's control is its too."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.dll = ctypes.CDLL(str(build.path))
        pointer, i32, u64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint64
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "xl_layout_version": (i32, []),
            "xl_threads_per_team": (i32, []),
            "xl_clock_ns": (u64, []),
            "xl_refusal": (ctypes.c_char_p, []),
            "xl_open": (pointer, [pointer, pointer, i32, i32, i32, i32]),
            "xl_close": (None, [pointer]),
            "xl_submit": (i32, [pointer, pointer, pointer]),
            "xl_cancel": (i32, [pointer, u64]),
            "xl_take_events": (i32, [pointer, pointer, pointer, i32]),
            "xl_take_steps": (i32, [pointer, pointer, i32]),
            "xl_take_trace": (i32, [pointer, pointer, i32]),
            "xl_aborted": (i32, [pointer]),
            "xl_left": (u64, [pointer]),
            "xl_stop": (None, [pointer]),
            "xl_ping": (u64, [pointer, u64]),
            "xl_heartbeat": (pointer, [pointer, u64]),
            "xl_heartbeat_end": (None, [pointer]),
            "xl_control": (i32, [pointer, pointer]),
            "xl_prepare": (None, [pointer, pointer]),
            "xl_collect_patches": (i32, [*[pointer] * 8, i32]),
            "xl_launch": (None, [pointer, i32, i32]),
            "xl_synchronize": (i32, [pointer]),
            "xl_fill_hash": (None, [pointer, u64, u64, ctypes.c_uint32, u64, ctypes.c_float, i32]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.dll, name)
            function.restype, function.argtypes = result, arguments

    def fill_hash(self, array: np.ndarray[Any, Any], tensor_id: int, seed: int, scale: float) -> None:
        """Weights by counter hash into a contiguous array as weights.NUMPY_DTYPE holds it; the bits of hash_tensor."""
        kind = WEIGHT_TYPES[OUR_DTYPE[array.dtype]]

        def fill(first: int) -> None:
            count = min(_FILL_PART, array.size - first)
            self.dll.xl_fill_hash(array[first:].ctypes.data, first, count, tensor_id, seed, scale, int(kind))

        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(fill, range(0, array.size, _FILL_PART)))

    def clock_error_ns(self) -> int:
        """Half the narrowest bracket of a reading of the host's clock between two of Python's."""
        narrowest = 1 << 62
        for _ in range(32):
            before = time.monotonic_ns()
            self.dll.xl_clock_ns()
            narrowest = min(narrowest, time.monotonic_ns() - before)
        return narrowest // 2
