"""Requests and where they come from: prompts as typed, or synthetic token ids; all arrive at the start.

Shapes: a prompt is a tuple of token ids. What the text means is the tokenizer's affair; when to send is the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xlpk import layout
from xlpk.errors import InputError, shown
from xlpk.generation import FILE, GenerationConfig, SamplingValues, check_value
from xlpk.text import encode

if TYPE_CHECKING:
    from xlpk.kv import KVPlan
    from xlpk.model import Model


MAX_REQUESTS = 1_000_000  # all of them are made before the first is sent
MAX_TOKENS = 100_000_000  # of all synthetic prompts


@dataclass
class Sampling:
    """How output tokens are chosen (the `sampling` group of the config); vLLM's names and meanings."""

    # null: the model's generation_config.json, else neutral (`generation.SamplingValues`)
    temperature: float | None = None  # 0: greedy
    top_k: int | None = None  # keep the k most likely tokens; 0: all
    top_p: float | None = None  # keep the most likely tokens that hold this share of the probability; 1: all
    min_p: float | None = None  # keep tokens at least this share as likely as the most likely one; 0: all
    repetition_penalty: float | None = None  # over prompt and output; 1: none
    max_new_tokens: int | None = None
    presence_penalty: float = 0.0  # subtracted from the logits of tokens of the output
    frequency_penalty: float = 0.0  # the same, times how often
    logit_bias: Any = None  # {token id: what is added to its logit}; null: none. Any, since Hydra merges typed dicts
    logprobs: int | None = None  # most likely tokens to log beside each token, and the token's own logprob; null: none
    seed: int = 0  # request i samples with seed + i
    stop: list[str] = field(default_factory=list)  # strings that end the output and are cut off it; matched by the host
    stop_token_ids: list[int] = field(default_factory=list)
    target: str | None = None  # the output ends when its tokens end with this text's tokens
    ignore_eos: bool = False

    def values(self) -> SamplingValues:
        """What the six first fields come to; null is xlpk's own."""
        typed = {item.name: getattr(self, item.name) for item in fields(SamplingValues)}
        return SamplingValues(**{name: value for name, value in typed.items() if value is not None})

    def filled(self, generation: GenerationConfig) -> tuple[Sampling, str | None]:
        """With the model's values where this has null -> that, and a note of what was taken or left, if anything."""
        taken: dict[str, Any] = {
            name: value for name, value in generation.values.items() if getattr(self, name) is None
        }
        parts = [", ".join(f"sampling.{name}={value}" for name, value in taken.items())] if taken else []
        if generation.unused_temperature is not None and self.temperature is None:
            parts.append(f"temperature={generation.unused_temperature} of it is unused without do_sample=true")
        note = f"{FILE}: {'; '.join(parts)} (model.generation_config=none ignores it)" if parts else None
        return replace(self, **taken), note


@dataclass(frozen=True)
class Request:
    """One request as a backend takes it."""

    request_id: int
    prompt: tuple[int, ...]  # token ids, at least one
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    arrival_s: float = 0.0  # intended, after the start of the measurement
    oracle: tuple[int, ...] = ()  # the right output tokens, for spec=oracle
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, bias)
    logprobs: int | None = None
    target: tuple[int, ...] = ()  # token ids
    stop: tuple[str, ...] = ()  # the engine's affair: a backend sees token ids only


@dataclass
class Prompts:
    """Text prompts (`workload=prompts`): typed, or one a line of a file; cycled to make up `requests`."""

    name: str = "prompts"
    prompt: Any = None  # a string or a list of strings; null: conf/workload/prompts.yaml, or `file`
    file: str | None = None  # one prompt a line; `\n` in a line is a newline
    requests: int | None = None  # null: one a prompt
    chat: bool = False  # each prompt is a user's message, which the model's chat template makes a prompt

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
class Synthetic:
    """Uniformly random token ids (`workload=synthetic`); works with any model, tokenizer or not."""

    name: str = "synthetic"
    requests: int = 8
    prompt_len: int = 64  # tokens
    output_len: int | None = None  # tokens, end-of-sequence ignored; null: sampling decides
    seed: int = 0

    def prompts(self, vocab_size: int) -> list[tuple[int, ...]]:
        """[requests][prompt_len] token ids; a pure function of (seed, vocab_size). Raises InputError."""
        for key, value, most in (
            ("requests", self.requests, MAX_REQUESTS),
            ("prompt_len", self.prompt_len, MAX_TOKENS),
            ("requests x prompt_len", self.requests * self.prompt_len, MAX_TOKENS),
        ):
            if not 1 <= value <= most:
                raise InputError(f"workload.{key}", value, f"at least 1, at most {most}")
        if self.output_len is not None and self.output_len < 1:
            raise InputError("workload.output_len", self.output_len, "at least 1, or null")
        if self.seed < 0:
            raise InputError("workload.seed", self.seed, "at least 0")
        rng = np.random.default_rng(self.seed)
        ids = rng.integers(0, vocab_size, size=(self.requests, self.prompt_len))
        return [tuple(row) for row in ids.tolist()]


def check_sampling(sampling: Sampling, max_stop_ids: int) -> None:
    """What needs no model. Raises InputError."""
    for item in fields(SamplingValues):
        value = getattr(sampling, item.name)
        if value is not None:
            check_value(f"sampling.{item.name}", item.name, value)
    if not 0 <= sampling.seed < 1 << 63:
        raise InputError("sampling.seed", sampling.seed, "0 to 2^63 - 1")
    if len(sampling.stop_token_ids) > max_stop_ids:
        raise InputError("sampling.stop_token_ids", f"{len(sampling.stop_token_ids)} ids", f"at most {max_stop_ids}")
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        _check_number(f"sampling.{name}", value, -2 <= value <= 2, "-2 to 2 (0: none)")
    for token, bias in biases(sampling):
        _check_number(f"sampling.logit_bias.{token}", bias, abs(bias) <= 1e4, "-10000 to 10000")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= layout.MAX_LOGPROBS:
        raise InputError("sampling.logprobs", sampling.logprobs, f"0 to {layout.MAX_LOGPROBS}, or null")
    if "" in sampling.stop:
        raise InputError("sampling.stop", "''", "strings of at least one character")
    if sampling.target == "":
        raise InputError("sampling.target", "''", "a text, or null")


def biases(sampling: Sampling) -> tuple[tuple[int, float], ...]:
    """(token id, bias) by id. Raises InputError for anything but a dict of numbers."""
    given = {} if sampling.logit_bias is None else sampling.logit_bias
    kinds = isinstance(given, dict) and all(
        type(token) is int and isinstance(bias, int | float) for token, bias in given.items()
    )
    if not kinds:
        raise InputError("sampling.logit_bias", shown(given), "{token id: bias, ...} with whole ids and numbers")
    if len(given) > layout.MAX_BIAS:
        raise InputError("sampling.logit_bias", f"{len(given)} ids", f"at most {layout.MAX_BIAS}")
    return tuple(sorted((token, float(bias)) for token, bias in given.items()))


def _check_number(field: str, value: float, allowed: bool, words: str) -> None:
    if not (math.isfinite(value) and allowed):
        raise InputError(field, value, words)


def make_requests(
    workload: Prompts | Synthetic, sampling: Sampling, model: Model, plan: KVPlan
) -> tuple[list[Request], list[str]]:
    """The requests of a run, and one line for each way in which they differ from what was asked for.

    Raises InputError: empty prompt, ids outside the vocabulary, a prompt beyond the positions or the KV pages.
    """
    vocab_size = model.config.vocab_size
    for token in sampling.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise InputError("sampling.stop_token_ids", token, f"ids of the vocabulary: 0 to {vocab_size - 1}")
    for token, _ in biases(sampling):
        if not 0 <= token < vocab_size:
            raise InputError("sampling.logit_bias", token, f"ids of the vocabulary: 0 to {vocab_size - 1}")
    if sampling.stop and model.tokenizer is None:
        raise InputError(
            "sampling.stop", shown(sampling.stop[0]), f"model {model.name} has no tokenizer.json: stop_token_ids"
        )
    target = _target(sampling, model)
    values, ignore_eos = sampling.values(), sampling.ignore_eos
    max_new_tokens = values.max_new_tokens
    if isinstance(workload, Synthetic):
        prompts = workload.prompts(vocab_size)
        if workload.output_len is not None:
            max_new_tokens, ignore_eos = workload.output_len, True
    else:
        prompts = _encode(workload.texts(), model, workload.chat)
    requests, capped = [], []
    for index, prompt in enumerate(prompts):
        count = min(max_new_tokens, _room(prompt, plan))
        if count < max_new_tokens:
            capped.append(count)
        requests.append(
            Request(
                request_id=index,
                prompt=prompt,
                max_new_tokens=count,
                temperature=values.temperature,
                seed=sampling.seed + index,
                stop_token_ids=tuple(sampling.stop_token_ids),
                ignore_eos=ignore_eos,
                top_k=values.top_k,
                top_p=values.top_p,
                min_p=values.min_p,
                repetition_penalty=values.repetition_penalty,
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                logit_bias=biases(sampling),
                logprobs=sampling.logprobs,
                target=target,
                stop=tuple(sampling.stop),
            )
        )
    notes = []
    if capped:
        notes.append(
            f"sampling.max_new_tokens={max_new_tokens}: capped to {min(capped)} for {len(capped)} of {len(requests)} "
            f"requests, which is what {plan.max_len} positions and {plan.pages} KV pages leave"
        )
    return requests, notes


def _target(sampling: Sampling, model: Model) -> tuple[int, ...]:
    """The target's token ids."""
    if sampling.target is None:
        return ()
    if model.tokenizer is None:
        raise InputError("sampling.target", shown(sampling.target), f"model {model.name} has no tokenizer.json")
    (ids,) = _in_vocabulary([encode(model.tokenizer, sampling.target, add_special_tokens=False)], model)
    if not 1 <= len(ids) <= layout.MAX_TARGET:
        raise InputError("sampling.target", f"{len(ids)} tokens", f"1 to {layout.MAX_TARGET} tokens")
    return ids


def _room(prompt: Sequence[int], plan: KVPlan) -> int:
    """Output tokens for which positions and pages are left. Raises InputError if there is none."""
    if not prompt:
        raise InputError("workload.prompt", "no tokens", "a prompt of at least one token")
    if len(prompt) >= plan.max_len:
        raise InputError(
            "workload.prompt", f"{len(prompt)} tokens", f"fewer than the {plan.max_len} positions of model.max_len"
        )
    needed = plan.pages_for(len(prompt) + 1)
    if needed > plan.pages:
        raise InputError(
            "workload.prompt",
            f"{len(prompt)} tokens",
            f"it needs {needed} KV pages and kv.budget has {plan.pages}, of {plan.page_size} tokens each",
        )
    return min(plan.max_len, plan.pages * plan.page_size) - len(prompt)


def _encode(texts: list[str], model: Model, chat: bool) -> list[tuple[int, ...]]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError("workload", "prompts", f"model {model.name} has no tokenizer.json: use workload=synthetic")
    for text in texts:
        if not is_text(text):
            raise InputError("workload.prompt", ascii(text[:80]), "a text in UTF-8")
    if not chat:
        return _in_vocabulary([encode(tokenizer, text) for text in texts], model)
    template = model.chat_template
    if template is None:
        raise InputError("workload.chat", "true", f"false: model {model.name} has no chat template")
    chats = [template.render([{"role": "user", "content": text}]) for text in texts]
    prompts = [encode(tokenizer, text, add_special_tokens=False) for text in chats]
    if not all(prompts):
        raise InputError("workload.chat", "true", f"false: the chat template of model {model.name} wrote nothing")
    return _in_vocabulary(prompts, model)


def _in_vocabulary(prompts: list[tuple[int, ...]], model: Model) -> list[tuple[int, ...]]:
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
