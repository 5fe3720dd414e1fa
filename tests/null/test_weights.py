"""Weights of sound checkpoints: mapped without a copy, what the format leaves open."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import CASES, make_case, make_checkpoint
from safetensors.numpy import load_file
from weight_files import EMBEDDING, UP, refusal, rewrite, write

from xlpk.dtypes import bf16_decode, bf16_encode
from xlpk.model import load_model, read_config
from xlpk.safetensors_file import SINGLE
from xlpk.weights import Weights


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_equals_the_official_reader(tmp_path: Path, case: str) -> None:
    folder = make_case(tmp_path, case)
    official: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        official |= load_file(file)
    weights = load_model(case, folder).weights
    for name, expected in official.items():
        bits = expected.view(np.uint16) if expected.dtype == ml_dtypes.bfloat16 else expected
        if expected.ndim == 1:
            np.testing.assert_array_equal(weights.vector(name), expected.astype(np.float32))
            assert weights.vector(name).dtype == np.float32
            continue
        matrix = weights.matrix(name)
        np.testing.assert_array_equal(matrix.base, bits)
        assert matrix.shape == expected.shape
        assert matrix.stride == expected.shape[1]
        assert matrix.layout == "row_major"
        assert matrix.address == matrix.base.__array_interface__["data"][0]
        assert not matrix.base.flags.owndata, "a copy"
        assert not matrix.base.flags.writeable


def test_a_checkpoint_is_not_copied(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path,
        seed=1,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=8000,
    )
    config = read_config(folder)
    tracemalloc.start()
    try:
        weights = Weights.open(folder, config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert weights.nbytes > 10_000_000
    assert peak < 1_000_000


def test_an_array_outlives_its_weights(tmp_path: Path) -> None:
    base = load_model("x", make_case(tmp_path, "one_head")).weights.matrix(UP).base  # everything else is garbage now
    (expected,) = (load_file(file)[UP] for file in tmp_path.glob("*.safetensors") if UP in load_file(file))
    np.testing.assert_array_equal(base, expected)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Untied, float32, one file."""
    return make_case(tmp_path, "fp32")


def test_norms_may_have_another_dtype(folder: Path) -> None:
    name = "model.norm.weight"
    before = load_file(folder / SINGLE)[name]
    rewrite(folder, lambda t: t.update({name: t[name].astype(ml_dtypes.bfloat16)}))
    weights = load_model("x", folder).weights
    assert weights.dtype == "fp32"
    np.testing.assert_array_equal(weights.vector(name), bf16_decode(bf16_encode(before)))


def test_unknown_tensors_are_ignored(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(32, np.float16)}))
    assert load_model("x", folder).weights.dtype == "fp32"


def test_a_tied_head_may_be_absent_or_the_same_but_not_different(tmp_path: Path) -> None:
    folder = make_case(tmp_path, "gqa_wide_group")
    head = load_model("x", folder).weights.matrix("lm_head.weight")
    assert head.shape == (1031, 256)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING].copy()}))
    weights = load_model("x", folder).weights
    assert weights.matrix("lm_head.weight").address == weights.matrix(EMBEDDING).address
    rewrite(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING][::-1].copy()}))
    text = refusal(lambda: load_model("x", folder))
    assert text.startswith("config.json:tie_word_embeddings=True: false, because the checkpoint's lm_head.weight ")


def test_a_misaligned_tensor_is_copied(folder: Path) -> None:
    """Legal in the format: here one byte comes first, so that no float32 tensor is aligned."""
    tensors = load_file(folder / SINGLE)
    header, data = {"odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\0"
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [len(data), end]}
        data += array.tobytes()
    write(folder / SINGLE, header, data)
    weights = load_model("x", folder).weights
    np.testing.assert_array_equal(weights.matrix(UP).base, tensors[UP])
    assert weights.matrix(UP).address % 4 == 0
