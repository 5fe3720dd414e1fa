"""Sampling options end to end: rule 3 with every filter, what logprobs say, and every way in which an output ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import kinds
import numpy as np
import pytest
from checkpoints import make_case
from drive import CACHE, Result, finish, run

from xlpk.backend import Token
from xlpk.kv import KV, KVPlan
from xlpk.model import Model, load_model
from xlpk.speculation import Ngram, Oracle
from xlpk.workload import Request

pytestmark = pytest.mark.usefixtures("kind")

OPTIONS: dict[str, dict[str, Any]] = {
    "top_k": {"temperature": 1.0, "top_k": 20},
    "top_p": {"temperature": 1.2, "top_p": 0.7},
    "min_p": {"temperature": 1.5, "min_p": 0.1},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    "greedy penalties": {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.3},
    "bias": {"temperature": 0.5, "logit_bias": ((7, 4.0), (9, -50.0), (1030, 3.0))},
    "all": {"temperature": 1.1, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1, "logprobs": 3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model("gqa", make_case(tmp_path_factory.mktemp("gqa"), "gqa"))


def make_requests(options: dict[str, Any], count: int = 4) -> list[Request]:
    rng = np.random.default_rng(1)
    prompts = [np.tile(rng.integers(0, 1031, 6), 4)[: 9 + 3 * i] for i in range(count)]
    return [
        Request(i, tuple(prompt.tolist()), 40, seed=50 + i, ignore_eos=True, **options)
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_tokens_alone_batched_and_speculated(model: Model, name: str) -> None:
    requests = make_requests(OPTIONS[name])
    alone = {r.request_id: run(model, [r], threads=1).tokens[r.request_id] for r in requests}
    assert run(model, requests, threads=2, orchestration="launched").tokens == alone
    assert run(model, requests, threads=3, prefill_chunk=5, spec=Ngram(block=8)).tokens == alone
    oracles = [replace(r, oracle=tuple(alone[r.request_id])) for r in requests]
    result = run(model, oracles, threads=2, spec=Oracle(block=8, mismatch_stride=4))
    assert result.tokens == alone
    assert all(0 < output.accepted < output.proposed for output in result.outputs.values())
    plain = make_requests({"temperature": OPTIONS[name]["temperature"]})
    assert run(model, plain, threads=2).tokens != alone, "the option changes nothing here"


def test_bias_decides(model: Model) -> None:
    (request,) = make_requests({"logit_bias": ((123, 1000.0),)}, 1)
    assert set(run(model, [request]).tokens[0]) == {123}


def test_penalties_forbid_repetition(model: Model) -> None:
    (request,) = make_requests({"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 50.0}, 1)
    tokens = run(model, [request]).tokens[0]
    assert len(set(tokens)) == len(tokens)
    assert not set(tokens) & set(request.prompt)


def test_a_slot_forgets_the_last_request(model: Model) -> None:
    """Counts and biases of a slot belong to one request: one slot, three requests in turn."""
    first, other = make_requests(OPTIONS["penalties"], 2)
    biased = replace(other, request_id=2, logit_bias=((5, 30.0),))
    again = replace(first, request_id=3)
    result = run(model, [first, biased, again, other], max_num_seqs=1, max_step_rows=16)
    assert result.tokens[3] == result.tokens[0]
    assert result.tokens[1] == run(model, [other]).tokens[1]


def tokens_of(model: Model, requests: list[Request], **options: Any) -> dict[int, list[Token]]:
    backend = kinds.make(**options)
    backend.open(model, KVPlan.make(KV(budget="256pages"), model.config, model.weights.dtype, 512))
    seen: list[Token] = []
    poll = backend.poll

    def recorded() -> list[Any]:
        events = poll()
        seen.extend(event for event in events if isinstance(event, Token))
        return events

    backend.poll = recorded  # type: ignore[method-assign]
    try:
        finish(backend, requests)
    finally:
        backend.close()
    return {r.request_id: [token for token in seen if token.request_id == r.request_id] for r in requests}


@pytest.mark.parametrize("spec", [None, Ngram(block=4)], ids=["serial", "ngram"])
def test_logprobs_are_those_of_the_models_own_logits(model: Model, spec: Ngram | None) -> None:
    (request,) = make_requests({"temperature": 0.9, "top_k": 8, "frequency_penalty": 1.0, "logprobs": 5}, 1)
    tokens = tokens_of(model, [request, replace(request, request_id=1, logprobs=None)], spec=spec)
    assert all(token.logprob is None for token in tokens[1])
    whole = (*request.prompt, *[token.token for token in tokens[0]])
    logits = run(model, [Request(0, whole, 1)], debug_logits=True).logits
    assert logits is not None
    rows = logits[len(request.prompt) - 1 : len(whole) - 1].astype(np.float64)
    exact = rows - np.logaddexp.reduce(rows, axis=1)[:, None]
    for token, row in zip(tokens[0], exact, strict=True):
        assert token.logprob == pytest.approx(row[token.token], abs=5e-6)
        assert token.top_logprobs is not None
        best = np.argsort(-row, kind="stable")[:5]
        assert [i for i, _ in token.top_logprobs] == best.tolist()
        assert [v for _, v in token.top_logprobs] == pytest.approx(row[best].tolist(), abs=5e-6)


def ended(result: Result) -> tuple[str, int]:
    return result.outputs[0].reason, len(result.tokens[0])


@pytest.mark.parametrize("spec", [None, Ngram(block=8)], ids=["serial", "ngram"])
def test_a_target_ends_the_output(model: Model, spec: Ngram | None) -> None:
    (request,) = make_requests({"temperature": 1.0}, 1)
    plain = run(model, [request]).tokens[0]
    for begin, end in ((4, 5), (7, 10), (0, 16)):
        target = tuple(plain[begin:end])
        at = next(i for i in range(len(plain)) if tuple(plain[max(0, i + 1 - len(target)) : i + 1]) == target)
        assert ended(run(model, [replace(request, target=target)], spec=spec)) == ("target", at + 1)
    wrong = (*plain[4:6], (plain[6] + 1) % 1031)
    assert ended(run(model, [replace(request, target=wrong)], spec=spec))[0] == "length"


def test_several_stop_ids(model: Model) -> None:
    (request,) = make_requests({"temperature": 1.0}, 1)
    plain = run(model, [request]).tokens[0]
    stops = (plain[20], plain[9], plain[30])
    first = min(plain.index(stop) for stop in stops)
    assert ended(run(model, [replace(request, stop_token_ids=stops)])) == ("stop", first + 1)


def test_filters_leave_out_their_phase_where_nobody_asks(model: Model) -> None:
    plain, filtered = make_requests({"temperature": 1.0}, 1), make_requests({"temperature": 1.0, "top_k": 5}, 1)
    for requests, runs in ((plain, False), (filtered, True)):
        result = run(model, requests, orchestration="launched")
        assert (sum(step.phase_ns["filter"] for step in result.steps) > 0) == runs


def test_stop_strings(tmp_path: Path) -> None:
    import json
    import shutil
    import subprocess
    import sys

    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "cache").symlink_to(CACHE)

    def text(*arguments: str) -> tuple[str, dict[str, float], list[dict[str, Any]]]:
        command = [
            sys.executable,
            "-m",
            "xlpk.run",
            f"backend={kinds.current}",
            "tracking=none",
            "workload.requests=1",
            *arguments,
            "run.json=true",
        ]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env=kinds.environment()
        )
        assert done.returncode == 0, done.stderr
        (folder,) = (tmp_path / "outputs" / "runs").glob("*/*")
        words = (folder / "text.txt").read_text().split("completion\n", 1)[1]
        log = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        shutil.rmtree(tmp_path / "outputs" / "runs")
        return words, json.loads(done.stdout.splitlines()[-1]), log

    whole, metrics, _ = text()
    stop = "file-like"
    assert whole.count(stop) > 0
    assert metrics["requests/overrun_tokens"] == 0
    cut, metrics, log = text(f"sampling.stop=['nowhere at all','{stop}']")
    assert cut.rstrip("\n") == whole[: whole.index(stop)].rstrip("\n")
    assert metrics["requests/finished_stop"] == 1
    tokens = [event for event in log if event["event"] == "token" and not event.get("warmup")]
    assert metrics["requests/output_tokens"] == len(tokens) < 128
    assert metrics["requests/overrun_tokens"] == sum(event["event"] == "overrun" for event in log)
