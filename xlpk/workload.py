"""Requests and where they come from: prompts as typed, or synthetic token ids; all arrive at the start.

Shapes: a prompt is a tuple of token ids. What the text means is the tokenizer's affair; when to send is the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xlpk.errors import InputError

if TYPE_CHECKING:
    from xlpk.kv import KVPlan
    from xlpk.model import Model


@dataclass
class Sampling:
    """How output tokens are chosen (the `sampling` group of the config)."""

    temperature: float = 0.0  # 0: greedy
    seed: int = 0  # request i samples with seed + i
    max_new_tokens: int = 128
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False


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


@dataclass
class Prompts:
    """Text prompts (`workload=prompts`): typed, or one a line of a file; cycled to make up `requests`."""

    name: str = "prompts"
    prompt: Any = None  # a string or a list of strings; null: conf/workload/prompts.yaml, or `file`
    file: str | None = None  # one prompt a line; `\n` in a line is a newline
    requests: int | None = None  # null: one a prompt

    def texts(self) -> list[str]:
        """The prompts in the order of their requests. Raises InputError."""
        if self.file is not None:
            texts = _lines(Path(self.file))
        elif isinstance(self.prompt, str):
            texts = [self.prompt]
        elif isinstance(self.prompt, list) and self.prompt and all(isinstance(text, str) for text in self.prompt):
            texts = list(self.prompt)
        else:
            raise InputError("workload.prompt", self.prompt, "a text or a list of texts")
        for text in texts:
            if not text:
                raise InputError("workload.prompt", "''", "a prompt of at least one character")
        count = len(texts) if self.requests is None else self.requests
        if count < 1:
            raise InputError("workload.requests", count, "at least 1")
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
        for key, value in (("requests", self.requests), ("prompt_len", self.prompt_len)):
            if value < 1:
                raise InputError(f"workload.{key}", value, "at least 1")
        if self.output_len is not None and self.output_len < 1:
            raise InputError("workload.output_len", self.output_len, "at least 1, or null")
        if self.seed < 0:
            raise InputError("workload.seed", self.seed, "at least 0")
        rng = np.random.default_rng(self.seed)
        ids = rng.integers(0, vocab_size, size=(self.requests, self.prompt_len))
        return [tuple(row) for row in ids.tolist()]


def check_sampling(sampling: Sampling, max_stop_ids: int) -> None:
    """What needs no model. Raises InputError."""
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise InputError("sampling.temperature", sampling.temperature, "a finite number of at least 0 (0: greedy)")
    if sampling.max_new_tokens < 1:
        raise InputError("sampling.max_new_tokens", sampling.max_new_tokens, "at least 1")
    if not 0 <= sampling.seed < 1 << 63:
        raise InputError("sampling.seed", sampling.seed, "0 to 2^63 - 1")
    if len(sampling.stop_token_ids) > max_stop_ids:
        raise InputError("sampling.stop_token_ids", f"{len(sampling.stop_token_ids)} ids", f"at most {max_stop_ids}")


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
    max_new_tokens, ignore_eos = sampling.max_new_tokens, sampling.ignore_eos
    if isinstance(workload, Synthetic):
        prompts = workload.prompts(vocab_size)
        if workload.output_len is not None:
            max_new_tokens, ignore_eos = workload.output_len, True
    else:
        prompts = _encode(workload.texts(), model)
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
                temperature=sampling.temperature,
                seed=sampling.seed + index,
                stop_token_ids=tuple(sampling.stop_token_ids),
                ignore_eos=ignore_eos,
            )
        )
    notes = []
    if capped:
        notes.append(
            f"sampling.max_new_tokens={max_new_tokens}: capped to {min(capped)} for {len(capped)} of {len(requests)} "
            f"requests, which is what {plan.max_len} positions and {plan.pages} KV pages leave"
        )
    return requests, notes


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


def _encode(texts: list[str], model: Model) -> list[tuple[int, ...]]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError("workload", "prompts", f"model {model.name} has no tokenizer.json: use workload=synthetic")
    return [tuple(tokenizer.encode(text).ids) for text in texts]


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError("workload.file", path, f"a readable text file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError("workload.file", path, "a text file in UTF-8") from None
    texts = [line.replace("\\n", "\n") for line in lines if line.strip()]
    if not texts:
        raise InputError("workload.file", path, "a file with at least one line that is not empty")
    return texts
