"""The compiled shim.cpp with arrays in and out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backends.memory import WEIGHT_TYPES
from xlpk.dtypes import OUR_DTYPE
from xlpk.toolchain import build_shared

Array = np.ndarray[Any, Any]


class Shim:
    """shim.cpp built with the flags of the kernels and `extra_flags`; by default the vector path on every machine."""

    def __init__(self, cache: Path, extra_flags: Sequence[str] = ("-DXL_NO_AMX",)) -> None:
        build = build_shared(Path(__file__).with_name("shim.cpp"), cache, extra_flags=extra_flags)
        self.dll = ctypes.CDLL(str(build.path))
        self.dll.shim_sampling_value.restype = ctypes.c_float
        self.dll.shim_keep_best.restype = ctypes.c_uint64

    def map(self, name: str, values: Array, result: Any = np.float32) -> Array:
        """shim_<name> over a 1-D array."""
        values = np.ascontiguousarray(values)
        out = np.empty(values.size, result)
        getattr(self.dll, f"shim_{name}")(_address(values), _address(out), ctypes.c_uint64(values.size))
        return out

    def ns_of_ticks(self, ticks: Array, span_ns: int, span_ticks: int) -> Array:
        """[n] ticks -> [n] ns, of a clock that counted `span_ticks` in `span_ns`."""
        ticks = np.ascontiguousarray(ticks, np.uint64)
        out = np.empty_like(ticks)
        span = ctypes.c_uint64(span_ns), ctypes.c_uint64(span_ticks)
        self.dll.shim_ns_of_ticks(_address(ticks), *span, _address(out), ctypes.c_uint64(ticks.size))
        return out

    def sincos(self, position: Array, frequency: Array) -> tuple[Array, Array]:
        position, frequency = position.astype(np.int32), frequency.astype(np.float64)
        sine, cosine = np.empty(position.size, np.float32), np.empty(position.size, np.float32)
        arrays = map(_address, (position, frequency, sine, cosine))
        self.dll.shim_sincos(*arrays, ctypes.c_uint64(position.size))
        return sine, cosine

    def philox(self, counter: Array, key: int) -> Array:
        """[n, 4] -> [n, 4]"""
        words = np.array(counter, np.uint32, order="C")
        self.dll.shim_philox(_address(words), ctypes.c_uint64(key), ctypes.c_uint64(len(words)))
        return words

    def gumbel(self, seed: int, positions: int, tokens: int) -> Array:
        """[positions, tokens]"""
        out = np.empty((positions, tokens), np.float32)
        self.dll.shim_gumbel(ctypes.c_uint64(seed), positions, tokens, _address(out))
        return out

    def sampling_value(self, logit: float, temperature: float, seed: int, position: int, token: int) -> float:
        floats = ctypes.c_float(logit), ctypes.c_float(temperature)
        return float(self.dll.shim_sampling_value(*floats, ctypes.c_uint64(seed), position, token))

    def pack(self, value: Array, token: Array) -> tuple[Array, Array]:
        """(packed candidates, the tokens unpacked from them)"""
        value, token = value.astype(np.float32), token.astype(np.int32)
        packed, unpacked = np.empty(value.size, np.uint64), np.empty(value.size, np.int32)
        arrays = map(_address, (value, token, packed, unpacked))
        self.dll.shim_pack(*arrays, ctypes.c_uint64(value.size))
        return packed, unpacked

    def filter(
        self,
        logits: Array,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        seed: int = 0,
        count: int = 0,
    ) -> tuple[Array, Array]:
        """Logits [n] -> (kept [n] bool, picked token at positions 0 .. count)"""
        logits = np.ascontiguousarray(logits, np.float32)
        kept, picked = np.zeros(logits.size, np.uint8), np.zeros(count, np.int32)
        rule = ctypes.c_float(temperature), top_k, ctypes.c_float(top_p), ctypes.c_float(min_p)
        self.dll.shim_filter(
            _address(logits), logits.size, *rule, ctypes.c_uint64(seed), count, _address(kept), _address(picked)
        )
        return kept.astype(bool), picked

    def logprobs(self, logits: Array, count: int) -> tuple[float, list[int], list[float]]:
        """(log of the sum of exp, most likely ids, their logprobs)"""
        logits = np.ascontiguousarray(logits, np.float32)
        out = np.zeros((), layout.LOGPROBS.dtype)
        self.dll.shim_logprobs(_address(logits), logits.size, count, _address(out))
        n = int(out["n"])
        return float(out["log_sum"]), out["ids"][:n].tolist(), out["values"][:n].tolist()

    def adjust(self, logits: Array, counts: Array, bias: Array, slot: Array, position: int) -> Array:
        """Logits [n] after bias and penalties of a Slot record, in the row at `position`."""
        logits, out = np.ascontiguousarray(logits, np.float32), np.empty(logits.size, np.float32)
        counts, bias = counts.astype(np.int32), bias.astype(np.float32)
        arrays = _address(counts), _address(bias), _address(slot)
        self.dll.shim_adjust(_address(logits), logits.size, *arrays, position, _address(out))
        return out

    def store_some(self, values: Array, count: int, *, plain: bool) -> Array:
        """[32] -> [32]: the first `count`, the others NaN."""
        out = np.full(32, np.nan, np.float32)
        self.dll.shim_store_some(_address(values), count, int(plain), _address(out))
        return out

    def gumbel_tile(self, seed: int, position: int, token: int, width: int) -> Array:
        """[width], width <= 16: of tokens `token` .. `token + width`."""
        out = np.empty(width, np.float32)
        self.dll.shim_gumbel_tile(ctypes.c_uint64(seed), position, token, width, _address(out))
        return out

    def keep_best(self, values: Array, token: int) -> int:
        """The candidate that stays of [n] values of tokens `token` .. `token + n`; 0: none."""
        values = np.ascontiguousarray(values, np.float32)
        return int(self.dll.shim_keep_best(_address(values), token, values.size))

    def takes_many(self, count: int, k: int) -> bool:
        """Whether so many rows of bf16 are multiplied in another way than few."""
        return bool(self.dll.shim_takes_many(count, k))

    def dot(self, w: Array, x: Array, *, plain: bool) -> Array:
        """w [n, k] as dtypes.NUMPY_DTYPE holds it, x [count, k] float32 or bf16 -> [count, n]"""
        kind = WEIGHT_TYPES[OUR_DTYPE[w.dtype]]
        w, x, rounded = np.ascontiguousarray(w), np.ascontiguousarray(x), x.dtype != np.float32
        out = np.empty((len(x), len(w)), np.float32)
        sizes = len(w), x.shape[1], len(x), int(plain)
        self.dll.shim_dot(_address(w), int(kind), _address(x), int(rounded), *sizes, _address(out))
        return out


def _address(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded once: the product is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def ulps(value: Array, exact: Array) -> Array:
    """|value - exact| in units of the last place of float32 at `exact` (float64), subnormals included."""
    exponent = np.maximum(np.frexp(exact)[1] - 24, -149)
    return np.abs(value.astype(np.float64) - exact) / np.ldexp(1.0, exponent)
