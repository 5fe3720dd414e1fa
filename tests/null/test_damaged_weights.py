"""No damaged checkpoint gets past the checks, and the refusal names what is wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_files import UP, refusal, rewrite, write

from xlpk.errors import InputError
from xlpk.model import load_model
from xlpk.safetensors_file import INDEX, SINGLE, check_header

# ------------------------------------------------------------------------------------------------ a file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Untied, float32, one file."""
    return make_case(tmp_path, "fp32")


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


def test_a_damaged_element_is_named(folder: Path) -> None:
    load_model("x", folder).weights.check_finite()
    rewrite(folder, lambda t: t[UP].__setitem__((3, 7), np.nan))
    text = refusal(load_model("x", folder).weights.check_finite)
    assert text == f"{UP}[3, 7]=nan: a finite number: these weights are damaged"


# ------------------------------------------------------------------------------------------------ shards


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
