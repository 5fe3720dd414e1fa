"""Traces in Mooncake's columns: what is replayed, and what of a file is refused by line and field."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import CONFIG, load_model
from fuzz.profile import cases, fixed, result_or_line
from hypothesis import given
from hypothesis import strategies as st

from xlpk.errors import InputError
from xlpk.kv import KV, KVPlan
from xlpk.workload import Request, Sampling, Trace, make_requests
from xlpk.workload.shared_prefix import sequential_hit_tokens
from xlpk.workload.trace import read_trace

MODEL = load_model("stub")
PLAN = KVPlan.make(KV(budget="2000pages"), CONFIG, "bf16", 512)
ROWS: list[dict[str, Any]] = [
    {"timestamp": 1000, "input_length": 40, "output_length": 3, "hash_ids": [7, 8, 9]},
    {"timestamp": 3000, "input_length": 20, "output_length": 5, "hash_ids": [7, 10], "type": "chat"},
    {"timestamp": 2000.5, "input_length": 32, "output_length": 1, "hash_ids": [7, 8]},
    {"timestamp": 3000, "input_length": 10, "output_length": 2},
]


def write(folder: Path, rows: list[Any]) -> str:
    path = folder / "trace.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def replayed(workload: Trace) -> list[Request]:
    return make_requests(workload, Sampling(), MODEL, PLAN)[0]


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    file = write(tmp_path, ROWS)
    made = replayed(Trace(file=file, block_size=16))
    assert [r.request_id for r in made] == [0, 1, 2, 3]
    assert [r.arrival_s for r in made] == pytest.approx([0, 1.0005, 2, 2])  # from the first one on, ties as in the file
    assert [len(r.prompt) for r in made] == [40, 32, 20, 10]
    assert [(r.max_new_tokens, r.ignore_eos) for r in made] == [(3, True), (1, True), (5, True), (2, True)]
    first, second, third, alone = (r.prompt for r in made)
    assert first[:32] == second
    assert first[:16] == third[:16]
    assert first[16:20] != third[16:20]
    assert alone != first[:10]
    assert len(set(first)) > 16
    assert [r.prompt for r in replayed(Trace(file=file, block_size=16))] == [r.prompt for r in made]
    assert [r.prompt for r in replayed(Trace(file=file, block_size=16, seed=1))] != [r.prompt for r in made]
    assert sequential_hit_tokens([r.prompt for r in made], 16) == [0, 16, 16, 0]


def test_equal_hash_ids_are_equal_tokens_in_another_file(tmp_path: Path) -> None:
    one = replayed(Trace(file=write(tmp_path, [ROWS[0]]), block_size=16))[0].prompt
    lines = [ROWS[3], {**ROWS[0], "timestamp": 9000, "hash_ids": [1, 8, 2]}]
    other = replayed(Trace(file=write(tmp_path, lines), block_size=16))[1].prompt
    assert one[16:32] == other[16:32]
    assert one[:16] != other[:16]
    assert one[32:] != other[32:]


def test_requests_of_one_moment_keep_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [{"timestamp": index % 2, "input_length": 1 + index // 2, "output_length": 1} for index in range(300)]
    lens = [len(r.prompt) for r in replayed(Trace(file=write(tmp_path, rows)))]
    assert lens == [*range(1, 151), *range(1, 151)]


def test_scale_limit_and_lengths(tmp_path: Path) -> None:
    file = write(tmp_path, ROWS)
    assert [r.arrival_s for r in replayed(Trace(file=file, block_size=16, scale=0.5))] == pytest.approx(
        [0, 0.50025, 1, 1]
    )
    assert [r.arrival_s for r in replayed(Trace(file=file, block_size=16, scale=0))] == [0, 0, 0, 0]
    assert [r.arrival_s for r in replayed(Trace(file=file, block_size=16, limit=2))] == [0, 2]
    small = replayed(Trace(file=file, block_size=16, length_scale=0.25))
    assert [len(r.prompt) for r in small] == [10, 8, 5, 2]
    assert [r.max_new_tokens for r in small] == [1, 1, 1, 1]
    assert small[0].prompt[:8] == small[1].prompt
    assert small[0].prompt[:4] == small[2].prompt[:4]


def test_blocks_of_512_as_kv_pages(tmp_path: Path) -> None:
    """Mooncake's own block size at a scale that makes a block a page: sharing by pages is sharing by blocks."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(60):
        blocks = int(rng.integers(1, 8))
        shared = int(rng.integers(0, blocks + 1))
        ids = [*range(shared), *(1000 * (index + 1) + i for i in range(shared, blocks))]
        length = 512 * (blocks - 1) + int(rng.integers(1, 513))
        rows.append({"timestamp": index, "input_length": length, "output_length": 64, "hash_ids": ids})
    made = replayed(Trace(file=write(tmp_path, rows), length_scale=1 / 32))
    known: set[int] = set()
    expected = []
    for row in rows:
        full = row["input_length"] // 512
        pages = list(row["hash_ids"][:full])
        tokens = max(1, round(row["input_length"] / 32))
        hits = next((i for i, hash_id in enumerate(pages) if hash_id not in known), len(pages))
        expected.append(min(hits, (tokens - 1) // 16) * 16)
        known.update(pages)
    assert sequential_hit_tokens([r.prompt for r in made], 16) == expected
    assert sum(expected) > 1000


def test_priorities_are_a_column_or_drawn(tmp_path: Path) -> None:
    file = write(tmp_path, [{**ROWS[0], "priority": -3}, ROWS[3]])
    assert [r.priority for r in replayed(Trace(file=file, block_size=16))] == [-3, 0]
    with pytest.raises(InputError, match="a column priority"):
        replayed(Trace(file=file, block_size=16, priorities={1: 1}))
    plain = write(tmp_path, ROWS)
    assert [r.priority for r in replayed(Trace(file=plain, block_size=16, priorities={1: 1}))] == [1] * 4


@pytest.mark.parametrize(
    ("line", "field", "value", "allowed"),
    [
        ("{", "", "{", "one JSON object"),
        ("[1]", "", "[1]", "one JSON object"),
        ("\x00", "", "", "one JSON object"),
        ({}, "timestamp", "missing", "ms, 0 to"),
        ({**ROWS[0], "timestamp": "x"}, "timestamp", "x", "ms, 0 to"),
        ({**ROWS[0], "timestamp": -1}, "timestamp", "-1", "ms, 0 to"),
        ({**ROWS[0], "timestamp": float("nan")}, "timestamp", "nan", "ms, 0 to"),
        ({**ROWS[0], "timestamp": True}, "timestamp", "True", "ms, 0 to"),
        ({**ROWS[0], "input_length": 0}, "input_length", "0", "a whole number, 1 to"),
        ({**ROWS[0], "input_length": 40.0}, "input_length", "40.0", "a whole number, 1 to"),
        ({**ROWS[0], "input_length": 10**30}, "input_length", "1000", "a whole number, 1 to"),
        ({**ROWS[0], "output_length": None}, "output_length", "None", "a whole number, 1 to"),
        ({**ROWS[0], "hash_ids": 7}, "hash_ids", "7", "a list"),
        ({**ROWS[0], "hash_ids": [7, -1, 2]}, "hash_ids", "[7, -1, 2]", "from 0 on"),
        ({**ROWS[0], "hash_ids": [7]}, "hash_ids", "1 ids", "3 ids for input_length=40 in blocks of 16"),
        ({**ROWS[0], "hash_ids": [7, 8, 9, 10]}, "hash_ids", "4 ids", "3 ids for input_length=40"),
        ({**ROWS[2], "hash_ids": [7, 8, 9]}, "hash_ids", "3 ids", "2 ids for input_length=32"),
        ({**ROWS[0], "priority": 0.5}, "priority", "0.5", "a whole number"),
        ({**ROWS[3], "input_length": 512}, "input_length", "512", "see workload.length_scale"),
    ],
)
def test_refused_by_line_and_field(tmp_path: Path, line: Any, field: str, value: str, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        replayed(Trace(file=write(tmp_path, [ROWS[0], "", line]), block_size=16))
    assert caught.value.field.endswith(f"trace.jsonl: line 3{': ' if field else ''}{field}")
    assert value in str(caught.value.value)
    assert allowed in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_last_partial_block_may_lack_its_id(tmp_path: Path) -> None:
    (full,) = replayed(Trace(file=write(tmp_path, [ROWS[0]]), block_size=16))
    (short,) = replayed(Trace(file=write(tmp_path, [{**ROWS[0], "hash_ids": [7, 8]}]), block_size=16))
    assert len(short.prompt) == 40
    assert short.prompt[:32] == full.prompt[:32]


@pytest.mark.parametrize(
    ("workload", "field", "allowed"),
    [
        (Trace(), "file", "workload.file=FILE"),
        (Trace(file="no such file"), "file", "No such file"),
        (Trace(file="."), "file", "Is a directory"),
        (Trace(file="x" * 3000), "file", "File name too long"),
        (Trace(file=__file__, scale=-1), "scale", "0 (all at the start) to"),
        (Trace(file=__file__, scale=float("nan")), "scale", "0 (all at the start) to"),
        (Trace(file=__file__, limit=0), "limit", "1 to"),
        (Trace(file=__file__, block_size=0), "block_size", "1 to"),
        (Trace(file=__file__, length_scale=0.001), "length_scale", "a whole number of tokens"),
        (Trace(file=__file__, length_scale=0), "length_scale", "above 0"),
    ],
)
def test_refused_by_name(workload: Trace, field: str, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        workload.check()
    assert caught.value.field == f"workload.{field}"
    assert allowed in str(caught.value)


def test_a_file_without_requests_or_with_too_many_tokens(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one line"):
        replayed(Trace(file=write(tmp_path, [])))
    many = [{"timestamp": 0, "input_length": 90_000_000, "output_length": 1}] * 2
    with pytest.raises(InputError, match=r"180000000 tokens in 2 prompts.*workload\.limit"):
        replayed(Trace(file=write(tmp_path, many)))
    late = [{**ROWS[3], "timestamp": 0}, {**ROWS[3], "timestamp": 1e12}]
    with pytest.raises(InputError, match=r"workload\.scale=100"):
        replayed(Trace(file=write(tmp_path, late), scale=100))


def test_memory_is_that_of_the_columns(tmp_path: Path) -> None:
    """32 bytes a line and 8 a hash id, arrays over-allocated by an eighth; never the objects of more than a line."""
    count, ids = 20_000, 14
    path = tmp_path / "long.jsonl"
    row = {"timestamp": 1, "input_length": 512 * ids, "output_length": 9, "hash_ids": list(range(5000, 5000 + ids))}
    path.write_text((json.dumps(row) + "\n") * count)
    tracemalloc.start()
    rows = read_trace(path, None, 512)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == count
    assert held < 1.2 * count * (40 + 8 * ids)
    assert peak < 2.5 * held  # an array that grows is copied


def values() -> Any:
    numbers = st.integers() | st.floats() | st.integers(0, 60)
    return st.none() | st.booleans() | numbers | st.text(max_size=3) | st.lists(st.integers(-1, 9), max_size=4)


@cases(75)
def test_any_trace(tmp_path: Path, cases: int) -> None:
    """Requests that a session can run, or one line."""
    keys = ["timestamp", "input_length", "output_length", "hash_ids", "priority", "x"]
    changed = st.tuples(st.sampled_from(ROWS), st.dictionaries(st.sampled_from(keys), values(), max_size=2))
    line = changed.map(lambda pair: json.dumps({**pair[0], **pair[1]}).encode()) | st.binary(max_size=40)
    path = tmp_path / "trace.jsonl"

    @fixed(cases)
    @given(st.lists(line, max_size=4), st.sampled_from([None, 1, 3]), st.sampled_from([1.0, 0.5, 1e6]))
    def check(lines: list[bytes], limit: int | None, scale: float) -> None:
        path.write_bytes(b"\n".join(lines))
        made = result_or_line(lambda: replayed(Trace(file=str(path), limit=limit, scale=scale, block_size=16)))
        for request in made or []:
            assert 1 <= len(request.prompt) < 512
            assert 1 <= request.max_new_tokens <= 512 - len(request.prompt)
            assert all(0 <= token < CONFIG.vocab_size for token in request.prompt)
            assert request.arrival_s >= 0

    check()
