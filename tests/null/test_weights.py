"""Weights: mapped without a copy, hashed as published, and no damaged file gets past the header check."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import CASES, make_case, make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from xlpk.dtypes import NUMPY_DTYPE, bf16_decode, bf16_encode, first_nonfinite
from xlpk.errors import InputError
from xlpk.hash_weights import HASH_SCALE, hash_tensor, philox4x32, tensor_id
from xlpk.model import ModelConfig, load_model, read_config
from xlpk.safetensors_file import INDEX, SINGLE, check_header
from xlpk.weights import Weights

UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


# ---------------------------------------------------------------------------------------------- bf16


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


# ---------------------------------------------------------------------------------------------- hash weights


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


# ---------------------------------------------------------------------------------------------- sound files


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


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)
    return folder


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


# ---------------------------------------------------------------------------------------------- damaged files


def write(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(UP), [SINGLE, UP, "missing", "[608, 192]"]),
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "missing", "[509, 192]"]),
        (lambda t: t.update({UP: t[UP].T.copy()}), [UP, "[192, 608]", "expected [608, 192]"]),
        (lambda t: t.update({UP: t[UP][None]}), [UP, "[1, 608, 192]", "expected [608, 192]"]),
        (lambda t: t.update({UP: t[UP].reshape(-1)}), [UP, "[116736]", "expected [608, 192]"]),
        (lambda t: t.update({"model.norm.weight": np.ones((192, 1), np.float32)}), ["norm", "[192, 1]", "[192]"]),
        (lambda t: t.update({UP: t[UP].astype(np.float64)}), [UP, "F64", "expected one of BF16, F16, F32"]),
        (lambda t: t.update({UP: t[UP].astype(np.float16)}), [".dtype=fp32", "is fp16", "one dtype"]),
        (lambda t: t.update({UP: t[UP].astype(np.int8)}), [UP, "I8", "expected one of BF16, F16, F32"]),
        (lambda t: t.update({UP: t[UP].astype(ml_dtypes.bfloat16)}), [".dtype=fp32", UP, "is bf16", "one dtype"]),
    ],
)
def test_a_wrong_tensor_is_named(
    folder: Path, change: Callable[[dict[str, np.ndarray]], object], parts: list[str]
) -> None:
    text = refusal(lambda: load_model("x", rewrite(folder, change)))
    assert all(part in text for part in parts), text


def one(**change: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}


@pytest.mark.parametrize(
    ("header", "data", "parts"),
    [
        (b"", b"", ["header", "valid JSON"]),
        (b"[]", b"", ["header=[]", "a JSON object"]),
        (b"{", b"", ["valid JSON"]),
        (b"\xff\xfe", b"", ["UTF-8"]),
        (b"{" + b'"a":{' * 50000, b"", ["deeply nested"]),
        (b'{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"t":{}}', bytes(8), ["t=twice", "each key once"]),
        (b'{"t":{"dtype":"F32","dtype":"I8","shape":[2],"data_offsets":[0,8]}}', bytes(8), ["dtype=twice"]),
        ({"t": 1}, b"", ["t=1", "an object with dtype"]),
        ({"t": {"dtype": "F32", "shape": [2]}}, b"", ["t.data_offsets=missing"]),
        (one(dtype="F33"), bytes(8), ["t.dtype=F33", "one of BOOL"]),
        (one(dtype=["F32"]), bytes(8), ["t.dtype=['F32']"]),
        (one(shape=[-2]), bytes(8), ["t.shape=[-2]", "at least 0"]),
        (one(shape=[2.0]), bytes(8), ["t.shape=[2.0]"]),
        (one(shape=[True]), bytes(8), ["t.shape=[True]"]),
        (one(shape=2), bytes(8), ["t.shape=2"]),
        (one(shape=[1 << 62, 1 << 62]), bytes(8), ["t.data_offsets=[0, 8]", "expected", "bytes for F32"]),
        (one(shape=[3]), bytes(8), ["t.data_offsets=[0, 8]", "expected 12 bytes for F32 [3]"]),
        (one(shape=[2, 2]), bytes(8), ["expected 16 bytes"]),
        (one(data_offsets=[0, 16]), bytes(16), ["t.data_offsets=[0, 16]", "expected 8 bytes"]),
        (one(data_offsets=[8, 0]), bytes(8), ["t.data_offsets=[8, 0]", "not before the start"]),
        (one(data_offsets=[-8, 0]), bytes(8), ["t.data_offsets=[-8, 0]"]),
        (one(data_offsets=[0]), bytes(8), ["t.data_offsets=[0]"]),
        (one(), bytes(4), ["t.data_offsets=[0, 8]", "at most 4", "truncated"]),
        (one(), bytes(9), ["size=", "where the last tensor ends"]),
        (one(data_offsets=[1, 9]), bytes(9), ["t.data_offsets=[1, 9]", "a start at 0", "hole after the header"]),
        (one() | {"u": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12), ["u", "overlaps t"]),
        (one() | {"u": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}, bytes(16), ["u", "hole after t"]),
        ({"t\n": {"dtype": "F33", "shape": [], "data_offsets": [0, 0]}}, b"", ["t\\n.dtype=F33"]),
        ({"__metadata__": {"a": 1}}, b"", ["__metadata__", "an object of strings"]),
        ({"__metadata__": []}, b"", ["__metadata__", "an object of strings"]),
    ],
)
def test_a_damaged_header_is_refused(folder: Path, header: object, data: bytes, parts: list[str]) -> None:
    write(folder / SINGLE, header, data)
    text = refusal(lambda: load_model("x", folder))
    assert text.startswith(SINGLE)
    assert all(part in text for part in parts), text


def test_a_truncated_file_is_refused_at_every_length(folder: Path) -> None:
    whole = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for size in (0, 7, 8, 100, 8 + length - 1, 8 + length, len(whole) // 2, len(whole) - 1):
        (folder / SINGLE).write_bytes(whole[:size])
        text = refusal(lambda: load_model("x", folder))
        assert text.startswith(SINGLE)
        assert "truncated" in text


def test_a_header_length_is_capped(folder: Path) -> None:
    for length in (100_000_001, (1 << 64) - 1):
        (folder / SINGLE).write_bytes(struct.pack("<Q", length) + b"{}")
        text = refusal(lambda: load_model("x", folder))
        assert f"header length={length}: at most 100000000 bytes" in text


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 1 << 30), byte=st.integers(0, 255), cut=st.integers(0, 40))
def test_a_damaged_byte_never_reaches_past_the_file(position: int, byte: int, cut: int) -> None:
    """Either refused, or every tensor that is handed out lies inside the file."""
    header = json.dumps(one() | {"u": {"dtype": "BF16", "shape": [3, 2], "data_offsets": [8, 20]}}).encode()
    content = bytearray(struct.pack("<Q", len(header)) + header + bytes(20))
    content[position % len(content)] = byte
    damaged = bytes(content[: len(content) - max(0, cut - 20)])
    try:
        entries, data = check_header(damaged, "file")
    except InputError as error:
        text = str(error)
        assert "\n" not in text
        return
    assert all(0 <= entry.begin <= entry.end <= len(damaged) - data for entry in entries.values())


# ---------------------------------------------------------------------------------------------- shards


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_case(tmp_path, "sharded")


def shards(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "/etc/passwd",
        "c:b.safetensors",
        "..",
        "",
        "a\0.safetensors",
        "model.bin",
        5,
        None,
    ],
)
def test_a_shard_is_a_plain_file_name(sharded: Path, name: object) -> None:
    text = refusal(lambda: load_model("x", shards(sharded, lambda i: i["weight_map"].update({UP: name}))))
    assert text.startswith(f"{INDEX}:{UP}=")
    assert "a *.safetensors file name in the same folder" in text


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    text = refusal(lambda: load_model("x", sharded))
    assert "model-00002-of-00003.safetensors" in text
    assert "this one is missing" in text


def test_a_tensor_missing_from_index_or_shard_is_named(sharded: Path) -> None:
    first, second = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
    where = json.loads((sharded / INDEX).read_text())["weight_map"][UP]
    other = second if where == first else first
    text = refusal(lambda: load_model("x", shards(sharded, lambda i: i["weight_map"].update({UP: other}))))
    assert text == f"{other}:{UP}=missing: a tensor of shape [512, 256]"
    text = refusal(lambda: load_model("x", shards(sharded, lambda i: i["weight_map"].pop(UP))))
    assert text == f"{INDEX}:{UP}=missing: a shard that holds it, shape [512, 256]"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{" * 9999])
def test_a_broken_index_is_refused(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert refusal(lambda: load_model("x", sharded)).startswith(INDEX)


# ---------------------------------------------------------------------------------------------- use


def test_a_wrong_name_or_kind_is_refused(small: ModelConfig) -> None:
    weights = Weights.from_hash(small, 0, "bf16")
    assert refusal(lambda: weights.matrix("nothing")).startswith("tensor=nothing")
    assert "this is a vector" in refusal(lambda: weights.matrix("model.norm.weight"))
    assert "this is a matrix" in refusal(lambda: weights.vector(UP))


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


def test_a_damaged_element_is_named(folder: Path) -> None:
    load_model("x", folder).weights.check_finite()
    rewrite(folder, lambda t: t[UP].__setitem__((3, 7), np.nan))
    text = refusal(load_model("x", folder).weights.check_finite)
    assert text == f"{UP}[3, 7]=nan: a finite number: these weights are damaged"
