"""What the LM head's epilogue does tile by tile is what it would do token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from phases.shims import Shim


@pytest.fixture(scope="module")
def shim(cache: Path) -> Shim:
    return Shim(cache)


@pytest.mark.parametrize("token", [0, 16, 4, 5, 128_000])
@pytest.mark.parametrize("width", [16, 9, 1])
def test_noise(shim: Shim, token: int, width: int) -> None:
    for seed, position in ((0, 0), (1 << 60, 3), (12345, 100_000)):
        alone = [shim.sampling_value(0.0, 1.0, seed, position, token + j) for j in range(width)]
        assert shim.gumbel_tile(seed, position, token, width).tobytes() == np.float32(alone).tobytes()


def test_the_best_of_tiles(shim: Shim) -> None:
    rng = np.random.RandomState(3)
    ties = 0
    for n in (1, 15, 16, 17, 64, 100):
        for _ in range(50):
            values = rng.randint(-3, 4, n).astype(np.float32)  # -0, ties
            values[rng.rand(n) < 0.2] *= -0.0
            values[rng.rand(n) < 0.2] = np.nan
            values[rng.rand(n) < 0.1] = -np.inf
            values[rng.rand(n) < 0.02] = np.inf
            found = shim.keep_best(values, 1000)
            if np.isnan(values).all():
                assert found == 0
                continue
            first = int(np.nanargmax(values))
            ties += int((values == values[first]).sum() > 1)
            packed, _ = pack(shim, values[first], 1000 + first)
            assert found == packed
    assert ties > 100


def pack(shim: Shim, value: float, token: int) -> tuple[int, int]:
    packed, unpacked = shim.pack(np.float32([value]), np.int32([token]))
    return int(packed[0]), int(unpacked[0])
