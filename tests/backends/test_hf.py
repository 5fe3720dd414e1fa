"""backend=hf: transformers under the same protocol gives the same tokens as the loop of the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends.hf_sessions import FP32, STATIC, gqa_in_float32, opened, ours, served
from backends.test_sampling import OPTIONS, make_requests, tokens_of
from checkpoints import CASES, make_case, prompt, widened
from drive import finish, run

from xlpk import layout
from xlpk.backend import Token
from xlpk.kv import KV
from xlpk.model import TINY, Model, ModelConfig, load_model
from xlpk.speculation import Ngram
from xlpk.weights import Weights
from xlpk.workload import Request

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return gqa_in_float32(tmp_path_factory.mktemp("gqa"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The model that ships, in float32 likewise: its text repeats itself, which prompt lookup finds."""
    return load_model("wide", widened(TINY, tmp_path_factory.mktemp("trained")))


def text_requests(count: int, n: int) -> list[Request]:
    texts = ["def read_file(path):\n", "class Stack:\n    def push(self, item):\n"]
    tokenizer = load_model("tiny").tokenizer
    assert tokenizer is not None
    return [Request(i, tuple(tokenizer.encode(texts[i]).ids), n, ignore_eos=True) for i in range(count)]


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


def test_kept_logits_are_those_of_the_decode_step(model: Model) -> None:
    """Of a cache of fixed size, token by token; of one that grows, of the prompt at once. Both are the loop's."""
    request = Request(0, tuple(range(1, 30)), 2, ignore_eos=True)
    kept, calls = [], []
    for choice in (None, STATIC):
        backend = opened(model, choice, debug_logits=True)
        passes, shapes = backend._passes, []
        passes.forward = lambda ids, *more, f=passes.forward, s=shapes, **keys: (
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
