"""Against transformers itself, here and now: the shipped model and every checkpoint of the golden files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CASES, make_case, make_checkpoint, prompt, widened
from drive import run

from xlpk.kv import KV
from xlpk.model import TINY, Model, load_model
from xlpk.reference import Exact, error_bound, forward, margin
from xlpk.text import ChatTemplate
from xlpk.workload import Request

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")


def torch_logits(folder: Path, tokens: list[int], dtype: str) -> np.ndarray:
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens])).logits[0].float().numpy()


def our_logits(model: Model, tokens: list[int], pages: str) -> np.ndarray:
    result = run(model, [Request(0, tuple(tokens), 1)], kv=KV(dtype=pages), debug_logits=True)
    assert result.logits is not None
    return result.logits


@pytest.mark.parametrize("name", CASES)
def test_random_checkpoints(name: str, tmp_path: Path) -> None:
    folder = make_case(tmp_path / "stored", name)
    model, wide = load_model(name, folder), load_model(name, widened(folder, tmp_path / "widened"))
    tokens = [int(token) for token in prompt(name)]
    exact = forward(model.config, Exact(model.weights), tokens)
    bound = error_bound(model.config, model.weights, tokens).max()
    assert np.abs(our_logits(wide, tokens, "fp32") - torch_logits(folder, tokens, "float32")).max() < 2 * bound
    peer = np.abs(torch_logits(folder, tokens, "bfloat16") - exact)
    ours = np.abs(our_logits(model, tokens, "bf16") - exact)
    assert ours.max() < 2 * peer.max()
    assert np.sqrt(np.mean(ours**2)) < np.sqrt(np.mean(peer**2)), "torch rounds every intermediate, not only products'"


def test_dynamic_rope_equals_one_pass_of_the_whole_length(tmp_path: Path) -> None:
    made = CASES["dynamic_rope"] | {"max_position_embeddings": 48}
    folder = make_checkpoint(tmp_path / "stored", seed=5, **made)
    model = load_model("dynamic", widened(folder, tmp_path / "widened"))
    tokens = np.random.RandomState(6).randint(0, model.config.vocab_size, 121).tolist()
    result = run(model, [Request(0, tuple(tokens[:120]), 1)], kv=KV(dtype="fp32"), max_len=121, debug_logits=True)
    assert result.logits is not None
    bound = error_bound(model.config.at_length(121), model.weights, tokens).max()
    assert np.abs(result.logits - torch_logits(folder, tokens, "float32")[:120]).max() < 2 * bound


def test_the_tiny_model(tmp_path: Path) -> None:
    model, wide = load_model("tiny"), load_model("wide", widened(TINY, tmp_path))
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode((TINY / "heldout.txt").read_text()[:2000]).ids[:400]
    exact = forward(model.config, Exact(model.weights), tokens)
    bound = error_bound(model.config, model.weights, tokens).max()
    assert np.abs(our_logits(wide, tokens, "fp32") - torch_logits(TINY, tokens, "float32")).max() < 2 * bound
    peer = np.abs(torch_logits(TINY, tokens, "bfloat16") - exact)
    ours = np.abs(our_logits(model, tokens, "bf16") - exact)
    assert np.sqrt(np.mean(ours**2)) < np.sqrt(np.mean(peer**2))


def test_the_tiny_model_continues_as_transformers_does(tmp_path: Path) -> None:
    model, wide = load_model("tiny"), load_model("wide", widened(TINY, tmp_path))
    assert model.tokenizer is not None
    peer = transformers.LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    for text in ("def fibonacci(n):\n", "import os\n\ndef read_file(path):\n"):
        prompt_ids = model.tokenizer.encode(text).ids
        ours = run(wide, [Request(0, tuple(prompt_ids), 48, ignore_eos=True)], kv=KV(dtype="fp32")).tokens[0]
        ids = torch.tensor([prompt_ids])
        theirs = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False, eos_token_id=None
        )
        expected = theirs[0, len(prompt_ids) :].tolist()
        whole = (prompt_ids + expected)[:-1]
        margins = margin(forward(model.config, model.weights, whole)[len(prompt_ids) - 1 :])
        bound = error_bound(model.config, model.weights, whole).max()
        undecided = np.flatnonzero(margins <= 2 * bound)
        end = int(undecided[0]) if undecided.size else len(expected)
        assert end >= 24, "too close to call almost everywhere proves nothing"
        assert ours[:end] == expected[:end]


def test_chats_are_those_of_transformers(tmp_path: Path) -> None:
    source = """{{ bos_token }}{% for message in messages %}
        {%- if loop.index > 2 %}{% break %}{% endif %}
    <|{{ message['role'] }}|>
    {{ message['content'] | trim }}{{ eos_token }}{{ message | tojson(indent=2) }}
    {% endfor %}
    {% if add_generation_prompt %}<|assistant|>{% endif %}"""
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": source}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    chat = [{"role": role, "content": f" <Grüße> {role}\n"} for role in ("system", "user", "assistant")]
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = ChatTemplate.open(tmp_path)
    assert ours is not None
    for add in (False, True):
        expected = peer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add)
        assert ours.render(chat, add_generation_prompt=add) == expected


def test_transformers_reads_the_shipped_draft() -> None:
    draft = transformers.LlamaForCausalLM.from_pretrained(TINY / "draft", dtype=torch.float32)
    assert draft.num_parameters() <= 500_000
    assert load_model("tiny").config.parameters <= 3_000_000
