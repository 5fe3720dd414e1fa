"""Text around the model: tokens to text piece by piece, and chats to prompts by the tokenizer's own template.

`IncrementalText` streams what `Tokenizer.decode` would say of all tokens at once. `ChatTemplate` renders messages with
the checkpoint's jinja in a sandbox. `encode` is `Tokenizer.encode`, whose post-processor knows about BOS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from xlpk.errors import InputError, shown
from xlpk.jsonfile import parse_json

BROKEN = "\ufffd"  # what decoders put for bytes that are no character, or not yet
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
TEMPLATE_LIMIT = 1 << 20  # bytes; the longest published ones take 20 KB


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
    """Text -> token ids. Raises InputError where a damaged tokenizer.json shows in use only."""
    return tuple(_guarded(lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens).ids))


def encode_with_ends(tokenizer: Any, text: str) -> tuple[tuple[int, ...], list[int]]:
    """Text -> token ids, and for each how many bytes of the text it and those before it stand for.

    Of a character that several tokens share all bytes count with the first of them. Raises InputError as `encode` does.
    """
    found = _guarded(lambda: tokenizer.encode(text))
    sizes = [0, *accumulate(len(character.encode()) for character in text)]
    ends = [sizes[end] for _, end in found.offsets]
    return tuple(found.ids), list(accumulate(ends, max))  # a special token stands for no text


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Token ids -> text, special tokens included. Raises InputError as `encode` does."""
    return str(_guarded(lambda: tokenizer.decode(list(ids), skip_special_tokens=False)))


def _guarded(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BaseException as error:
        # The library raises bare Exception; a panic of its Rust code is no Exception, and its class has no public name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            "tokenizer.json", shown(str(error)), "a tokenizer that takes any text and its own ids"
        ) from None


class IncrementalText:
    """Tokens in, text out; the pieces and `finish()` joined are the decoding of all tokens at once.

    Text is held back while it may still change: where it ends in the middle of a character, and throughout a run of
    byte tokens such as <0xE2>, which the decoder takes or drops as a whole. Each push decodes a few tokens, not all.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = {
            token
            for token, added in tokenizer.get_added_tokens_decoder().items()
            if skip_special_tokens and added.special
        }
        self._kinds: dict[int, str] = {}  # token -> byte | text | nothing
        # Tokens since the last emission but one. The first `_context` of them have been emitted and stay for what a
        # decoder does at the start of a text, such as dropping a space.
        self._ids: list[int] = []
        self._context = 0

    def push(self, token: int) -> str:
        """The text that is certain since the last call; often one word, sometimes none."""
        kind = self._kind(token)
        if kind == "nothing":
            return ""
        self._ids.append(token)
        return "" if kind == "byte" else self._take(whole=False)

    def finish(self) -> str:
        """What was held back; a character that stayed incomplete comes out as the decoder shows it."""
        return self._take(whole=True)

    def _take(self, *, whole: bool) -> str:
        known, text = self._decode(self._ids[: self._context]), self._decode(self._ids)
        if not whole and text.endswith(BROKEN):
            return ""
        self._ids, self._context = self._ids[self._context :], len(self._ids) - self._context
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids)

    def _kind(self, token: int) -> str:
        if token not in self._kinds:
            word = self._tokenizer.id_to_token(token)
            if word is None or token in self._skipped:
                self._kinds[token] = "nothing"
            else:
                is_byte = BYTE_TOKEN.fullmatch(word) and self._decode([token]) != word
                self._kinds[token] = "byte" if is_byte else "text"
        return self._kinds[token]


class ChatTemplate:
    """A checkpoint's chat template: messages -> the text of a prompt, special tokens included.

    Encode the text with `add_special_tokens=False`: the template writes BOS itself. Jinja runs in its immutable
    sandbox, set up as transformers does, but without a clock (`strftime_now`): a prompt depends on nothing but its
    messages.
    """

    def __init__(self, source: str, label: str, tokens: Mapping[str, str]) -> None:
        """`label` opens messages; `tokens`: bos_token, eos_token and others that the template may name."""
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._label = label
        self._tokens = dict(tokens)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError, ValueError, OverflowError) as error:
            raise InputError(label, shown(str(error)), "a jinja template") from None

    @classmethod
    def open(cls, folder: Path) -> ChatTemplate | None:
        """Of FOLDER's chat_template.jinja, which wins as it does in transformers, or tokenizer_config.json, if any."""
        config: Any = {}
        if (folder / TOKENIZER_CONFIG).exists():
            config = parse_json(_read(folder / TOKENIZER_CONFIG), TOKENIZER_CONFIG)
            if not isinstance(config, dict):
                raise InputError(TOKENIZER_CONFIG, shown(config), "a JSON object")
        tokens = {key: _content(value, key) for key, value in config.items() if key in SPECIAL and value is not None}
        if (folder / TEMPLATE_FILE).exists():
            try:
                text = _read(folder / TEMPLATE_FILE).decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(TEMPLATE_FILE, shown(str(error)), "UTF-8") from None
            return cls(text, TEMPLATE_FILE, tokens)
        label, source = f"{TOKENIZER_CONFIG}:chat_template", config.get("chat_template")
        if isinstance(source, list):  # several by name, as older files have them
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
            if not isinstance(source, str):
                raise InputError(label, shown(list(named)), "a template named default among them")
        if source is None:
            return None
        if not isinstance(source, str):
            raise InputError(label, shown(source), "a jinja template, or a list of them by name")
        return cls(source, label, tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Messages such as {"role": "user", "content": "..."} -> text. What the template raises: InputError."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except Exception as error:  # a template is a program: it may raise anything
            what = str(error) or type(error).__name__
            raise InputError(self._label, shown(what), "messages that this template takes") from None


SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _content(value: object, key: str) -> str:
    """A special token, as a string or as the object of an added token."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise InputError(f"{TOKENIZER_CONFIG}:{key}", shown(value), "a string, an object with content, or null")
    return text


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            content = opened.read(TEMPLATE_LIMIT * 16 + 1)
    except OSError as error:
        raise InputError(file.name, error.strerror, "a readable file") from None
    limit = TEMPLATE_LIMIT * (1 if file.name == TEMPLATE_FILE else 16)
    if len(content) > limit:
        raise InputError(file.name, f"over {limit} bytes", f"at most {limit} bytes")
    return content


def _raise_exception(message: object) -> None:
    from jinja2 import TemplateError

    raise TemplateError(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
