"""Prompts as typed or one a line of a file, and synthetic token ids of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xlpk.errors import InputError, shown
from xlpk.text import encode
from xlpk.workload.base import MAX_REQUESTS, MAX_TOKENS, Arriving, Prompt, Stream

if TYPE_CHECKING:
    from xlpk.kv import KVPlan
    from xlpk.model import Model


@dataclass
class Prompts(Arriving):
    """Text prompts (`workload=prompts`): typed, or one a line of a file; cycled to make up `requests`."""

    name: str = "prompts"
    prompt: Any = None  # a string or a list of strings; null: conf/workload/prompts.yaml, or `file`
    file: str | None = None  # one prompt a line; `\n` in a line is a newline
    requests: int | None = None  # null: one a prompt
    chat: bool = False  # each prompt is a user's message, which the model's chat template makes a prompt

    def check(self) -> None:
        super().check()
        self.texts()

    def stream(self, model: Model, plan: KVPlan) -> Stream:
        prompts = encode_prompts(self.texts(), model, self.chat)
        return Stream(prompts, arrivals_s=self.arrivals(len(prompts)))

    def texts(self) -> list[str]:
        """The prompts in the order of their requests. Raises InputError."""
        if self.file is not None:
            texts = _lines(Path(self.file))
        elif isinstance(self.prompt, str):
            texts = [self.prompt]
        elif isinstance(self.prompt, list) and self.prompt and all(isinstance(text, str) for text in self.prompt):
            texts = list(self.prompt)
        else:
            raise InputError("workload.prompt", shown(self.prompt), "a text or a list of texts")
        for text in texts:
            if not text:
                raise InputError("workload.prompt", "''", "a prompt of at least one character")
        count = len(texts) if self.requests is None else self.requests
        if not 1 <= count <= MAX_REQUESTS:
            raise InputError("workload.requests", count, f"1 to {MAX_REQUESTS}")
        return [texts[index % len(texts)] for index in range(count)]


@dataclass
class Synthetic(Arriving):
    """Uniformly random token ids (`workload=synthetic`); works with any model, tokenizer or not."""

    name: str = "synthetic"
    requests: int = 8  # how many
    prompt_len: int = 64  # tokens of each prompt
    output_len: int | None = None  # tokens, end-of-sequence ignored; null: sampling decides

    def check(self) -> None:
        super().check()
        for key, value, most in (
            ("requests", self.requests, MAX_REQUESTS),
            ("prompt_len", self.prompt_len, MAX_TOKENS),
            ("requests x prompt_len", self.requests * self.prompt_len, MAX_TOKENS),
        ):
            if not 1 <= value <= most:
                raise InputError(f"workload.{key}", value, f"at least 1, at most {most}")
        if self.output_len is not None and self.output_len < 1:
            raise InputError("workload.output_len", self.output_len, "at least 1, or null")

    def stream(self, model: Model, plan: KVPlan) -> Stream:
        lens = None if self.output_len is None else [self.output_len] * self.requests
        prompts = self.prompts(model.config.vocab_size)
        return Stream(prompts, lens, self.arrivals(self.requests), named="workload.prompt_len")

    def prompts(self, vocab_size: int) -> list[Prompt]:
        """[requests][prompt_len] token ids; a pure function of (seed, vocab_size). Raises InputError."""
        self.check()
        rng = np.random.default_rng(self.seed)
        ids = rng.integers(0, vocab_size, size=(self.requests, self.prompt_len))
        return [tuple(row) for row in ids.tolist()]


def encode_prompts(texts: Sequence[str], model: Model, chat: bool, name: str = "prompts") -> list[Prompt]:
    """The token ids of each text, special tokens included; `chat`: as a user's message of the model's chat template.

    Raises InputError, about the workload called `name` where the model has no tokenizer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError("workload", name, f"model {model.name} has no tokenizer.json: use workload=synthetic")
    for text in texts:
        if not is_text(text):
            raise InputError("workload.prompt", ascii(text[:80]), "a text in UTF-8")
    if not chat:
        return in_vocabulary([encode(tokenizer, text) for text in texts], model)
    template = model.chat_template
    if template is None:
        raise InputError("workload.chat", "true", f"false: model {model.name} has no chat template")
    chats = [template.render([{"role": "user", "content": text}]) for text in texts]
    prompts = [encode(tokenizer, text, add_special_tokens=False) for text in chats]
    if not all(prompts):
        raise InputError("workload.chat", "true", f"false: the chat template of model {model.name} wrote nothing")
    return in_vocabulary(prompts, model)


def in_vocabulary(prompts: list[Prompt], model: Model) -> list[Prompt]:
    """The prompts. Raises InputError for a token that the model does not know."""
    for prompt in prompts:
        if prompt and max(prompt) >= model.config.vocab_size:
            allowed = f"tokens below vocab_size={model.config.vocab_size}: another model's tokenizer?"
            raise InputError("tokenizer.json", f"token {max(prompt)}", allowed)
    return prompts


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: no lone surrogates."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise InputError("workload.file", path, f"a readable text file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError("workload.file", path, "a text file in UTF-8") from None
    texts = [line.replace("\\n", "\n") for line in lines if line.strip()]
    if not texts:
        raise InputError("workload.file", path, "a file with at least one line that is not empty")
    return texts
