"""Tokenizers of the three common kinds: the same ids and texts as transformers' AutoTokenizer, streamed or not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_case
from test_text import byte_fallback, byte_level, stream
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from xlpk.errors import InputError
from xlpk.kv import KV, KVPlan
from xlpk.model import Model, load_model
from xlpk.text import ChatTemplate
from xlpk.workload import Prompts, Sampling, is_text, make_requests

TEXTS = [
    "",
    " ",
    "a",
    " two  spaces end ",
    "Grüße, 世界! 👩‍👩‍👧 naïve\n\tcafé £ € 𝄞",
    "<s>a</s> b<|im_end|>\n c <added!>d<added!>  e",
    "a<added!>b< added! ><|im_end|",
    "x <mask> y<mask>z  <mask>",
    "\ufffd \u200d\u0301\u0000\x7f",
    "\r\nthe end\r\n\r\n",
    "aaa" * 50,
]


def unigram() -> Tokenizer:
    """As T5 and ALBERT come: pieces with scores, the best path by Viterbi; bytes for what no piece covers."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    pieces += [
        (piece, -3.0 - 0.1 * i) for i, piece in enumerate(["▁", *"abcdeghinopstwxyz", "▁the", "▁end", "the", "€"])
    ]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\t", " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "unigram": unigram,
}


def saved(folder: Path, kind: str) -> Model:
    """A checkpoint whose tokenizer has every kind of added token, and was saved as training left it."""
    made = KINDS[kind]()
    made.add_special_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<mask>", lstrip=True, special=True)])
    made.add_tokens([AddedToken("<added!>", rstrip=True, normalized=False), AddedToken("end", single_word=True)])
    made.enable_truncation(max_length=20)
    made.enable_padding(length=8, pad_id=1, pad_token="<s>")
    make_case(folder, "head96")
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_model(kind, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_neither_cut_nor_filled_up(tmp_path: Path, kind: str) -> None:
    tokenizer = saved(tmp_path, kind).tokenizer
    assert len(tokenizer.encode("a b " * 40).ids) > 40
    assert len(tokenizer.encode("a").ids) < 8


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_the_text(tmp_path: Path, kind: str, skip: bool) -> None:
    """Of encoded texts and of random ids, added tokens and broken UTF-8 among them."""
    tokenizer, rng = saved(tmp_path, kind).tokenizer, random.Random(2)
    size = tokenizer.get_vocab_size()
    made = [tokenizer.encode(text).ids for text in TEXTS]
    made += [
        [rng.choice((rng.randrange(size), rng.randrange(max(0, size - 6), size))) for _ in range(n)] for n in range(60)
    ]
    for ids in made:
        assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip), ids


def refusal(model: Model) -> str:
    plan = KVPlan.make(KV(), model.config, model.weights.dtype, 64)
    with pytest.raises(InputError) as refused:
        make_requests(Prompts(prompt=["a", "Q€"]), Sampling(), model, plan)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def damaged(folder: Path, kind: str, change: Callable[[dict[str, Any]], object]) -> Model:
    saved(folder, kind)
    contents = json.loads((folder / "tokenizer.json").read_text())
    change(contents)
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    return load_model(kind, folder)


def test_a_tokenizer_that_breaks_in_use_is_named(tmp_path: Path) -> None:
    """Errors, and panics of the library's Rust code, which are no Exceptions."""
    no_unknown = damaged(tmp_path / "1", "unigram", lambda t: t["model"].update(unk_id=None, byte_fallback=False))
    assert refusal(no_unknown).startswith("tokenizer.json=Encountered an unknown token but `unk_id` is missing: ")

    def misname(contents: dict[str, Any]) -> None:
        contents["post_processor"]["single"][0]["SpecialToken"]["id"] = "x"

    no_token = damaged(tmp_path / "2", "unigram", misname)
    assert refusal(no_token).startswith("tokenizer.json=no entry found for key: ")


def test_ids_that_a_tokenizer_cannot_decode(tmp_path: Path) -> None:
    def strip(contents: dict[str, Any]) -> None:
        contents["decoder"]["decoders"][-1].update(start=1, stop=1)

    tokenizer = damaged(tmp_path, "byte_fallback", strip).tokenizer
    with pytest.raises(InputError, match=r"^tokenizer\.json=index out of bounds"):
        stream(tokenizer, tokenizer.encode("a b").ids, False)


def test_another_models_tokenizer_is_named(tmp_path: Path) -> None:
    def renumber(contents: dict[str, Any]) -> None:
        contents["model"]["vocab"]["a"] = 771

    line = refusal(damaged(tmp_path, "byte_fallback", renumber))
    assert line == "tokenizer.json=token 771: tokens below vocab_size=771: another model's tokenizer?"


@pytest.mark.peers
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_has_the_same_ids_and_texts(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    model = saved(tmp_path, kind)
    ours, theirs = model.tokenizer, AutoTokenizer.from_pretrained(str(tmp_path))
    rng = random.Random(3)
    alphabet = [*"ab é€世👩\n\t", "<s>", "</s>", "<mask>", "<added!>", "<|im_end|>", "end", " end ", "<0xE2>", "▁"]
    texts = TEXTS + ["".join(rng.choices(alphabet, k=rng.randrange(1, 20))) for _ in range(200)]
    kinds_seen: set[bool] = set()
    for text in texts:
        assert is_text(text)
        for special in (False, True):
            ids = ours.encode(text, add_special_tokens=special).ids
            assert ids == theirs(text, add_special_tokens=special)["input_ids"], text
        for skip in (False, True):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert "".join(stream(ours, ids, skip)) == expected, text
            kinds_seen.add(any(token in ours.get_added_tokens_decoder() for token in ids))
    assert kinds_seen == {False, True} or kind != "byte_level"
    for _ in range(200):
        ids = [rng.randrange(ours.get_vocab_size()) for _ in range(rng.randrange(30))]
        for skip in (False, True):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert "".join(stream(ours, ids, skip)) == expected, ids


@pytest.mark.peers
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_renders_the_same_chat(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    model, chat = saved(tmp_path, kind), [{"role": "user", "content": "a <|im_end|> end\n世"}]
    template: Any = model.chat_template
    assert isinstance(template, ChatTemplate)
    text = template.render(chat)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True)
    ids = ids["input_ids"] if isinstance(ids, dict) or hasattr(ids, "keys") else ids
    assert model.tokenizer.encode(text, add_special_tokens=False).ids == ids
