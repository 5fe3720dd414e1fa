"""Rule 3: the same bits at every width. Each test also asserts that what it varies really happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kinds
import numpy as np
import pytest
from checkpoints import make_case
from drive import Output, Result, gather, run

from xlpk.kv import KV, KVPlan
from xlpk.model import Model, load_model
from xlpk.speculation import Forced, Greedy, Keyed, Ngram, NoSpec, Oracle
from xlpk.workload import Request

NAMES = ("gqa", "head128", "head80", "biases_fp16")
FEW = ("gqa", "biases_fp16")  # in the quick suite, and on a GPU, where each is a cubin
CASES = [
    *((name, "cpu") for name in FEW),
    *(pytest.param((name, "cpu"), marks=pytest.mark.heavy) for name in NAMES if name not in FEW),
    *(pytest.param((name, kind), marks=pytest.mark.heavy) for kind in kinds.GPU for name in FEW),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return {name: load_model(name, make_case(tmp_path_factory.mktemp(name), name)) for name in NAMES}


@pytest.fixture(params=CASES, ids="-".join)
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Iterator[Model]:
    """Each model on each kind of backend."""
    name, kind = request.param
    with kinds.on(kind):
        yield models[name]


def make_requests(model: Model, count: int, *, n: int = 40, temperature: float | None = None) -> list[Request]:
    """Requests of different lengths; every other one repeats itself, so that n-grams recur. Long ones cross a span."""
    rng = np.random.default_rng(5)
    out = []
    for index in range(count):
        length = int(rng.integers(3, 60)) if index != 1 else 300
        prompt = rng.integers(0, model.config.vocab_size, length)
        if index % 2 == 0:
            prompt = np.tile(prompt[:5], 12)[: max(length, 12)]
        heat = (0.0, 0.7)[index % 2] if temperature is None else temperature
        out.append(Request(index, tuple(prompt.tolist()), n, temperature=heat, seed=100 + index, ignore_eos=True))
    return out


def alone(model: Model, requests: list[Request], **options: Any) -> dict[int, list[int]]:
    """Each request in a session of its own: serial decoding, one team."""
    return {
        request.request_id: run(model, [request], threads=1, **options).tokens[request.request_id]
        for request in requests
    }


@pytest.fixture(scope="module")
def serial(models: dict[str, Model]) -> Callable[[Model], dict[int, list[int]]]:
    known: dict[tuple[str, str], dict[int, list[int]]] = {}

    def tokens(model: Model) -> dict[int, list[int]]:
        key = (model.name, kinds.current)
        if key not in known:
            known[key] = alone(model, make_requests(model, 5))
        return known[key]

    return tokens


def test_alone_and_batched(model: Model, serial: Callable[[Model], dict[int, list[int]]]) -> None:
    result = run(model, make_requests(model, 5), threads=2)
    assert result.tokens == serial(model)
    assert max(step.values["n_decode"] for step in result.steps) > 1
    mixed = [step for step in result.steps if step.values["n_prefill_rows"] and step.values["n_decode_rows"]]
    assert mixed, "no step mixed prompts and decoding"


@pytest.mark.parametrize("teams", [1, 2, 3, 4])
def test_teams(model: Model, serial: Callable[[Model], dict[int, list[int]]], teams: int) -> None:
    assert run(model, make_requests(model, 3), threads=teams).tokens == {i: serial(model)[i] for i in range(3)}


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 512])
def test_prefill_chunks(model: Model, serial: Callable[[Model], dict[int, list[int]]], chunk: int) -> None:
    rows = 16 + chunk  # decode rows never shorten the chunk
    result = run(model, make_requests(model, 3), threads=2, prefill_chunk=chunk, max_step_rows=rows)
    assert result.tokens == {i: serial(model)[i] for i in range(3)}
    assert max(step.values["n_prefill_rows"] for step in result.steps) >= min(chunk, 300)
    assert all(step.values["n_prefill_rows"] <= chunk * step.values["n_prefill"] for step in result.steps)


def test_logits_are_the_same_bits_in_any_chunks(model: Model) -> None:
    request = Request(0, make_requests(model, 2)[1].prompt, 1)
    logits = [
        run(model, [request], threads=teams, prefill_chunk=chunk, max_step_rows=rows, debug_logits=True).logits
        for teams, chunk, rows in ((1, 512, 512), (2, 1, 16), (3, 7, 16), (2, 64, 64))
    ]
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])
    assert logits[0] is not None
    assert np.unique(logits[0]).size > 1000


def test_orchestrations(model: Model, serial: Callable[[Model], dict[int, list[int]]]) -> None:
    for orchestration in ("persistent", "launched"):
        result = run(model, make_requests(model, 5), threads=2, orchestration=orchestration, spec=Ngram(block=4))
        assert result.tokens == serial(model), orchestration


def check_speculation(result: Result, *, rejected: bool = True, accepted: bool = True) -> None:
    outputs = result.outputs.values()
    assert sum(output.proposed for output in outputs) > 0
    if accepted:
        assert sum(output.accepted for output in outputs) > 0
    if rejected:
        assert sum(output.proposed - output.accepted for output in outputs) > 0
    assert sum(step.values["n_draft_rows"] for step in result.steps) == sum(output.proposed for output in outputs)
    assert sum(step.values["n_accepted"] for step in result.steps) == sum(output.accepted for output in outputs)


@pytest.mark.parametrize("block", [2, 3, 4, 8, 16])
def test_ngram_speculation(model: Model, serial: Callable[[Model], dict[int, list[int]]], block: int) -> None:
    result = run(model, make_requests(model, 5), threads=2, spec=Ngram(block=block), acceptance=Keyed())
    assert result.tokens == serial(model)
    check_speculation(result, accepted=False)


@pytest.mark.parametrize("block", [2, 4, 16])
@pytest.mark.parametrize("acceptance", [Keyed(), Forced(stride=3)], ids=lambda policy: policy.name)
def test_oracle_speculation(
    model: Model, serial: Callable[[Model], dict[int, list[int]]], block: int, acceptance: Keyed | Forced
) -> None:
    answers = serial(model)
    requests = [
        Request(**{**request.__dict__, "oracle": tuple(answers[request.request_id])})
        for request in make_requests(model, 5)
    ]
    result = run(model, requests, threads=2, spec=Oracle(block=block, mismatch_stride=4), acceptance=acceptance)
    assert result.tokens == answers
    check_speculation(result)


def test_greedy_acceptance_at_temperature_0(model: Model) -> None:
    requests = make_requests(model, 4, temperature=0.0)
    plain = run(model, requests, threads=2, spec=NoSpec())
    result = run(model, requests, threads=2, spec=Ngram(block=4), acceptance=Greedy())
    assert result.tokens == plain.tokens
    check_speculation(result, accepted=False)


def test_seeds_and_temperature_matter(model: Model) -> None:
    """Keyed sampling is a function of the seed; without it the equalities above would prove less."""
    prompt = make_requests(model, 1)[0].prompt

    def sample(temperature: float, seed: int) -> list[int]:
        return run(model, [Request(0, prompt, 24, temperature=temperature, seed=seed, ignore_eos=True)]).tokens[0]

    greedy, one, again, two = sample(0.0, 1), sample(1.0, 1), sample(1.0, 1), sample(1.0, 2)
    assert one == again
    assert len({tuple(greedy), tuple(one), tuple(two)}) == 3


@pytest.mark.usefixtures("kind")
def test_the_tiny_model_speculates_and_stays_itself() -> None:
    model = load_model("tiny")
    tokenizer = model.tokenizer
    assert tokenizer is not None
    prompts = [
        "def fibonacci(n):\n",
        "class Stack:\n    def __init__(self",
        "for i in range(10):\n    print(i)\nfor i in range(",
    ]
    requests = [Request(i, tuple(tokenizer.encode(text).ids), 96, ignore_eos=True) for i, text in enumerate(prompts)]
    plain = run(model, requests)
    result = run(model, requests, spec=Ngram(block=4))
    assert result.tokens == plain.tokens
    check_speculation(result)
    assert len(result.steps) < len(plain.steps)


def test_the_pages_storage_type_matters(model: Model, tmp_path: Path) -> None:
    """bf16 and fp32 pages differ in bits, so the equalities above compare real reads of pages."""
    from xlpk.kv import KV

    request = [Request(0, make_requests(model, 2)[1].prompt, 1)]
    narrow = run(model, request, kv=KV(budget="64pages", dtype="bf16"), debug_logits=True).logits
    wide = run(model, request, kv=KV(budget="64pages", dtype="fp32"), debug_logits=True).logits
    assert (np.asarray(narrow) != np.asarray(wide)).any()


PRESSURE = ("n_preemptions", "n_moves", "n_recomputed_rows")
TIGHT = {
    "recompute": KV(budget="30pages", page_size=16, prefix_sharing=False),
    "recompute, shared": KV(budget="30pages", page_size=16, eviction="slru"),
    "swap": KV(budget="30pages", page_size=16, prefix_sharing=False, preemption="swap", swap_space="40pages"),
}


@pytest.mark.parametrize("kind_of_kv", TIGHT)
@pytest.mark.parametrize("spec", [NoSpec(), Ngram(block=4)], ids=lambda spec: spec.name)
def test_preemption(model: Model, serial: Callable[[Model], dict[int, list[int]]], kind_of_kv: str, spec: Any) -> None:
    """Pages for the prompts, not for the outputs: who lost them and came back has the same text."""
    result = run(model, make_requests(model, 5), kv=TIGHT[kind_of_kv], threads=2, spec=spec)
    total = {name: sum(step.values[name] for step in result.steps) for name in PRESSURE}
    assert total["n_preemptions"] > 0
    assert (total["n_moves"] > 0) == (kind_of_kv == "swap")
    assert (total["n_recomputed_rows"] > 0) == (kind_of_kv == "recompute") or kind_of_kv == "recompute, shared"
    assert result.tokens == serial(model)


def test_shared_prefixes(model: Model) -> None:
    """Two at a time: pages of others are found, among them some of an attention span that is not full."""
    rng = np.random.default_rng(3)
    prefix = tuple(rng.integers(0, model.config.vocab_size, 280).tolist())
    requests = [Request(i, (*prefix, 3 + i), 12, temperature=0.7, seed=i, ignore_eos=True) for i in range(4)]
    apart = {request.request_id: run(model, [request], threads=1).tokens[request.request_id] for request in requests}
    result = run(model, requests, threads=2, max_num_seqs=2)
    assert result.tokens == apart
    computed = sum(step.values["n_prefill_rows"] for step in result.steps)
    assert computed <= 4 * 281 - 2 * 272


def test_ranks_and_deadlines(model: Model) -> None:
    """One place: the better priority first, under its own text; what is late ends with what it has."""
    prompts = [request.prompt for request in make_requests(model, 5)]
    slow = Request(9, prompts[1], 200, ignore_eos=True)
    ranked = [Request(i, prompts[i], 6, ignore_eos=True, priority=p, seed=i) for i, p in enumerate((3, 1, 2))]
    late = Request(8, prompts[3], 6, ignore_eos=True, priority=9, deadline_ms=0.01)
    result = run(
        model, [slow, *ranked, late], threads=1, max_num_seqs=1, policy="priority", ageing_steps=10_000, max_waiting=8
    )
    order = sorted((0, 1, 2), key=lambda i: result.outputs[i].admitted_step)
    assert order == [1, 2, 0]
    assert result.outputs[8].reason == "deadline"
    assert not result.tokens[8]
    for request in ranked:
        assert result.tokens[request.request_id] == alone(model, [request])[request.request_id]


def test_cancelling_over_a_full_ring_runs_whole_steps(
    model: Model, serial: Callable[[Model], dict[int, list[int]]]
) -> None:
    """A ring of one: the owner's second cancellation makes room for itself while requests run. No step is skipped."""
    plan = KVPlan.make(KV(budget="4096pages"), model.config, model.weights.dtype, 512)
    backend = kinds.make(threads=2, max_waiting=1, max_num_seqs=4)
    requests = make_requests(model, 3)
    outputs, steps = {request.request_id: Output() for request in requests}, []
    backend.open(model, plan)
    try:
        waiting = list(requests)
        while waiting or not all(output.reason for output in outputs.values()):
            while waiting and backend.submit(waiting[0]):
                waiting.pop(0)
            for unknown in (900, 901, 902):
                backend.cancel(unknown)
            gather(backend.poll(), outputs, steps)
    finally:
        backend.close()
    assert {i: output.tokens for i, output in outputs.items()} == {i: serial(model)[i] for i in range(3)}


def test_many_prompts_at_once(model: Model) -> None:
    """Whole chunks for more requests than the step has rows: page tables change in many places at once."""
    rng = np.random.default_rng(8)
    requests = [
        Request(i, tuple(rng.integers(0, model.config.vocab_size, 40).tolist()), 3, ignore_eos=True, seed=i)
        for i in range(24)
    ]
    kv = KV(budget="4096pages", page_size=2)
    result = run(model, requests, kv=kv, threads=2, max_num_seqs=24, max_step_rows=40, prefill_chunk=40)
    assert max(step.values["n_prefill"] for step in result.steps) >= 1
    assert result.tokens == {r.request_id: run(model, [r], threads=1).tokens[r.request_id] for r in requests}
