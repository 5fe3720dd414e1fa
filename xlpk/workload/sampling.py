"""How output tokens are chosen: the `sampling` group of the config, and what of it can be refused without a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from xlpk import layout
from xlpk.errors import InputError, shown
from xlpk.generation import FILE, GenerationConfig, SamplingValues, check_value


@dataclass
class Sampling:
    """How output tokens are chosen (the `sampling` group of the config); vLLM's names and meanings."""

    # null: the model's generation_config.json, else neutral (`generation.SamplingValues`)
    temperature: float | None = None  # 0: greedy
    top_k: int | None = None  # keep the k most likely tokens; 0: all
    top_p: float | None = None  # keep the most likely tokens that hold this share of the probability; 1: all
    min_p: float | None = None  # keep tokens at least this share as likely as the most likely one; 0: all
    repetition_penalty: float | None = None  # over prompt and output; 1: none
    max_new_tokens: int | None = None  # output tokens of a request at most
    presence_penalty: float = 0.0  # subtracted from the logits of tokens of the output
    frequency_penalty: float = 0.0  # the same, times how often
    logit_bias: Any = None  # {token id: what is added to its logit}; null: none. Any, since Hydra merges typed dicts
    logprobs: int | None = None  # most likely tokens to log beside each token, and the token's own logprob; null: none
    seed: int = 0  # request i samples with seed + i
    stop: list[str] = field(default_factory=list)  # strings that end the output and are cut off it; matched by the host
    stop_token_ids: list[int] = field(default_factory=list)  # token ids that end the output, beside the model's own
    target: str | None = None  # the output ends when its tokens end with this text's tokens
    ignore_eos: bool = False  # go on after an end-of-sequence token

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
