"""Conversations as vLLM's benchmark filters them, and files that are not what they should be."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from fake_run import CONFIG, load_model
from fuzz.profile import cases, fixed, result_or_line
from hypothesis import given
from hypothesis import strategies as st

from xlpk.errors import InputError
from xlpk.kv import KV, KVPlan
from xlpk.workload import Request, Sampling, ShareGPT, make_requests

MODEL = load_model("stub")  # whose tokens are bytes
PLAN = KVPlan.make(KV(budget="2000pages"), CONFIG, "bf16", 512)


def turns(*values: str, first: str = "human") -> dict[str, Any]:
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    pairs = [{"from": speakers[index % 2], "value": value} for index, value in enumerate(values)]
    return {"id": "x", "conversations": pairs}


def write(folder: Path, entries: Any) -> str:
    path = folder / "share.json"
    path.write_text(json.dumps(entries))
    return str(path)


def made(workload: ShareGPT) -> tuple[list[Request], list[str]]:
    return make_requests(workload, Sampling(), MODEL, PLAN)


def valid(prompt_len: int, output_len: int, max_prompt_len: int, max_total_len: int) -> bool:
    """vLLM's is_valid_sequence, in its own terms."""
    return not (
        prompt_len < 4 or output_len < 4 or prompt_len > max_prompt_len or prompt_len + output_len > max_total_len
    )


def test_the_filters_are_vllms(tmp_path: Path) -> None:
    rng = random.Random(0)
    pairs = [("p" * rng.randint(1, 60), "a" * rng.randint(1, 60)) for _ in range(300)]
    entries = [turns(*pair, "more") for pair in pairs]
    file = write(tmp_path, entries)
    requests, notes = made(ShareGPT(file=file, requests=None, max_prompt_len=40, max_total_len=80))
    kept = [(len(p), len(a)) for p, a in pairs if valid(len(p), len(a), 40, 80)]
    assert sorted((len(r.prompt), r.max_new_tokens) for r in requests) == sorted(kept)
    assert [(len(r.prompt), r.max_new_tokens) for r in requests] != kept  # shuffled
    assert all(r.ignore_eos for r in requests)
    assert "of 300 conversations left out: " in notes[0]
    short = sum(min(len(p), len(a)) < 4 for p, a in pairs)
    assert f"{short} under 4 tokens" in notes[0]


def test_first_human_turn_and_the_answer_behind_it(tmp_path: Path) -> None:
    entries = [
        turns("prompt", "answer!", "again", "later"),
        turns("greeting", "question", "reply...", first="gpt"),
        turns("no answer"),
        turns("left", first="gpt"),
        {"conversations": []},
        {"id": "no conversations"},
        {"conversations": [{"from": "human", "value": "twice"}, {"from": "human", "value": "asked"}]},
        {
            "conversations": [
                {"from": "system", "value": "be kind"},
                *turns("system prompt", "yes sir")["conversations"],
            ]
        },
    ]
    requests, _ = made(ShareGPT(file=write(tmp_path, entries), requests=None))
    found = {bytes(r.prompt).decode(): r.max_new_tokens for r in requests}
    assert found == {"prompt": 7, "question": 8, "system prompt": 7}


def test_counts_rates_and_what_does_not_fit(tmp_path: Path) -> None:
    file = write(tmp_path, [turns("a" * 10, "b" * 5), turns("c" * 600, "d" * 5), turns("e" * 500, "f" * 100)])
    requests, notes = made(ShareGPT(file=file, requests=5, rate_per_s=2, burstiness=float("inf")))
    assert [(len(r.prompt), r.max_new_tokens) for r in requests] == [(10, 5)] * 5
    assert [r.arrival_s for r in requests] == [0.5, 1, 1.5, 2, 2.5]
    assert "2 over 512 tokens in all" in notes[0]
    assert "1 conversations pass the filters, and are repeated" in notes[1]
    requests, _ = made(ShareGPT(file=file, requests=1, output_len=3))
    assert [r.max_new_tokens for r in requests] == [3]
    with pytest.raises(InputError, match="1 over 9 prompt tokens"):
        made(ShareGPT(file=write(tmp_path, [turns("a" * 10, "b" * 5)]), max_prompt_len=9))
    with pytest.raises(InputError, match="none has a human turn"):
        made(ShareGPT(file=write(tmp_path, [])))


def test_the_seed_shuffles(tmp_path: Path) -> None:
    file = write(tmp_path, [turns("p" * (10 + index), "a" * 9) for index in range(50)])
    first, again, other = (
        [len(r.prompt) for r in made(ShareGPT(file=file, requests=20, seed=seed))[0]] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert len(set(first)) == 20


@pytest.mark.parametrize(
    ("entries", "field", "allowed"),
    [
        ({"a": 1}, "workload.file", "a JSON list"),
        ([turns("a", "b"), 3], "share.json: entry 1", "an object"),
        ([{"conversations": 3}], "share.json: entry 0: conversations", "a list of turns"),
        ([{"conversations": [3]}], "share.json: entry 0: conversations[0]", "an object"),
        ([{"conversations": ["", ""]}], "share.json: entry 0: conversations[0]", "an object"),
        ([{"conversations": [{"from": "human"}]}], "share.json: entry 0: conversations[0].value", "a text"),
        ([{"conversations": [{"from": 1, "value": "x"}]}], "share.json: entry 0: conversations[0].from", "a text"),
        (
            [{"conversations": [{"from": "a", "value": "\ud800"}]}],
            "share.json: entry 0: conversations[0].value",
            "a text",
        ),
    ],
)
def test_refused_by_entry_and_field(tmp_path: Path, entries: Any, field: str, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        made(ShareGPT(file=write(tmp_path, entries)))
    assert caught.value.field.endswith(field)
    assert allowed in str(caught.value)


@pytest.mark.parametrize(
    ("workload", "field", "allowed"),
    [
        (ShareGPT(), "file", "workload.file=FILE"),
        (ShareGPT(file="no such file"), "file", "a readable JSON file"),
        (ShareGPT(file="."), "file", "Is a directory"),
        (ShareGPT(file="x" * 3000), "file", "File name too long"),
        (ShareGPT(file=__file__, requests=0), "requests", "1 to"),
        (ShareGPT(file=__file__, output_len=0), "output_len", "1 to"),
        (ShareGPT(file=__file__, max_prompt_len=3), "max_prompt_len", "4 to"),
        (ShareGPT(file=__file__, max_total_len=3), "max_total_len", "4 to"),
        (ShareGPT(file=__file__, rate_per_s=-1), "rate_per_s", "above 0"),
    ],
)
def test_refused_by_name(workload: ShareGPT, field: str, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        workload.check()
    assert caught.value.field == f"workload.{field}"
    assert allowed in str(caught.value)


@cases(50)
def test_any_conversations(tmp_path: Path, cases: int) -> None:
    path = tmp_path / "share.json"
    text = st.text(max_size=8) | st.none() | st.integers()
    turn = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "user", 3]), "value": text}) | text
    entry = st.fixed_dictionaries({"conversations": st.lists(turn, max_size=4)}) | text
    content = st.lists(entry, max_size=3).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30)

    @fixed(cases)
    @given(content)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        result = result_or_line(lambda: made(ShareGPT(file=str(path), requests=3)))
        for request in result[0] if result else []:
            assert 4 <= len(request.prompt) <= 512
            assert request.max_new_tokens >= 4

    check()
