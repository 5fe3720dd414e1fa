"""Streamed text is the text; a chat becomes the prompt that its template writes, or one line of refusal."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_case
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from xlpk.errors import InputError
from xlpk.kv import KV, KVPlan
from xlpk.model import TINY, load_model
from xlpk.text import ChatTemplate, IncrementalText
from xlpk.workload import Prompts, Sampling, make_requests

SAMPLE = "Grüße, 世界! 👩‍👩‍👧 naïve\n\tcafé £ € 𝄞 ‮abc  two  spaces \ufffd end"


def byte_level() -> Tokenizer:
    """No merges: each character beyond ASCII takes several tokens."""
    made = Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([], BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens(["<added!>", "世"])
    return made


def byte_fallback() -> Tokenizer:
    """As SentencePiece models come: words with a metaspace, single bytes for what the vocabulary lacks."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += [*"abcdeghinopstwxyz", "▁two", "▁spaces", "▁end", "€", "\ufffd", "▁a"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def metaspace() -> Tokenizer:
    made = Tokenizer(
        models.BPE({w: i for i, w in enumerate(["<unk>", "▁", *"abcde", "▁ab", "cd"])}, [], unk_token="<unk>")
    )
    made.decoder = decoders.Metaspace()
    return made


def word_pieces() -> Tokenizer:
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(["[UNK]", "play", "##ing", "##ed", ".", "it"])}))
    made.decoder = decoders.WordPiece()
    return made


KINDS = {
    "tiny": lambda: load_model("tiny").tokenizer,
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "word_pieces": word_pieces,
}


@pytest.fixture(scope="module")
def made() -> dict[str, Tokenizer]:
    return {name: make() for name, make in KINDS.items()}


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    text = IncrementalText(tokenizer, skip_special_tokens=skip)
    return [*(text.push(token) for token in ids), text.finish()]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_join_to_the_whole(made: dict[str, Tokenizer], kind: str, skip: bool) -> None:
    tokenizer, rng = made[kind], random.Random(1)
    size = tokenizer.get_vocab_size()
    held = 0
    for length in [*range(12), *[30] * 200, 400]:
        ids = [rng.randrange(min(size, rng.choice((8, 270, size)))) for _ in range(length)]
        pieces = stream(tokenizer, ids, skip)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip), ids
        held += sum(not piece for piece in pieces)
    assert held or kind in ("metaspace", "word_pieces")


@pytest.mark.parametrize("kind", ["tiny", "byte_level", "byte_fallback"])
def test_no_piece_holds_half_a_character(made: dict[str, Tokenizer], kind: str) -> None:
    text = SAMPLE.replace("\ufffd", "")
    ids = made[kind].encode(text, add_special_tokens=False).ids
    assert len(ids) > len(text), "characters of several tokens"
    pieces = stream(made[kind], ids, False)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 10


def test_a_character_that_stays_incomplete_comes_at_the_end(made: dict[str, Tokenizer]) -> None:
    for kind in ("byte_level", "byte_fallback"):
        ids = made[kind].encode("a👩", add_special_tokens=False).ids[:-1]
        pieces = stream(made[kind], ids, False)
        assert "\ufffd" not in "".join(pieces[:-1])
        assert pieces[-1].endswith("\ufffd")
        assert "".join(pieces) == made[kind].decode(ids)


def test_a_run_of_bytes_is_one_decision(made: dict[str, Tokenizer]) -> None:
    """The decoder shows a run with one bad byte as broken bytes only: what looked whole must not have been said."""
    tokenizer = made["byte_fallback"]
    euro = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    ids = [*euro, tokenizer.token_to_id("<0xFF>"), tokenizer.token_to_id("a")]
    assert stream(tokenizer, ids, False) == ["", "", "", "", "\ufffd" * 4 + "a", ""]
    assert stream(tokenizer, [*euro, tokenizer.token_to_id("a")], False) == ["", "", "", "€a", ""]


def test_a_skipped_token_does_not_part_a_run(made: dict[str, Tokenizer]) -> None:
    tokenizer = made["byte_fallback"]
    first, second = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode())
    ids = [first, tokenizer.token_to_id("</s>"), second, tokenizer.token_to_id("a")]
    assert "".join(stream(tokenizer, ids, True)) == "éa"
    assert (
        "".join(stream(tokenizer, ids, False))
        == "\ufffd</s>\ufffda"
        == tokenizer.decode(ids, skip_special_tokens=False)
    )


def test_special_tokens_are_an_option_and_added_ones_stay(made: dict[str, Tokenizer]) -> None:
    tokenizer = made["byte_level"]
    ids = [tokenizer.token_to_id(word) for word in ("<s>", "<added!>", "a", "</s>")]
    assert (
        "".join(stream(tokenizer, ids, False)) == "<s><added!>a</s>" == tokenizer.decode(ids, skip_special_tokens=False)
    )
    assert "".join(stream(tokenizer, ids, True)) == "<added!>a" == tokenizer.decode(ids)


def test_ids_without_a_token_say_nothing(made: dict[str, Tokenizer]) -> None:
    assert stream(made["byte_level"], [10**6, 10**6], False) == ["", "", ""]


def test_a_push_decodes_a_few_tokens(made: dict[str, Tokenizer]) -> None:
    class Counting:
        longest = 0

        def __init__(self, inner: Tokenizer) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def decode(self, ids: list[int], **options: Any) -> str:
            self.longest = max(self.longest, len(ids))
            return str(self.inner.decode(ids, **options))

    counting = Counting(made["byte_level"])
    text = SAMPLE.replace("\ufffd", "") * 20
    assert "".join(stream(counting, counting.encode(text).ids, False)) == text  # type: ignore[arg-type]
    assert counting.longest < 16


def test_bos_is_what_the_post_processor_says(made: dict[str, Tokenizer]) -> None:
    tokenizer = made["byte_fallback"]
    with_bos, without = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    assert with_bos.ids == [1, *without.ids]
    assert made["byte_level"].encode("a").ids == made["byte_level"].encode("a", add_special_tokens=False).ids


# ---------------------------------------------------------------------------------------------- chat templates

CHATML = """{{ bos_token }}{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('unknown role ' + message.role) }}
    {% endif %}
<|{{ message['role'] }}|>{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
CHAT = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Grüße <b>"}]
WHOLE = "<s><|system|>Be brief.</s>\n<|user|>Grüße <b></s>\n"


def folder(path: Path, template: object = None, file: str | None = None, **more: object) -> Path:
    config = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, **more}
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if file is not None:
        (path / "chat_template.jinja").write_text(file)
    return path


def opened(path: Path) -> ChatTemplate:
    template = ChatTemplate.open(path)
    assert template is not None
    return template


def refusal(action: Any) -> str:
    with pytest.raises(InputError) as error:
        action()
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_a_chat_becomes_a_prompt(tmp_path: Path) -> None:
    template = opened(folder(tmp_path, CHATML))
    assert template.render(CHAT) == WHOLE + "<|assistant|>"
    assert template.render(CHAT, add_generation_prompt=False) == WHOLE


def test_where_the_template_is(tmp_path: Path) -> None:
    assert ChatTemplate.open(tmp_path) is None
    assert ChatTemplate.open(TINY) is None
    assert ChatTemplate.open(folder(tmp_path)) is None
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert opened(folder(tmp_path, named)).render([]) == "plain"
    assert opened(folder(tmp_path, "config", "{{ eos_token }}file")).render([]) == "</s>file"


def test_json_is_plain_and_loops_can_break(tmp_path: Path) -> None:
    source = "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    assert opened(folder(tmp_path, source)).render([{"role": "ü<", "content": 1}, {}]) == '{"role": "ü<", "content": 1}'


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ raise_exception('no\nsystem') }}", "no\\nsystem"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% include 'x' %}", "loader"),
        ("{{ nothing.at.all }}", "undefined"),
    ],
)
def test_what_a_template_raises_is_one_line(tmp_path: Path, source: str, text: str) -> None:
    template = opened(folder(tmp_path, source))
    message = refusal(lambda: template.render(CHAT))
    assert message.startswith("tokenizer_config.json:chat_template=")
    assert text in message


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"template": "{% if %}"}, "a jinja template"),
        ({"template": "{{ unclosed"}, "a jinja template"),
        ({"template": 7}, "a jinja template, or a list"),
        ({"template": [{"name": "rag", "template": "x"}]}, "named default"),
        ({"template": "x", "bos_token": 5}, "tokenizer_config.json:bos_token=5"),
        ({"file": "{% endfor %}"}, "chat_template.jinja="),
        ({"file": "x" * (1 << 20) + "x"}, "at most 1048576 bytes"),
    ],
)
def test_a_broken_template_is_refused(tmp_path: Path, arguments: dict[str, Any], text: str) -> None:
    assert text in refusal(lambda: ChatTemplate.open(folder(tmp_path, **arguments)))


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert "a JSON object" in refusal(lambda: ChatTemplate.open(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "valid JSON" in refusal(lambda: ChatTemplate.open(tmp_path))
    folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    assert "UTF-8" in refusal(lambda: ChatTemplate.open(tmp_path))


def test_a_prompt_as_a_chat(tmp_path: Path) -> None:
    model = load_model("chat", make_case(folder(tmp_path, "{{ bos_token }}{{ messages[0].content }}"), "head96"))
    byte_fallback().save(str(tmp_path / "tokenizer.json"))
    assert model.tokenizer is not None
    plan = KVPlan.make(KV(), model.config, "bf16", 64)
    plain, chat = (
        make_requests(Prompts(prompt=["a b", "€"], chat=chat), Sampling(max_new_tokens=4), model, plan)[0]
        for chat in (False, True)
    )
    assert [request.prompt for request in plain] == [tuple(model.tokenizer.encode(text).ids) for text in ("a b", "€")]
    wanted = [model.tokenizer.encode("<s>" + text, add_special_tokens=False).ids for text in ("a b", "€")]
    assert [list(request.prompt) for request in chat] == wanted
    assert [request.prompt[1:] != () for request in chat] == [True, True]
    for template, text in ((None, "has no chat template"), ("{# #}", "wrote nothing")):
        other = load_model("chat", folder(tmp_path, template))
        workload = Prompts(prompt="a", chat=True)
        assert text in refusal(lambda: make_requests(workload, Sampling(), other, plan))  # noqa: B023


def test_the_tiny_model_has_no_template() -> None:
    assert load_model("tiny").chat_template is None
