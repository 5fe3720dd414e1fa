"""backend=hf: transformers under the same protocol gives the same tokens, events and ends as the loop of the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends.test_sampling import OPTIONS, make_requests, tokens_of
from checkpoints import CASES, make_case, prompt, widened
from drive import CACHE, Output, Result, finish, gather, run

from xlpk import layout
from xlpk.backend import StepDone, Token
from xlpk.backends.hf import RING, HfBackend
from xlpk.errors import InputError
from xlpk.kv import KV, KVPlan
from xlpk.model import TINY, Model, ModelConfig, load_model
from xlpk.settings import HfBackend as Choice
from xlpk.speculation import Forced, Greedy, Ngram, Oracle
from xlpk.weights import Weights
from xlpk.workload import Request

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")

FP32 = KV(budget="256pages", dtype="fp32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Matrices in float32: nothing is rounded but sums, so that tokens are equal, not alike."""
    folder = tmp_path_factory.mktemp("gqa")
    return load_model("gqa", widened(make_case(folder / "stored", "gqa"), folder / "widened"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The model that ships, in float32 likewise: its text repeats itself, which prompt lookup finds."""
    return load_model("wide", widened(TINY, tmp_path_factory.mktemp("trained")))


def text_requests(count: int, n: int) -> list[Request]:
    texts = ["def read_file(path):\n", "class Stack:\n    def push(self, item):\n"]
    tokenizer = load_model("tiny").tokenizer
    assert tokenizer is not None
    return [Request(i, tuple(tokenizer.encode(texts[i]).ids), n, ignore_eos=True) for i in range(count)]


def opened(model: Model, choice: Choice | None = None, kv: KV = FP32, max_len: int = 512, **options: Any) -> HfBackend:
    backend = HfBackend(choice or Choice(device="cpu", threads=1), cache=CACHE, **options)
    backend.open(model, KVPlan.make(kv, model.config, model.weights.dtype, max_len))
    return backend


def served(model: Model, requests: Sequence[Request], choice: Choice | None = None, **options: Any) -> Result:
    backend = opened(model, choice, **options)
    try:
        result = finish(backend, requests)  # type: ignore[arg-type]
        assert backend.free_pages() == 256
    finally:
        backend.close()
    return result


def ours(model: Model, requests: Sequence[Request]) -> dict[int, list[int]]:
    return run(model, requests, kv=FP32, threads=1).tokens


STATIC = Choice(device="cpu", threads=1, cache="static")


@pytest.mark.parametrize("name", ["greedy", "temperature", *OPTIONS])
def test_the_same_tokens_as_the_loop(model: Model, name: str) -> None:
    options = {"greedy": {}, "temperature": {"temperature": 0.8}} | OPTIONS
    requests = make_requests(options[name])
    expected = ours(model, requests)
    assert served(model, requests).tokens == expected, "one batch, padded on the left"
    drafted = served(model, requests, spec=Ngram(block=6))
    assert drafted.tokens == expected
    if name in ("greedy", "all"):
        assert served(model, requests, STATIC).tokens == expected
    if name != "greedy penalties":  # which repeat nothing that could be looked up
        assert sum(output.proposed for output in drafted.outputs.values()) > 0


@pytest.mark.heavy
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_checkpoint(name: str, tmp_path: Path) -> None:
    """In float32 the loop's tokens; as it is stored it runs too."""
    stored = load_model(name, make_case(tmp_path / "stored", name))
    wide = load_model(name, widened(tmp_path / "stored", tmp_path / "widened"))
    request = Request(0, tuple(int(token) for token in prompt(name))[:40], 24, ignore_eos=True)
    expected = run(wide, [request], kv=FP32, threads=1, max_len=128).tokens
    assert served(wide, [request], max_len=128).tokens == expected
    assert len(served(stored, [request], kv=KV(budget="256pages"), max_len=128).tokens[0]) == 24


def test_drafts_are_accepted_and_counted(trained: Model) -> None:
    requests = text_requests(2, 120)
    result = served(trained, requests, spec=Ngram(block=8))
    assert result.tokens == ours(trained, requests)
    for output in result.outputs.values():
        assert 0 < output.accepted < output.proposed
        assert len(output.tokens) == 1 + sum(1 + accepted for _, accepted in output.verifications)
    values = [step.values for step in result.steps]
    assert sum(v["n_accepted"] for v in values) == sum(output.accepted for output in result.outputs.values())
    assert sum(v["n_draft_rows"] for v in values) == sum(output.proposed for output in result.outputs.values())
    assert any(v["pages_draft"] for v in values)
    assert len(values) < 2 * 121
    plain, position, inside = result.tokens[0], 1, 0
    for _, accepted in result.outputs[0].verifications:
        target = tuple(plain[max(0, position - layout.MAX_TARGET + 1) : position + 1])
        if accepted and position >= layout.MAX_TARGET and inside < 3:
            ended = served(trained, [replace(requests[0], target=target)], spec=Ngram(block=8)).outputs[0]
            if len(ended.tokens) == position + 1:  # an end inside a block: its last token counts as the model's own
                inside += 1
                assert ended.reason == "target"
                assert len(ended.tokens) == 1 + sum(1 + count for _, count in ended.verifications)
        position += 1 + accepted
    assert inside > 0


def test_the_tokens_and_drafts_of_generate(trained: Model) -> None:
    """transformers' own generate(), plain and with prompt lookup, in as many forward passes."""
    (request,) = text_requests(1, 60)
    peer = transformers.LlamaForCausalLM.from_pretrained(trained.path, dtype=torch.float32).eval()
    ids = torch.tensor([request.prompt])
    calls = 0
    forward = peer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    peer.forward = counted
    common = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
    plain = peer.generate(ids, **common)[0, ids.shape[1] :].tolist()
    assert served(trained, [request]).tokens[0] == plain
    calls = 0
    common["prompt_lookup_num_tokens"], common["max_matching_ngram_size"] = 5, 3
    looked_up = peer.generate(ids, **common)[0, ids.shape[1] :].tolist()
    assert looked_up == plain
    result = served(trained, [request], spec=Ngram(block=6, max_n=3))
    assert result.tokens[0] == plain
    assert len(result.steps) == calls < 60


def test_requests_come_and_go(model: Model) -> None:
    """Of many lengths, some late, three places: each has the tokens that it has alone."""
    rng = np.random.default_rng(2)
    requests = [
        Request(i, tuple(rng.integers(0, 1031, 1 + 5 * (i % 4)).tolist()), 2 + 7 * (i % 3), seed=i, temperature=0.9)
        for i in range(10)
    ]
    backend = opened(model, max_num_seqs=3)
    outputs, steps = {i: Output() for i in range(10)}, []
    for request in requests:
        assert backend.submit(request)
        gather(backend.poll(), outputs, steps)
        gather(backend.poll(), outputs, steps)
    give_up = time.monotonic() + 60
    while not all(output.reason for output in outputs.values()):
        assert time.monotonic() < give_up
        gather(backend.poll(), outputs, steps)
    backend.close()
    assert {i: output.tokens for i, output in outputs.items()} == ours(model, requests)
    admitted = [outputs[i].admitted_step for i in range(10)]
    assert admitted == sorted(admitted), "first come, first served"
    assert max(step.values["n_decode"] for step in steps) == 3
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    tight = served(model, requests, max_num_seqs=8, kv=KV(budget="256pages", dtype="fp32"))
    assert tight.tokens == {i: output.tokens for i, output in outputs.items()}


def test_pages_decide_how_many_run(model: Model) -> None:
    """What all of them take, padded to the longest, fits the budget."""
    requests = [Request(0, (1,) * 40, 8, ignore_eos=True), *(Request(i, (i,), 8, ignore_eos=True) for i in range(1, 6))]
    backend = opened(model, kv=KV(budget="8pages", dtype="fp32"))
    try:
        result = finish(backend, requests)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"kv\.budget=8 pages: request 9 needs 9 pages"):
            backend.submit(Request(9, (1,) * 130, 8))
    finally:
        backend.close()
    assert {len(output.tokens) for output in result.outputs.values()} == {8}
    assert max(step.values["n_decode"] for step in result.steps) > 2, "more, once the long one has gone"
    assert all(step.values["n_decode"] <= 2 for step in result.steps if step.values["context_tokens"] > 45)


@pytest.mark.parametrize("spec", [None, Ngram(block=4)], ids=["serial", "ngram"])
def test_every_way_to_end(model: Model, spec: Ngram | None) -> None:
    (request,) = make_requests({"temperature": 1.0}, 1)
    plain = served(model, [request]).tokens[0]

    def ended(**options: Any) -> tuple[str, int]:
        output = served(model, [replace(request, **options)], spec=spec).outputs[0]
        assert output.tokens == plain[: len(output.tokens)]
        return output.reason, len(output.tokens)

    assert ended() == ("length", 40)
    assert ended(stop_token_ids=(plain[20], plain[9])) == (
        "stop",
        1 + min(plain.index(plain[20]), plain.index(plain[9])),
    )
    assert ended(target=tuple(plain[4:7])) == ("target", 7)
    config = replace(model.config, eos_token_ids=(plain[11],))
    twin = replace(model, config=config)
    output = served(twin, [replace(request, ignore_eos=False)], spec=spec).outputs[0]
    assert (output.reason, len(output.tokens)) == ("eos", plain.index(plain[11]) + 1)


def test_logprobs(model: Model) -> None:
    (request,) = make_requests({"temperature": 0.9, "top_k": 8, "frequency_penalty": 1.0, "logprobs": 5}, 1)
    expected = tokens_of(model, [request], library=None)[0]
    backend = opened(model)
    seen: list[Token] = []
    backend.submit(request)
    while len(seen) < 40:
        seen += [event for event in backend.poll() if isinstance(event, Token)]
    backend.close()
    for token, other in zip(seen, expected, strict=True):
        assert token.token == other.token
        assert token.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert token.top_logprobs is not None
        assert other.top_logprobs is not None
        assert [i for i, _ in token.top_logprobs] == [i for i, _ in other.top_logprobs]


def test_nan_ends_a_request(model: Model) -> None:
    backend = opened(model)
    backend._net.model.norm.weight.data[:] = float("nan")
    for options in ({}, {"temperature": 1.0}):
        output = finish(backend, [Request(0, (1, 2), 4, **options)]).outputs[0]  # type: ignore[arg-type]
        assert (output.reason, output.tokens) == ("error", [])
    backend.close()


def test_cancel(model: Model) -> None:
    backend = opened(model, max_num_seqs=2)
    requests = [Request(i, (3, 4, 5 + i), 30, ignore_eos=True) for i in range(5)]
    outputs, steps = {i: Output() for i in range(5)}, []
    for request in requests:
        assert backend.submit(request)
    gather(backend.poll(), outputs, steps)  # the prompt of 0; 1 waits for its own step
    for request_id in (4, 1, 99):
        backend.cancel(request_id)
    for _ in range(8):
        gather(backend.poll(), outputs, steps)
    backend.cancel(0)
    give_up = time.monotonic() + 60
    while not all(output.reason for output in outputs.values()):
        assert time.monotonic() < give_up
        gather(backend.poll(), outputs, steps)
    backend.close()
    assert [outputs[i].reason for i in range(5)] == ["cancelled", "cancelled", "length", "length", "cancelled"]
    assert 0 < len(outputs[0].tokens) < 30
    assert not outputs[1].tokens
    alone = ours(model, requests)
    assert {i: outputs[i].tokens for i in (2, 3)} == {i: alone[i] for i in (2, 3)}
    assert backend.close() is backend.close()


def test_the_ring_is_full(model: Model) -> None:
    backend = opened(model, max_num_seqs=1)
    for i in range(RING):
        assert backend.submit(Request(i, (1,), 1))
    assert not backend.submit(Request(RING, (1,), 1))
    backend.poll()
    assert backend.submit(Request(RING, (1,), 1))
    backend.close()


def test_refused_requests_leave_the_loop_well(model: Model) -> None:
    backend = opened(model)
    for request in (Request(1, (), 4), Request(1, (1,) * 500, 13), Request(1, (2048,), 4), Request(1, (1,), 0)):
        with pytest.raises(InputError):
            backend.submit(request)
    assert finish(backend, [Request(2, (1, 2), 3, ignore_eos=True)]).outputs[2].reason == "length"  # type: ignore[arg-type]
    backend.close()


@pytest.mark.parametrize("choice", [None, STATIC], ids=["dynamic", "static"])
def test_steps_account_for_every_page_and_token(model: Model, choice: Choice | None) -> None:
    requests = [Request(i, tuple(range(1, 10 + 5 * i)), 12 - i, ignore_eos=True) for i in range(4)]
    result = served(model, requests, choice)
    fields = {name for name, _, _ in layout.STEP_RECORD.fields} - {"phase_ns"}
    for step in result.steps:
        assert isinstance(step, StepDone)
        values = step.values
        assert set(values) == fields
        assert values["pages_free"] + values["pages_active"] + values["pages_draft"] == values["pages_total"] == 256
        assert values["n_rows"] == values["n_prefill_rows"] + values["n_decode_rows"] + values["n_draft_rows"]
        assert values["end_ns"] > values["begin_ns"]
        assert sum(step.phase_ns.values()) == values["end_ns"] - values["begin_ns"]
        assert values["live_tokens"] <= 16 * values["live_pages"]
    totals = {name: sum(step.values[name] for step in result.steps) for name in ("n_tokens", "n_finished")}
    assert totals == {"n_tokens": 12 + 11 + 10 + 9, "n_finished": 4}
    assert sum(step.values["n_prefill_rows"] for step in result.steps) == sum(len(r.prompt) for r in requests)
    if choice is STATIC:
        assert {step.values["pages_active"] for step in result.steps} == {32}, "512 positions, all the time"


def test_kept_logits_are_those_of_the_decode_step(model: Model) -> None:
    """Of a cache of fixed size, token by token; of one that grows, of the prompt at once. Both are the loop's."""
    request = Request(0, tuple(range(1, 30)), 2, ignore_eos=True)
    kept, calls = [], []
    for choice in (None, STATIC):
        backend = opened(model, choice, debug_logits=True)
        forward, shapes = backend._forward, []
        backend._forward = lambda ids, *more, f=forward, s=shapes, **keys: (
            s.append(len(ids[0])),
            f(ids, *more, **keys),
        )[1]
        tokens = finish(backend, [request]).tokens[0]  # type: ignore[arg-type]
        kept.append(backend.logits(29))
        calls.append(shapes)
        backend.close()
        assert tokens == ours(model, [request])[0]
    assert calls == [[29, 1], [1] * 30]
    loop = run(model, [request], kv=FP32, debug_logits=True, threads=1).logits
    for logits in kept:
        np.testing.assert_allclose(logits, loop, atol=2e-4)


def test_hash_weights_need_no_files(tmp_path: Path) -> None:
    """The arrays themselves, and the folder that bench writes of them, are one model."""
    from xlpk.backends import hf_model
    from xlpk.backends.peer_files import hf_folder

    config = ModelConfig(
        vocab_size=160, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
        max_position_embeddings=256, tie_word_embeddings=False, dtype="bfloat16", bos_token_id=1, eos_token_ids=(2,),
    )  # fmt: skip
    for tied in (False, True):
        small = replace(config, tie_word_embeddings=tied)
        shape = Model("shape", small, Weights.from_hash(small, 3, "bf16"), None)
        ids = torch.tensor([[5, 6, 7, 100]])
        nets = hf_model.load(shape, "bf16", "cpu"), hf_model.load_folder(hf_folder(shape, tmp_path), "bf16")
        with torch.inference_mode():
            one, other = (net(ids).logits for net in nets)
        assert torch.equal(one, other)
        assert one.float().std() > 0.01
        result = served(shape, [Request(0, (5, 6), 5, ignore_eos=True)], kv=KV(budget="256pages"), max_len=256)
        assert len(result.tokens[0]) == 5


@pytest.mark.parametrize(
    ("choice", "options", "message"),
    [
        (Choice(), {"spec": Oracle()}, "spec=oracle: ngram"),
        (Choice(), {"spec": Ngram(min_n=2)}, "spec.min_n=2: 1 with"),
        (Choice(), {"spec": Ngram(), "acceptance": Forced()}, "acceptance=forced: keyed"),
        (Choice(cache="static"), {"spec": Ngram()}, "backend.cache=static: mode=serial_decode"),
        (Choice(compile=True), {}, "backend.compile=true: false with backend.cache=dynamic"),
        (Choice(cache="paged"), {}, "backend.cache=paged: one of dynamic, static"),
        (Choice(dtype="int8"), {}, "backend.dtype=int8: one of auto, bf16"),
        (Choice(device="tpu"), {}, "backend.device=tpu: one of auto, cpu, cuda"),
        (Choice(threads=-1), {}, "backend.threads=-1: 0 to 1024"),
    ],
)
def test_refused_options(choice: Choice, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        HfBackend(choice, cache=CACHE, **options)
    assert str(refused.value).startswith(message)


def test_refused_when_it_opens_or_submits(model: Model) -> None:
    with pytest.raises(InputError, match=r"kv\.dtype=bf16: auto"):
        opened(model, kv=KV(dtype="bf16"))
    backend = opened(model, spec=Ngram(), acceptance=Greedy())
    assert backend.submit(Request(0, (1,), 1))
    with pytest.raises(InputError, match="acceptance=greedy: keyed"):
        backend.submit(Request(1, (1,), 1, temperature=0.5))
    backend.close()


@pytest.mark.heavy
def test_compiled(model: Model) -> None:
    """The same tokens; the decode step was compiled before the first request."""
    requests = make_requests({}, 2)
    backend = opened(model, replace(STATIC, compile=True))
    try:
        assert float(backend._report.details["compile_seconds"]) > 0
        assert finish(backend, requests).tokens == ours(model, requests)  # type: ignore[arg-type]
    finally:
        backend.close()


def test_the_command_line(tmp_path: Path) -> None:
    """One override compares: the same log, the same keys but for what nobody counts, a stop string cut off."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "cache").symlink_to(CACHE)
    options = ["tracking=none", "workload.requests=2", "sampling.max_new_tokens=60", "kv.dtype=auto"]
    command = [sys.executable, "-m", "xlpk.run", "-m", "backend=cpu,hf", "mode=serial_decode", *options]
    done = subprocess.run([*command, "sampling.stop=['file-like']"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    points = sorted((tmp_path / "outputs" / "sweeps").glob("*/*/[01]"))
    cpu, peer = (json.loads((point / "metrics.json").read_text()) for point in points)
    for metrics in (cpu, peer):
        assert metrics["requests/finished_stop"] >= 1
        assert metrics["requests/overrun_tokens"] >= 0
        assert metrics["device_latency/itl_ms.n"] > 0
        assert metrics["kv/active_bytes.peak"] > 0
    counted = {
        key
        for key in cpu
        if key.startswith(("host/", "phase/", "kv/prefix_", "kv/hit_rate")) or key == "loop/device_idle_share"
    }
    phases = {f"phase/{name}_{what}" for name in ("forward", "control") for what in ("ms.mean", "share")}
    assert cpu.keys() - peer.keys() == counted - phases
    assert peer.keys() - cpu.keys() == {
        "phase/forward_ms.mean", "phase/forward_share", "phase/forward_bytes", "phase/forward_gb_per_s",
    }  # fmt: skip
    assert peer["phase/forward_bytes"] > peer["loop/steps"] * load_model("tiny").config.bytes_per_token("bf16")
    text = (points[1] / "text.txt").read_text()
    assert "file-like" not in text.split("completion\n")[1]
    build = json.loads((points[1] / "build.json").read_text())["backend"]
    assert (build["device"], build["cache"], build["dtype"]) == ("cpu", "dynamic", "bf16")
    assert "not counted" not in done.stderr


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xlpk.run", "backend=hf", "backend.device=cuda", "tracking=none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert done.returncode == 3
    assert "backend.device=cuda: this torch sees no GPU" in done.stderr
