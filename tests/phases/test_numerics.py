"""The kernels' own arithmetic against float64 in units of the last place; random words against published ones."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from phases.shims import Array, Shim, ulps

from xlpk.backends.cpu import CpuLibrary
from xlpk.dtypes import NUMPY_DTYPE
from xlpk.hash_weights import HASH_SCALE, hash_tensor, philox4x32, tensor_id
from xlpk.model import SHAPES

PI = Fraction(31415926535897932384626433832795028841971693993751058209749445923, 10**64)


@pytest.fixture(scope="module")
def shim(cache: Path) -> Shim:
    return Shim(cache)


# ---------------------------------------------------------------------------------------------- elementary functions


def test_exp_over_the_whole_range(shim: Shim) -> None:
    x = np.concatenate([np.linspace(-104, 88.7228, 1_000_003), np.linspace(-1, 1, 200_001)]).astype(np.float32)
    error = ulps(shim.map("exp", x), np.exp(x.astype(np.float64)))
    assert error.max() <= 1.0
    subnormal = x < -87.34
    assert subnormal.sum() > 50_000
    assert shim.map("exp", np.float32([-103.9]))[0] == np.float32(2.0**-149)


def test_exp_at_and_beyond_the_ends(shim: Shim) -> None:
    above, below = np.float32([88.73, 89.0, 3e38, np.inf]), np.float32([-104.0, -3e38, -np.inf])
    assert (shim.map("exp", above) == np.inf).all()
    assert (shim.map("exp", below) == 0).all()
    assert (shim.map("exp", np.float32([0.0, -0.0])) == 1).all()
    assert np.isnan(shim.map("exp", np.float32([np.nan]))[0])


def test_log_of_every_binade_and_near_one(shim: Shim) -> None:
    rng = np.random.RandomState(0)
    normal = rng.randint(0x00800000, 0x7F800000, 1_000_000).astype(np.uint32).view(np.float32)
    near_one = np.float32(1) + rng.uniform(-0.3, 0.3, 500_000).astype(np.float32)
    steps = (np.float32(1).view(np.uint32) + np.arange(-5000, 5000)).astype(np.uint32).view(np.float32)
    for x in (normal, near_one, steps):
        assert ulps(shim.map("log", x), np.log(x.astype(np.float64))).max() <= 1.0


def test_silu(shim: Shim) -> None:
    x = np.linspace(-200, 100, 1_000_001).astype(np.float32)
    wide = x.astype(np.float64)
    exact = wide / (1 + np.exp(-wide))
    value = shim.map("silu", x)
    normal = x > -88.7
    assert ulps(value, exact)[normal].max() <= 3.0
    assert np.abs(value - exact)[~normal].max() <= 2.0**-121  # exp(-x) overflows: -0 instead of a number near 0
    np.testing.assert_array_equal(shim.map("silu", np.float32([0.0, 3e38])), np.float32([0.0, 3e38]))


def exact_sincos(position: int, frequency: float) -> tuple[float, float]:
    """The angle is an exact fraction; only the sine of its remainder is rounded."""
    angle = Fraction(position) * Fraction(frequency)
    rest = float(angle - 2 * PI * round(angle / (2 * PI)))
    return math.sin(rest), math.cos(rest)


def test_sincos_at_positions_up_to_2_31(shim: Shim) -> None:
    rng = np.random.RandomState(1)
    frequencies = np.concatenate([SHAPES[name].inv_freq() for name in ("llama_1b_shape", "llama_8b_shape")])
    position = np.concatenate([np.arange(600), rng.randint(0, 1 << 17, 600), rng.randint(0, (1 << 31) - 1, 1200)])
    frequency = frequencies[rng.randint(0, frequencies.size, position.size)]
    position = np.concatenate([position, np.full(frequencies.size, (1 << 31) - 1), [0]])
    frequency = np.concatenate([frequency, frequencies, [1.0]])
    exact = np.array([exact_sincos(int(p), float(f)) for p, f in zip(position, frequency, strict=True)])
    for value, wanted in zip(shim.sincos(position, frequency), exact.T, strict=True):
        assert ulps(value, wanted).max() <= 0.51


# ---------------------------------------------------------------------------------------------- bf16


def test_to_bf16_equals_ml_dtypes(shim: Shim) -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)  # every sign, exponent, NaN, infinity and subnormal
    lower = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]  # exact, just above, just below a tie, a tie, just above it
    random = np.random.RandomState(2).randint(0, 1 << 32, 1_000_000, np.uint32)
    values = np.concatenate([*(upper | np.uint32(low) for low in lower), random]).view(np.float32)
    nan = np.isnan(values)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    ours = shim.map("to_bf16", values, np.uint16)
    np.testing.assert_array_equal(ours[~nan], expected[~nan].view(np.uint16))
    assert nan.sum() > 1000
    assert np.isnan(ours.view(ml_dtypes.bfloat16)[nan].astype(np.float32)).all()
    np.testing.assert_array_equal(ours >> 15, values.view(np.uint32) >> np.uint32(31))  # the sign stays, of a NaN too
    whole = values[: len(values) // 32 * 32]
    np.testing.assert_array_equal(shim.map("store_bf16", whole, np.uint16), ours[: len(whole)])  # of vectors too


def test_to_f16_equals_numpy(shim: Shim) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = every[np.isfinite(every)]
    with np.errstate(over="ignore"):  # the last place of the largest
        ties = finite + np.spacing(finite.astype(np.float16)).astype(np.float32) / 2
    beside = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    random = np.random.RandomState(4).randint(0, 1 << 32, 1_000_000, np.uint32).view(np.float32)
    values = np.concatenate([every, ties, *beside, random, np.float32([65519.996, 65520, 2**-25, 2**-26, 1e-45])])
    nan = np.isnan(values)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    ours = shim.map("to_f16", values, np.uint16)
    np.testing.assert_array_equal(ours[~nan], expected[~nan])
    assert np.isnan(ours[nan].view(np.float16)).all()


def test_every_half_widens_exactly(shim: Shim) -> None:
    """By the instruction and by hand; a NaN comes back quiet with its payload."""
    every = np.arange(1 << 16, dtype=np.uint16)
    expected = every.view(np.float16).astype(np.float32).view(np.uint32)
    expected |= np.where(np.isnan(every.view(np.float16)), np.uint32(0x400000), np.uint32(0))
    for name in ("widen", "widen_one"):
        np.testing.assert_array_equal(shim.map(name, every).view(np.uint32), expected)


def test_a_part_of_a_chunk_is_stored(shim: Shim) -> None:
    values = np.arange(32, dtype=np.float32)
    for plain in (False, True):
        for count in (1, 16, 31, 32):
            out = shim.store_some(values, count, plain=plain)
            np.testing.assert_array_equal(out[:count], values[:count])
            assert np.isnan(out[count:]).all()


# ---------------------------------------------------------------------------------------------- random words

# Random123, tests/kat_vectors: philox4x32 10 (counter, key, result).
KNOWN = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_known_answers(shim: Shim, counter: str, key: str, result: str) -> None:
    low, high = words(key)
    assert shim.philox(np.array([words(counter)]), high << 32 | low)[0].tolist() == words(result)


def test_philox_equals_numpy(shim: Shim) -> None:
    rng = np.random.RandomState(3)
    counter = rng.randint(0, 1 << 32, (10_000, 4), np.uint32)
    for key in (0, 1, 0xFFFFFFFF_00000000, 0x0123456789ABCDEF):
        expected = philox4x32(np.ascontiguousarray(counter.T), (key & 0xFFFFFFFF, key >> 32)).T
        np.testing.assert_array_equal(shim.philox(counter, key), expected)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("count", [1, 3, 4, 255, 256, 257, 1023, 70_001, (1 << 20) + 5])
def test_fill_hash_equals_numpy(cpu_library: CpuLibrary, dtype: str, count: int) -> None:
    kind = NUMPY_DTYPE[dtype]
    for seed in (0, 0xFEDCBA9876543210):
        guarded = np.full(count + 8, 77, kind)
        cpu_library.fill_hash(guarded[:count], tensor_id("name"), seed, float(HASH_SCALE))
        assert guarded[:count].tobytes() == hash_tensor("name", (1, count), seed, dtype).tobytes()
        assert (guarded[count:] == 77).all()


# ---------------------------------------------------------------------------------------------- Gumbel noise


def exact_gumbel(word: Array) -> Array:
    """-log(-log u), u = (word + 1/2) / 2^32, from whichever end of the range is near."""
    low = word.astype(np.float64) + 0.5
    exponential = np.where(word < 1 << 31, -np.log(low / 2.0**32), -np.log1p(-(2.0**32 - low) / 2.0**32))
    return -np.log(exponential)


def test_gumbel_of_every_kind_of_word(shim: Shim) -> None:
    ends = np.arange(5000)
    word = np.concatenate(
        [
            ends,
            (1 << 32) - 1 - ends,
            0xC0000000 + ends - 2500,
            (1 << 31) + ends - 2500,
            np.random.RandomState(4).randint(0, 1 << 32, 1_000_000, np.uint32),
        ]
    ).astype(np.uint32)
    value, exact = shim.map("gumbel_of", word), exact_gumbel(word)
    error = np.abs(value - exact) / np.maximum(1, np.abs(exact))
    assert error.max() <= 5 * 2.0**-24
    assert value.min() == shim.map("gumbel_of", np.uint32([0]))[0]
    assert value.max() == shim.map("gumbel_of", np.uint32([0xFFFFFFFF]))[0]
    np.testing.assert_allclose(
        [value.min(), value.max()], [-math.log(33 * math.log(2)), 33 * math.log(2)], rtol=2.0**-22
    )
    assert (
        np.diff(shim.map("gumbel_of", ((1 << 32) - 1 - ends[:4000]).astype(np.uint32))) < 0
    ).all()  # a tail without steps


def test_gumbel_takes_its_word_from_seed_position_and_token(shim: Shim) -> None:
    seed, position = 0x1122334455667788, 5
    table = shim.gumbel(seed, position + 1, 64)[position]
    counter = np.zeros((16, 4), np.uint32)
    counter[:, 0], counter[:, 1], counter[:, 2] = np.arange(16), position, 0x53414D50
    word = philox4x32(np.ascontiguousarray(counter.T), (seed & 0xFFFFFFFF, seed >> 32)).T.reshape(-1)
    np.testing.assert_array_equal(table, shim.map("gumbel_of", word))


def kolmogorov_p(statistic: float, n: int) -> float:
    """P(a sample of n from the true law is at least as far from it); the limit law, exact enough for n = 10^6."""
    t = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * statistic
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * t * t) for k in range(1, 101)))


@pytest.mark.parametrize(("seed", "positions", "tokens"), [(1, 1, 1_000_000), (2, 1_000_000, 1), (3, 1000, 1000)])
def test_gumbel_noise_has_the_gumbel_law(shim: Shim, seed: int, positions: int, tokens: int) -> None:
    sample = np.sort(shim.gumbel(seed, positions, tokens).ravel().astype(np.float64))
    n = sample.size
    law = np.exp(-np.exp(-sample))
    rank = np.arange(n)
    statistic = max(np.max((rank + 1) / n - law), np.max(law - rank / n))
    assert kolmogorov_p(statistic, n) > 1e-6
    assert kolmogorov_p(statistic + 0.004, n) < 1e-6  # the test would see a law that is off by 0.4 %


def test_noise_of_neighbours_is_independent(shim: Shim) -> None:
    noise = np.exp(-np.exp(-shim.gumbel(7, 1001, 1001).astype(np.float64))) - 0.5  # uniform
    other = np.exp(-np.exp(-shim.gumbel(8, 1001, 1001).astype(np.float64))) - 0.5
    pairs = (noise[1:, :], noise[:-1, :]), (noise[:, 1:], noise[:, :-1]), (noise[:, 4:], noise[:, :-4]), (noise, other)
    for one, two in pairs:
        correlation = (one * two).mean() * 12
        assert abs(correlation) * math.sqrt(one.size) < 5


def test_the_argmax_of_noisy_logits_has_the_softmax_law(shim: Shim) -> None:
    logits, temperature, n = np.float32([1.5, 0.0, -1.0, 0.7, 1.5, -30.0]), 0.8, 200_000
    noise = shim.gumbel(9, n, logits.size)
    picked = np.argmax(logits / np.float32(temperature) + noise, axis=1)
    weights = np.exp(logits.astype(np.float64) / temperature)
    expected = weights / weights.sum() * n
    counts = np.bincount(picked, minlength=logits.size)
    assert counts[5] == 0
    chi2 = float((((counts - expected) ** 2) / expected)[:5].sum())
    # P(chi-square with 4 degrees of freedom > x) = exp(-x / 2) (1 + x / 2)
    assert math.exp(-chi2 / 2) * (1 + chi2 / 2) > 1e-6
    row, token = 17, 3
    value = shim.sampling_value(float(logits[token]), temperature, 9, row, token)
    assert value == float(logits[token] / np.float32(temperature) + noise[row, token])
    assert shim.sampling_value(0.25, 0.0, 9, row, token) == 0.25  # greedy: no noise


# ---------------------------------------------------------------------------------------------- candidates


def test_candidates_order_as_value_then_lower_id(shim: Shim) -> None:
    rng = np.random.RandomState(5)
    special = np.float32([-np.inf, -3.4e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3.4e38, np.inf])
    value = np.concatenate([special, special, rng.standard_normal(200).astype(np.float32), rng.choice(special, 200)])
    token = rng.randint(0, 128256, value.size)
    token[:2] = 0, (1 << 31) - 1
    packed, unpacked = shim.pack(value, token)
    np.testing.assert_array_equal(unpacked, token)
    assert (packed != 0).all()
    order = np.lexsort((-token, value))  # ascending value; of equals (-0 == 0) the higher id first
    np.testing.assert_array_equal(packed[order], np.sort(packed))


def test_no_candidate_is_minus_one(shim: Shim) -> None:
    assert shim.dll.shim_unpack(ctypes.c_uint64(0)) == -1
