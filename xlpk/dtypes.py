"""Element types: their names in our config, in Hugging Face's files and in memory, and bf16 to and from float32."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}  # the dtypes a matrix may have
KV_DTYPES = ("bf16", "fp32")  # those that the pages of keys and values may have
# How each is held: bf16 as its bits.
NUMPY_DTYPE: dict[str, type[np.generic]] = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}
OUR_DTYPE = {np.dtype(held): ours for ours, held in NUMPY_DTYPE.items()}
FILE_DTYPE = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}  # safetensors' word -> ours
CONFIG_DTYPE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # config.json's word -> ours
CONFIG_DTYPE_OF = {ours: theirs for theirs, ours in CONFIG_DTYPE.items()}


def bf16_encode(values: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """float -> bf16 bits, to nearest, ties to even. NaN stays NaN (quiet, sign kept); overflow gives infinity."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)  # rounding could carry a NaN into infinity or zero
    return np.where(nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def bf16_decode(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bf16 bits -> float32, exactly."""
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def decode(values: Array) -> npt.NDArray[np.float32]:
    """A stored tensor -> float32, exactly; float32 itself is not copied."""
    return bf16_decode(values) if values.dtype == np.uint16 else values.astype(np.float32, copy=False)


_INFINITY = {"bf16": 0x7F80, "fp16": 0x7C00, "fp32": 0x7F800000}  # its bits; NaN is above
_PIECE = 1 << 15  # elements that stay in the nearest cache


def first_nonfinite(values: Array) -> int | None:
    """The flat index of the first NaN or infinity of a stored tensor, if it has one.

    Two running maxima over the bits, as signed numbers (for those above 0) and as unsigned (for those below), read the
    tensor at the speed of memory and copy nothing.
    """
    dtype = OUR_DTYPE[values.dtype]
    infinity, sign = _INFINITY[dtype], 1 << (8 * ELEMENT_BYTES[dtype] - 1)
    width = ELEMENT_BYTES[dtype]
    signed, unsigned = values.reshape(-1).view(f"i{width}"), values.reshape(-1).view(f"u{width}")
    for start in range(0, values.size, _PIECE):
        piece = slice(start, start + _PIECE)
        if signed[piece].max() >= infinity or unsigned[piece].max() >= sign + infinity:
            return start + int(np.argmax((unsigned[piece] & (sign - 1)) >= infinity))
    return None
