"""Prompts and token ids: served to the end, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.profile import cases, fixed, result_or_line
from hypothesis import given
from hypothesis import strategies as st
from stages.sessions import serve, session

from xlpk import record
from xlpk.backends.cpu import CpuLibrary
from xlpk.kv import KV, KVPlan
from xlpk.model import Model
from xlpk.workload import Prompts, Request, Sampling, make_requests

SURROGATES = st.characters(categories=["Cs"])
CONTROLS = st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Co", "Cn", "Mn"])
TEXT = st.text(st.characters() | CONTROLS | SURROGATES, max_size=40)
IDS = st.one_of(st.integers(0, 16), st.sampled_from([-1, 17, 1 << 31, -(1 << 31), 1 << 63, 1 << 64, 10**30]))


@cases(300)
def test_any_text(tiny: Model, cases: int) -> None:
    plan = KVPlan.make(KV(budget="8pages"), tiny.config, tiny.weights.dtype, 64)
    long = st.builds(lambda text, n: text * n, TEXT, st.sampled_from([1, 10, 5000]))

    @fixed(cases)
    @given(st.lists(long | TEXT, max_size=3))
    def check(texts: list[str]) -> None:
        made = result_or_line(lambda: make_requests(Prompts(prompt=texts), Sampling(), tiny, plan))
        if made is not None:
            requests, _ = made
            assert len(requests) == len(texts)
            for request in requests:
                record.decode(tiny, request.prompt).encode("utf-8")
                assert all(0 <= token < tiny.config.vocab_size for token in request.prompt)

    check()


@cases(100)
def test_any_prompt_file(tiny: Model, tmp_path: Path, cases: int) -> None:
    plan = KVPlan.make(KV(budget="8pages"), tiny.config, tiny.weights.dtype, 64)
    path = tmp_path / "prompts.txt"

    @fixed(cases)
    @given(st.binary(max_size=60) | TEXT.map(lambda text: text.encode("utf-8", "replace")))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        result_or_line(lambda: make_requests(Prompts(file=str(path)), Sampling(), tiny, plan))

    check()


@cases(300)
def test_any_token_ids(small: Callable[[str], Model], cpu_library: CpuLibrary, cases: int) -> None:
    """Through the loop itself: what it accepts ends once, for a reason, with ids of the vocabulary."""
    count = st.one_of(st.integers(-1, 3), st.sampled_from([1 << 31, 1 << 32, 10**30]))
    fields: dict[str, Any] = {
        "prompt": st.lists(IDS, max_size=6).map(tuple),
        "max_new_tokens": count,
        "stop_token_ids": st.lists(IDS, max_size=10).map(tuple),
        "seed": st.integers(),
        "temperature": st.sampled_from([0.0, 1e-30, 0.7, 1e30]),
        "ignore_eos": st.booleans(),
    }
    with session(small("alphabet"), cpu_library, max_num_seqs=2) as backend:

        @fixed(cases)
        @given(st.fixed_dictionaries(fields), st.integers(0, (1 << 64) - 1))
        def check(values: dict[str, Any], request_id: int) -> None:
            request = Request(request_id=request_id, **values)
            if result_or_line(lambda: backend.check(request) or True):
                log = serve(backend, [request])
                assert log.reason(request_id) in ("stop", "length", "eos")
                assert len(log.tokens[request_id]) <= request.max_new_tokens
                assert all(0 <= token < 17 for token in log.tokens[request_id])

        check()
        assert backend.free_pages() == 64
