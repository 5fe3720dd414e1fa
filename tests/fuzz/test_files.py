"""Damaged checkpoints and event logs: a good model or log, or an InputError in one line; nothing else."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_checkpoint
from fuzz.profile import cases, fixed, result_or_line
from hypothesis import given
from hypothesis import strategies as st

from xlpk.generation import read_generation_config
from xlpk.metrics import compute, read_events, series
from xlpk.model import read_config
from xlpk.safetensors_file import FILE_BITS, INDEX, SINGLE, check_header
from xlpk.weights import Weights
from xlpk.workload import Sampling, check_sampling

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 17,
}
EXTREMES = [-1, 0, 1, 2, 7, 64, 1 << 31, (1 << 32) + 1, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, -(10**30)]
INTEGERS = st.one_of(st.sampled_from(EXTREMES), st.integers(-10, 5000))
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(["", "..", "a/b", "\0", "\ud800", "x\ny", "n" * 5000]))
JSONS = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def safetensors(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@cases(375)
def test_random_bytes_are_no_header(cases: int) -> None:
    length = st.one_of(st.integers(0, 40), st.sampled_from([1 << 20, 100_000_000, 100_000_001, (1 << 64) - 1]))
    jsonish = st.text('{}[]":,0123456789eE+-.\\u \nabtrufalsn', max_size=60).map(str.encode)

    @fixed(cases)
    @given(length, st.binary(max_size=80) | jsonish | st.integers(1, 20000).map(lambda n: b"[" * n))
    def check(length: int, rest: bytes) -> None:
        result_or_line(lambda: check_header(struct.pack("<Q", length) + rest, "file"))
        result_or_line(lambda: check_header(safetensors(rest, b""), "file"))
        result_or_line(lambda: check_header(rest, "file"))

    check()


@cases(625)
def test_made_up_headers(cases: int) -> None:
    names = st.sampled_from(["a", "b", "__metadata__", "../c", "\ud800", ""])
    dtypes = st.sampled_from([*sorted(FILE_BITS), "", "F33", 4, None])
    many = st.tuples(st.sampled_from([3, (1 << 63) - 1, 10**30]), st.integers(1, 400)).map(
        lambda pair: [pair[0]] * pair[1]
    )
    entry = st.fixed_dictionaries(
        {
            "dtype": dtypes,
            "shape": st.lists(INTEGERS, max_size=3) | many,
            "data_offsets": st.lists(INTEGERS, max_size=3),
        }
    )
    fitting = st.integers(0, 100).map(lambda n: {"dtype": "U8", "shape": [n], "data_offsets": [0, n]})

    @fixed(cases)
    @given(st.dictionaries(names, entry | fitting | JSONS, max_size=3), st.integers(0, 100))
    def check(header: dict[str, Any], held: int) -> None:
        content = safetensors(json.dumps(header).encode(), bytes(held))
        found = result_or_line(lambda: check_header(content, "file"))
        if found is not None:
            entries, data = found
            assert sum(entry.end - entry.begin for entry in entries.values()) == held == len(content) - data

    check()


@pytest.mark.parametrize(("dtype", "size"), [("F4", (1 << 63) - 1), ("U8", (1 << 63) - 1), ("F6_E2M3", 3)])
@pytest.mark.parametrize("rank", [1, 20, 64, 65, 100_000])
def test_sizes_whose_product_no_float_or_repr_holds(dtype: str, size: int, rank: int) -> None:
    header = {"a": {"dtype": dtype, "shape": [size] * rank, "data_offsets": [0, 9]}}
    assert result_or_line(lambda: check_header(safetensors(json.dumps(header).encode(), bytes(9)), "file")) is None


def mutations(names: list[str], size: int) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    """Edits of a good file: of one entry, of the header's text, of the bytes."""
    name = st.sampled_from(names)
    return st.lists(
        st.one_of(
            st.tuples(st.just("entry"), name, st.sampled_from(["dtype", "shape", "data_offsets"]), JSONS),
            st.tuples(st.just("offset"), name, st.integers(0, 1), INTEGERS),
            st.tuples(st.just("dtype"), name, st.just(0), st.sampled_from(sorted(FILE_BITS))),
            st.tuples(st.just("rename"), name, st.just(0), TEXTS),
            st.tuples(st.just("twice"), name, st.just(0), name),
            st.tuples(st.just("same place"), name, st.just(0), name),
            st.tuples(st.just("length"), name, st.just(0), st.integers(0, (1 << 64) - 1)),
            st.tuples(st.just("flip"), name, st.integers(0, size - 1), st.integers(1, 255)),
            st.tuples(st.just("flip"), name, st.integers(0, 800), st.integers(1, 255)),
            st.tuples(st.just("cut"), name, st.integers(0, size), st.just(0)),
            st.tuples(st.just("more"), name, st.just(0), st.binary(min_size=1, max_size=9)),
        ),
        min_size=1,
        max_size=3,
    )


def mutated(good: bytes, edits: list[tuple[Any, ...]]) -> bytes:
    (length,) = struct.unpack("<Q", good[:8])
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    appended = b""
    for kind, name, at, value in edits:
        if kind in ("entry", "offset", "dtype", "rename", "same place") and name not in header:
            continue
        if kind == "entry":
            header[name] = {**header[name], at: value}
        elif kind == "offset" and isinstance(header[name]["data_offsets"], list):
            offsets = [*header[name]["data_offsets"], 0, 0][:2]
            offsets[at] = value
            header[name] = {**header[name], "data_offsets": offsets}
        elif kind == "dtype":
            header[name] = {**header[name], "dtype": value}
        elif kind == "rename":
            header[value] = header.pop(name)
        elif kind == "same place" and value in header:
            header[name] = header[value]
        elif kind == "twice":
            appended += f",{json.dumps(name)}:{json.dumps(header.get(value))}".encode()
    content = safetensors(json.dumps(header).encode()[:-1] + appended + b"}", data)
    for kind, _, at, value in edits:
        if kind == "length":
            content = struct.pack("<Q", value) + content[8:]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ value]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "more":
            content += value
    return content


@cases(375)
def test_mutated_checkpoints(tmp_path: Path, cases: int) -> None:
    make_checkpoint(tmp_path, seed=1, **SMALL)
    good, config = (tmp_path / SINGLE).read_bytes(), read_config(tmp_path)
    names = list(config.tensor_shapes())

    @fixed(cases)
    @given(mutations(names, len(good)))
    def check(edits: list[tuple[Any, ...]]) -> None:
        # A file of its own: the one before may be mapped still, and writing into a mapped file is another hazard.
        (tmp_path / SINGLE).unlink()
        (tmp_path / SINGLE).write_bytes(mutated(good, edits))
        weights = result_or_line(lambda: Weights.open(tmp_path, config))
        for name in weights.names if weights else ():
            array = weights.matrix(name).base if name.count("norm") == 0 else weights.vector(name)
            assert array.shape == config.tensor_shapes()[name]
            np.bitwise_or.reduce(np.ascontiguousarray(array).view(np.uint8).reshape(-1))  # every byte can be read

    check()


@cases(250)
def test_index_files(tmp_path: Path, cases: int) -> None:
    make_checkpoint(tmp_path, seed=2, shards=2, **SMALL)
    good, config = json.loads((tmp_path / INDEX).read_text()), read_config(tmp_path)
    names = st.sampled_from(sorted(good["weight_map"]))
    shards = sorted(set(good["weight_map"].values()))
    (tmp_path / "folder.safetensors").mkdir()
    paths = [
        "../x.safetensors",
        "/etc/passwd",
        "a\\b.safetensors",
        "\ud800.safetensors",
        "\0.safetensors",
        "config.json",
    ]
    long = ["n" * 300 + ".safetensors", "n" * 5000 + ".safetensors", "folder.safetensors", ".safetensors"]
    shard = st.sampled_from([*shards, *paths, *long]) | TEXTS.map(lambda text: text + ".safetensors") | JSONS
    whole = st.one_of(
        st.dictionaries(names | TEXTS, shard, max_size=3).map(
            lambda change: {**good, "weight_map": {**good["weight_map"], **change}}
        ),
        st.fixed_dictionaries({"weight_map": st.dictionaries(names | TEXTS, shard, max_size=3) | JSONS}),
        JSONS,
    )
    texts = st.builds(
        lambda value, cut: json.dumps(value).encode()[: cut or None], whole, st.just(0) | st.integers(0, 900)
    )

    @fixed(cases)
    @given(texts | st.binary(max_size=40))
    def check(content: bytes) -> None:
        (tmp_path / INDEX).write_bytes(content)
        result_or_line(lambda: Weights.open(tmp_path, config))

    check()


@cases(375)
def test_config_files(tmp_path: Path, cases: int) -> None:
    """Any change of a good config.json: read, or refused; never a scale that is not finite."""
    make_checkpoint(tmp_path, seed=3, **SMALL, rope_scaling=None)
    good = json.loads((tmp_path / "config.json").read_text())
    scaling = {"rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    numbers = st.floats() | INTEGERS | st.sampled_from([10**400, -(10**400), 1e-320, 1e39, float("nan"), float("inf")])
    kinds = st.sampled_from(["llama3", "linear", "dynamic", "default", "yarn"])
    ropes = st.dictionaries(st.sampled_from(sorted(scaling)), numbers | kinds | JSONS, max_size=6)
    changes = st.dictionaries(st.sampled_from(sorted(good)) | TEXTS, numbers | ropes | JSONS, max_size=3)

    @fixed(cases)
    @given(changes, st.none() | ropes, st.none() | st.integers(0, 700))
    def check(change: dict[str, Any], rope: Any, cut: int | None) -> None:
        text = json.dumps({**good, **change, **({"rope_scaling": rope} if rope else {})})
        (tmp_path / "config.json").write_text(text[:cut])
        config = result_or_line(lambda: read_config(tmp_path))
        if config is not None:
            for value in (config.rms_norm_eps, config.rope_theta):
                assert np.isfinite(np.float32(value))
                assert np.float32(value) > 0
            assert config.head_dim > 256 or np.isfinite(config.inv_freq()).all()

    check()


@cases(150)
def test_generation_configs(tmp_path: Path, cases: int) -> None:
    good = {"do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
    good |= {"max_new_tokens": 9, "eos_token_id": [1, 2]}
    numbers = st.floats() | INTEGERS | st.sampled_from([10**400, 1e-320, 1e39, float("nan"), float("inf")])
    changes = st.dictionaries(st.sampled_from(sorted(good)) | TEXTS, numbers | JSONS, max_size=3)

    @fixed(cases)
    @given(changes, st.none() | st.integers(0, 200))
    def check(change: dict[str, Any], cut: int | None) -> None:
        (tmp_path / "generation_config.json").write_text(json.dumps({**good, **change})[:cut])
        generation = result_or_line(lambda: read_generation_config(tmp_path))
        if generation is not None:
            check_sampling(Sampling().filled(generation)[0], 8)  # what was read is what a config may say

    check()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A log with every kind of event, from a scripted run."""
    folder = tmp_path_factory.mktemp("run")
    script = Path(__file__).parents[1] / "fake_run.py"
    arguments = "tracking=none workload=synthetic workload.requests=2 workload.prompt_len=4 workload.output_len=6"
    subprocess.run([sys.executable, str(script), *arguments.split()], cwd=folder, check=True, capture_output=True)
    (path,) = folder.rglob("events.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@cases(375)
def test_event_logs(tmp_path: Path, log: list[dict[str, Any]], cases: int) -> None:
    lines = [json.dumps(event) for event in log]
    good = ("\n".join(lines) + "\n").encode()
    path = tmp_path / "events.jsonl"
    junk = st.binary(max_size=20) | st.sampled_from([b"\xff", b"[" * 20000, b"9" * 5000, b"null", b"[]", b'"\\ud800"'])

    @fixed(cases)
    @given(st.integers(0, len(good)), st.integers(0, 60), junk)
    def check(at: int, removed: int, put: bytes) -> None:
        path.write_bytes(good[:at] + put + good[at + removed :])
        events = result_or_line(lambda: read_events(path))
        assert events is None or all(isinstance(event, dict) for event in events)

    check()


def test_a_missing_event_log_is_named(tmp_path: Path) -> None:
    assert result_or_line(lambda: read_events(tmp_path / "events.jsonl")) is None


def test_metrics_of_any_beginning_of_a_log(log: list[dict[str, Any]]) -> None:
    """What a killed process leaves."""
    for count in range(len(log) + 1):
        compute(log[:count])
        series(log[:count])
