"""Hash weights: the published generator, a law of each element, the compiled fill."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from weight_files import EMBEDDING, UP, refusal

from xlpk.dtypes import bf16_encode
from xlpk.hash_weights import HASH_SCALE, hash_tensor, philox4x32, tensor_id
from xlpk.model import ModelConfig
from xlpk.weights import Weights


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123, tests/kat_vectors
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    both = np.array([counter, counter], dtype=np.uint32).T
    np.testing.assert_array_equal(philox4x32(both, key), np.array([words, words], dtype=np.uint32).T)


def test_an_element_depends_on_seed_name_and_index_alone() -> None:
    seed, name = 0x1234_5678_9ABC_DEF0, UP
    whole = hash_tensor(name, (1300, 101), seed, "fp32").reshape(-1)  # more than one piece, and a rest of 4
    for i in (0, 1, 5, 65535, 65536, whole.size - 1):
        counter = np.array([[i // 4], [0], [tensor_id(name)], [0]], dtype=np.uint32)
        word = philox4x32(counter, (0x9ABCDEF0, 0x12345678))[i % 4]
        assert whole[i] == (word.view(np.int32).astype(np.float32) * np.float32(2.0**-31) * HASH_SCALE)[0]
    np.testing.assert_array_equal(hash_tensor(name, (7, 3), seed, "fp32").reshape(-1), whole[:21])
    np.testing.assert_array_equal(hash_tensor(name, (1300, 101), seed, "bf16").reshape(-1), bf16_encode(whole))
    assert (hash_tensor(name, (7, 3), seed + 1, "fp32").reshape(-1) != whole[:21]).all()
    assert (hash_tensor(EMBEDDING, (7, 3), seed, "fp32").reshape(-1) != whole[:21]).all()


def test_hash_values_are_uniform_with_deviation_0_02() -> None:
    values = hash_tensor(UP, (512, 512), 1, "fp32").astype(np.float64)
    n, a = values.size, float(HASH_SCALE)
    assert np.abs(values).max() <= a
    assert abs(values.mean()) < 5 * 0.02 / n**0.5  # five standard errors of each
    assert abs((values**2).mean() - a * a / 3) < 5 * a * a * (4 / 45 / n) ** 0.5


@pytest.fixture
def small() -> ModelConfig:
    return ModelConfig(
        vocab_size=67, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
        max_position_embeddings=64, tie_word_embeddings=True, dtype="bfloat16", bos_token_id=None, eos_token_ids=(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_hash_weights(small: ModelConfig, dtype: str) -> None:
    weights = Weights.from_hash(small, 5, dtype)
    assert weights.dtype == dtype
    assert (weights.vector("model.norm.weight") == 1).all()
    assert weights.matrix("lm_head.weight").address == weights.matrix(EMBEDDING).address
    np.testing.assert_array_equal(weights.matrix(UP).base, hash_tensor(UP, (96, 64), 5, dtype))
    assert weights.matrix(UP).address % 64 == 0
    assert weights.nbytes == small.parameters * (4 if dtype == "fp32" else 2)


def test_a_compiled_fill_is_called_for_each_matrix(small: ModelConfig) -> None:
    calls: list[tuple[Any, ...]] = []

    def fill(values: np.ndarray, tensor: int, seed: int, scale: float) -> None:
        assert values.ndim == 1
        assert values.flags.c_contiguous
        assert values.flags.writeable
        values[:] = 7
        calls.append((values.dtype, tensor, seed, scale))

    weights = Weights.from_hash(small, 5, "bf16", fill)
    assert len(calls) == sum(len(shape) == 2 for shape in small.tensor_shapes().values())
    assert (np.dtype(np.uint16), tensor_id(UP), 5, float(HASH_SCALE)) in calls
    assert (weights.matrix(UP).base == 7).all()
    assert (weights.vector("model.norm.weight") == 1).all()


def test_a_wrong_name_or_kind_is_refused(small: ModelConfig) -> None:
    weights = Weights.from_hash(small, 0, "bf16")
    assert refusal(lambda: weights.matrix("nothing")).startswith("tensor=nothing")
    assert "this is a vector" in refusal(lambda: weights.matrix("model.norm.weight"))
    assert "this is a matrix" in refusal(lambda: weights.vector(UP))
