"""llama.cpp, as `make bench-peers` measures it, computes the same model: its GGUF file is written by us."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_case, prompt
from drive import run

from xlpk.model import Model, load_model
from xlpk.reference import Exact, error_bound, forward
from xlpk.workload import Request

pytestmark = pytest.mark.peers
pytest.importorskip("llama_cpp", reason="needs the extra `bench-peers`")
pytest.importorskip("gguf", reason="needs the extra `bench-peers`")

from xlpk.backends.llama_cpp_speed import LlamaCpp  # noqa: E402
from xlpk.backends.peer_files import gguf_file  # noqa: E402

THREADS = 2


def logits_of(peer: LlamaCpp, tokens: list[int]) -> np.ndarray:
    """[tokens, vocab_size], one token a call."""
    return np.stack([peer.forward([token]).copy() for token in tokens])


@pytest.mark.parametrize(
    "name", ["gqa", "mqa", "head128", "llama3_rope", "linear_rope", "tied_eps", "sharded", "fp16", "head80"]
)
def test_logits(name: str, tmp_path: Path) -> None:
    model = load_model(name, make_case(tmp_path / name, name))
    tokens = [int(token) for token in prompt(name)]
    peer = LlamaCpp(gguf_file(model, "f32", tmp_path), THREADS, len(tokens), exact=True)
    exact = forward(model.config, Exact(model.weights), tokens)
    bound = error_bound(model.config, model.weights, tokens).max()
    assert peer.vocab_size == model.config.vocab_size
    assert np.abs(logits_of(peer, tokens) - exact).max() < 2 * bound
    peer.restart()
    assert np.abs(peer.forward(tokens) - exact[-1]).max() < 2 * bound
    peer.close()


@pytest.mark.parametrize(("dtype", "count"), [("f32", 48), ("f16", 48), ("bf16", 12)])
def test_greedy_tokens_of_the_tiny_model(dtype: str, count: int, tiny: Model, tmp_path: Path) -> None:
    """With bf16 weights llama.cpp rounds activations to bf16 too, and a near tie comes after 20 tokens."""
    tokens = tiny.tokenizer.encode("class HTTPServer(", add_special_tokens=False).ids
    ours = run(tiny, [Request(0, tuple(tokens), count, temperature=0.0, ignore_eos=True)]).tokens[0]
    peer = LlamaCpp(gguf_file(tiny, dtype, tmp_path), THREADS, len(tokens) + count)
    assert peer.measure(tokens, count, prefills=2)["tokens"] == ours
    peer.close()


def test_bf16_bits_are_kept(tiny: Model, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader

    reader = GGUFReader(gguf_file(tiny, "bf16", tmp_path))
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == len(tiny.config.tensor_shapes())
    matrix = found["blk.3.ffn_up.weight"]
    assert matrix.tensor_type == GGMLQuantizationType.BF16
    held = tiny.weights.matrix("model.layers.3.mlp.up_proj.weight").base
    assert np.array_equal(np.ascontiguousarray(matrix.data).view(np.uint16), held)
