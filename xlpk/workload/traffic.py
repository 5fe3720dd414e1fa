"""Open-loop traffic of drawn lengths: `workload=poisson`, `gamma` and `constant` differ in `burstiness` alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from xlpk.errors import InputError
from xlpk.text import encode
from xlpk.workload.base import (
    MAX_REQUESTS,
    MAX_TOKENS,
    Arriving,
    Draw,
    Prompt,
    Stream,
    Vocabulary,
    capacity,
    check_count,
)
from xlpk.workload.lengths import Lengths, check_lengths, draw_lengths
from xlpk.workload.prompts import in_vocabulary

if TYPE_CHECKING:
    from xlpk.kv import KVPlan
    from xlpk.model import Model

HELDOUT = "heldout"  # the model folder's text that it was not trained on
MAX_TEXT_BYTES = 1 << 24


@dataclass
class Traffic(Arriving):
    """Base of the three: prompts of random token ids, or cut from a text at random places."""

    rate_per_s: float = 10.0  # requests a second; inf: all at the start
    requests: int = 100  # how many arrive
    prompt_len: int = 64  # tokens; the mean, where lengths are drawn
    output_len: int | None = 64  # tokens, end-of-sequence ignored; null: sampling decides
    range_ratio: float = 0.0  # lengths uniform in length x (1 - this) .. length x (1 + this): vLLM's random_range_ratio
    length_cv: float = 0.0  # lengths lognormal with this coefficient of variation
    text: str | None = None  # a text file, or `heldout`: the model's own held-out text; null: random token ids

    def check(self) -> None:
        super().check()
        check_count("requests", self.requests, MAX_REQUESTS)
        check_count("prompt_len", self.prompt_len, MAX_TOKENS)
        if self.output_len is not None and not 1 <= self.output_len <= MAX_TOKENS:
            raise InputError("workload.output_len", self.output_len, f"1 to {MAX_TOKENS}, or null")
        check_lengths(self.range_ratio, self.length_cv)
        if self.requests * self.prompt_len > MAX_TOKENS:
            allowed = f"with workload.prompt_len={self.prompt_len} at most {MAX_TOKENS} tokens in all"
            raise InputError("workload.requests", self.requests, allowed)
        if self.text == "":
            raise InputError("workload.text", "''", f"a file, {HELDOUT} or null")

    def stream(self, model: Model, plan: KVPlan) -> Stream:
        prompt_lens, output_lens = self.lengths()
        notes = []
        room = capacity(plan) - 1
        if self.length_cv and (longer := int(np.count_nonzero(prompt_lens > room))):
            notes.append(
                f"workload.length_cv={self.length_cv:g}: {longer} of {self.requests} prompts cut to {room} tokens"
            )
            prompt_lens = np.minimum(prompt_lens, max(room, 1))
        prompts = self._prompts(prompt_lens, model)
        outputs = None if output_lens is None else output_lens.tolist()
        return Stream(prompts, outputs, self.arrivals(self.requests), named="workload.prompt_len", notes=notes)

    def lengths(self) -> tuple[Lengths, Lengths | None]:
        """[requests] tokens of prompts and of outputs."""
        rng = self.rng(Draw.LENGTHS)
        prompts = draw_lengths(self.requests, self.prompt_len, self.range_ratio, self.length_cv, rng)
        if self.output_len is None:
            return prompts, None
        return prompts, draw_lengths(self.requests, self.output_len, self.range_ratio, self.length_cv, rng)

    def _prompts(self, lens: Lengths, model: Model) -> list[Prompt]:
        rng, vocabulary = self.rng(Draw.TOKENS), Vocabulary(model.config.vocab_size)
        ends = np.cumsum(lens)
        if self.text is None:
            if ends[-1] > MAX_TOKENS:
                raise InputError("workload.prompt_len", f"{ends[-1]} tokens in all", f"at most {MAX_TOKENS}")
            drawn = rng.integers(0, vocabulary.size, size=int(ends[-1]), dtype=np.int32)
            return [vocabulary.prompt(part) for part in np.split(drawn, ends[:-1])]
        ids = _text_ids(self.text, model)
        longest = int(lens.max())
        if longest > len(ids):
            raise InputError("workload.text", self.text, f"a text of at least {longest} tokens; it has {len(ids)}")
        begins = rng.integers(0, len(ids) - lens + 1)
        return [
            vocabulary.prompt(ids[begin : begin + length])
            for begin, length in zip(begins.tolist(), lens.tolist(), strict=True)
        ]


@dataclass
class Poisson(Traffic):
    """Independent arrivals at a mean rate (`workload=poisson`): exponential gaps."""

    name: str = "poisson"

    def check(self) -> None:
        super().check()
        if self.burstiness != 1:
            raise InputError(
                "workload.burstiness", self.burstiness, "1 in workload=poisson; workload=gamma takes others"
            )


@dataclass
class Gamma(Traffic):
    """Bursty or regular arrivals (`workload=gamma`): gamma distributed gaps."""

    name: str = "gamma"
    burstiness: float = 0.5  # shape of the gaps, whose coefficient of variation is 1 / sqrt(burstiness)


@dataclass
class Constant(Traffic):
    """Equal gaps (`workload=constant`)."""

    name: str = "constant"
    burstiness: float = math.inf

    def check(self) -> None:
        super().check()
        if not math.isinf(self.burstiness):
            allowed = "inf in workload=constant; or workload=gamma"
            raise InputError("workload.burstiness", self.burstiness, allowed)


def _text_ids(text: str, model: Model) -> npt.NDArray[np.int64]:
    """[tokens] of the file, without special tokens."""
    if model.tokenizer is None:
        raise InputError("workload.text", text, f"null: model {model.name} has no tokenizer.json")
    if text == HELDOUT and (model.path is None or not (model.path / "heldout.txt").is_file()):
        raise InputError("workload.text", text, f"a file, or null: model {model.name} has no heldout.txt")
    path = model.path / "heldout.txt" if text == HELDOUT and model.path is not None else Path(text)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise InputError("workload.text", path, f"a readable text file, or {HELDOUT} ({error.strerror})") from None
    if len(content) > MAX_TEXT_BYTES:
        raise InputError("workload.text", path, f"a file of at most {MAX_TEXT_BYTES} bytes")
    try:
        ids = encode(model.tokenizer, content.decode("utf-8"), add_special_tokens=False)
    except UnicodeDecodeError:
        raise InputError("workload.text", path, "a text file in UTF-8") from None
    return np.array(in_vocabulary([ids], model)[0], np.int64)
