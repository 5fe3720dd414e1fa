"""bf16 as ml_dtypes has it, and the first element that is no number."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from xlpk.dtypes import NUMPY_DTYPE, bf16_decode, bf16_encode, first_nonfinite


def test_bf16_encode_equals_ml_dtypes_on_every_upper_half() -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | np.uint32(lower)).view(np.float32)
        nan = np.isnan(values)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
        ours = bf16_encode(values)
        np.testing.assert_array_equal(ours[~nan], expected[~nan])
        assert np.isnan(bf16_decode(ours[nan])).all()
        np.testing.assert_array_equal(ours[nan] >> 15, values[nan].view(np.uint32) >> 31)


def test_bf16_decode_is_exact_both_ways() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bf16_decode(bits)
    np.testing.assert_array_equal(values, bits.view(ml_dtypes.bfloat16).astype(np.float32))
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(bf16_encode(values[finite]), bits[finite])


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_first_element_that_is_no_number(dtype: str) -> None:
    """Against numpy, with every kind of value around it, and across the pieces in which a tensor is read."""
    kind = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}[dtype]
    rng = np.random.RandomState(1)
    bits = {2: np.uint16, 4: np.uint32}[np.dtype(kind).itemsize]
    values = rng.randint(0, 1 << 8 * np.dtype(kind).itemsize, 100_003, dtype=np.uint64).astype(bits)
    finite = values[np.isfinite(values.view(kind).astype(np.float32))]
    held = finite.view(NUMPY_DTYPE[dtype])
    assert len(held) > 90_000
    assert first_nonfinite(held) is None
    for place in (0, 1, 32767, 32768, len(held) - 1):
        for bad in (np.nan, -np.nan, np.inf, -np.inf):
            spoilt = held.copy()
            spoilt[place] = spoilt[-1] = np.array(bad, kind).view(NUMPY_DTYPE[dtype])
            assert first_nonfinite(spoilt) == place
