"""generation_config.json: the sampling values and end-of-sequence ids that a model's makers chose.

A value of the config's `sampling` group wins over the file's, and the file's over xlpk's own (`SamplingValues`). As in
transformers, a model is sampled from only if its file says `do_sample: true`; as in vLLM, what the file leaves out is
neutral (transformers would take top_k=50).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from xlpk.errors import InputError
from xlpk.jsonfile import Fields, parse_json, read_bytes
from xlpk.rope import FLOAT32_MAX

FILE = "generation_config.json"
MIN_TEMPERATURE = 1e-5  # logits divided by less could overflow
MIN_PENALTY, MAX_PENALTY = 0.001, 1000  # logits times or over more could overflow


@dataclass(frozen=True)
class SamplingValues:
    """The values that a model may choose; by default xlpk's own, which leave the distribution alone."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128


_ALLOWED: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (
        lambda v: v == 0 or MIN_TEMPERATURE <= v <= FLOAT32_MAX,
        f"0 (greedy), or a finite number of at least {MIN_TEMPERATURE}",
    ),
    "top_k": (lambda v: 0 <= v < 1 << 31, "0 to 2^31 - 1 (0: all tokens)"),
    "top_p": (lambda v: 0 < v <= 1, "above 0, at most 1 (1: all tokens)"),
    "min_p": (lambda v: 0 <= v <= 1, "0 to 1 (0: all tokens)"),
    "repetition_penalty": (
        lambda v: MIN_PENALTY <= v <= MAX_PENALTY,
        f"above 0: {MIN_PENALTY} to {MAX_PENALTY} (1: none)",
    ),
    "max_new_tokens": (lambda v: v >= 1, "at least 1"),
}


def check_value(label: str, name: str, value: float) -> None:
    """`name`: a field of SamplingValues; `label` opens the message. Raises InputError."""
    allowed, words = _ALLOWED[name]
    if not allowed(value):  # false of NaN too
        raise InputError(label, value, words)


@dataclass(frozen=True)
class GenerationConfig:
    """What the file says; nothing where there is no file."""

    values: Mapping[str, float] = field(default_factory=dict)  # fields of SamplingValues, checked
    unused_temperature: float | None = None  # set without `do_sample: true`
    eos_token_ids: tuple[int, ...] | None = None  # None: those of config.json


def read_generation_config(folder: Path) -> GenerationConfig:
    """FOLDER/generation_config.json. Raises InputError naming file and field.

    Other fields are ignored, as vLLM does (beam search and the like are the caller's choice, not the model's).
    """
    if not (folder / FILE).exists():
        return GenerationConfig()
    reader = Fields(parse_json(read_bytes(folder / FILE), FILE), FILE)
    values: dict[str, float] = {}
    for item in fields(SamplingValues):
        if reader.get(item.name) is not None:
            whole = isinstance(item.default, int)
            values[item.name] = reader.whole(item.name) if whole else reader.number(item.name)
            check_value(f"{FILE}:{item.name}", item.name, values[item.name])
    unused = None
    if reader.flag("do_sample", False):
        values.setdefault("temperature", 1.0)
    else:
        unused = values.pop("temperature", None)
    ids = reader.token_ids("eos_token_id") if reader.get("eos_token_id") is not None else None
    return GenerationConfig(values, unused, ids)
