"""Weights without a checkpoint: every element is a function of (seed, tensor's name, index) by Philox4x32-10."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from xlpk.dtypes import ELEMENT_BYTES, NUMPY_DTYPE, Array, bf16_encode
from xlpk.errors import InputError, shown

Fill: TypeAlias = Callable[[Array, int, int, float], None]  # (values 1-D, tensor_id, seed, scale): fills in place

HASH_SCALE = np.float32(math.sqrt(3) * 0.02)  # uniform on +-scale: standard deviation 0.02, Llama's initial one
HASH_ALIGN = 64  # bytes: a cache line


def philox4x32(counter: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Philox4x32-10: counters [4, n] and one key -> words [4, n].

    Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = (row.astype(np.uint64) for row in counter)
    k0, k1 = key
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        one, two = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)  # 32 x 32 -> 64 bits: cannot overflow
        c0, c1, c2, c3 = (two >> high) ^ c1 ^ np.uint64(k0), two & low, (one >> high) ^ c3 ^ np.uint64(k1), one & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def tensor_id(name: str) -> int:
    """The word of the counter that belongs to a tensor."""
    return zlib.crc32(name.encode())


def hash_tensor(name: str, shape: tuple[int, ...], seed: int, dtype: str) -> Array:
    """The tensor `name` of a model without a checkpoint -> [shape], held as NUMPY_DTYPE says.

    Norm vectors are 1, biases 0. Element i is a function of (seed, name, i) alone, so any part can be made anywhere:
    with counter = (low 32 bits of i/4, its high, crc32(name), 0) and key = (low, high 32 bits of the seed), the word
    Philox4x32-10[i % 4], as a signed number, times 2^-31, times HASH_SCALE, in float32; for bf16 and fp16 then rounded
    to nearest even.
    """
    check_hash(seed, dtype)
    values = aligned(math.prod(shape), dtype)
    if len(shape) == 1:
        one = 0.0 if name.endswith(".bias") else 1.0
        values[...] = bf16_encode(one) if dtype == "bf16" else one
    else:
        hash_into(values, tensor_id(name), seed)
    return values.reshape(shape)


def hash_into(values: Array, tensor: int, seed: int) -> None:
    """Fills `values` (1-D). In pieces that stay in the cache."""
    piece = 1 << 16  # elements, a multiple of 4
    key = seed & 0xFFFFFFFF, seed >> 32
    for start in range(0, values.size, piece):
        count = min(piece, values.size - start)
        index = np.arange(start // 4, (start + count + 3) // 4, dtype=np.uint64)
        counter = np.zeros((4, index.size), dtype=np.uint32)
        counter[0], counter[1], counter[2] = index & np.uint64(0xFFFFFFFF), index >> np.uint64(32), tensor
        words = np.ascontiguousarray(philox4x32(counter, key).T).reshape(-1)[:count]
        floats = words.view(np.int32).astype(np.float32) * np.float32(2.0**-31) * HASH_SCALE
        values[start : start + count] = bf16_encode(floats) if values.dtype == np.uint16 else floats


def aligned(count: int, dtype: str) -> Array:
    """1-D, uninitialised, starting on a cache line."""
    size = count * ELEMENT_BYTES[dtype]
    raw = np.empty(size + HASH_ALIGN, dtype=np.uint8)
    start = -raw.ctypes.data % HASH_ALIGN
    return raw[start : start + size].view(NUMPY_DTYPE[dtype])


def check_hash(seed: int, dtype: str) -> None:
    if not 0 <= seed < 1 << 64:
        raise InputError("model.seed", seed, "0 to 2^64 - 1")
    if dtype not in ELEMENT_BYTES:
        raise InputError("model.dtype", shown(dtype), f"one of {', '.join(ELEMENT_BYTES)}")
