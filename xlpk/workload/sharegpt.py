"""Conversations in ShareGPT's JSON (`workload=sharegpt`): prompts are first human turns, output lengths their answers'.

    [{"id": ..., "conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]}, ...]

The filters are those of vLLM's benchmark. The file is parsed whole: about six times its size in memory, for a moment.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlpk.errors import InputError, shown
from xlpk.jsonfile import parse_json
from xlpk.text import encode
from xlpk.workload.base import MAX_REQUESTS, MAX_TOKENS, Arriving, Draw, Prompt, Stream, capacity, check_count, opened
from xlpk.workload.prompts import encode_prompts, is_text

if TYPE_CHECKING:
    from xlpk.kv import KVPlan
    from xlpk.model import Model

HUMANS = ("human", "user")
MIN_LEN = 4  # tokens of a prompt and of an answer; vLLM's is_valid_sequence


@dataclass
class ShareGPT(Arriving):
    """First turns of conversations (`workload=sharegpt`), in an order that `seed` shuffles."""

    name: str = "sharegpt"
    rate_per_s: float = 10.0  # requests a second; inf: all at the start
    file: str | None = None  # JSON: a list of conversations
    requests: int | None = 100  # cycled if the file has fewer that pass the filters; null: each that passes
    output_len: int | None = None  # tokens of each output; null: as many as the answer in the file has
    max_prompt_len: int = 1024  # tokens; longer prompts are left out
    max_total_len: int = 2048  # tokens of prompt and output; longer pairs are left out
    chat: bool = False  # each prompt is a user's message, which the model's chat template makes a prompt

    def check(self) -> None:
        super().check()
        if self.requests is not None:
            check_count("requests", self.requests, MAX_REQUESTS)
        if self.output_len is not None:
            check_count("output_len", self.output_len, MAX_TOKENS)
        check_count("max_prompt_len", self.max_prompt_len, MAX_TOKENS, MIN_LEN)
        check_count("max_total_len", self.max_total_len, MAX_TOKENS, MIN_LEN)
        if not self.file:
            raise InputError("workload.file", "null", "a JSON file of conversations: workload.file=FILE")
        with opened(Path(self.file), "a readable JSON file of conversations"):
            pass

    def stream(self, model: Model, plan: KVPlan) -> Stream:
        pairs = read_conversations(Path(str(self.file)))
        order = self.rng(Draw.ORDER).permutation(len(pairs)).tolist()
        left_out: Counter[str] = Counter()
        prompts: list[Prompt] = []
        lens: list[int] = []
        for index in order:
            if len(prompts) == self.requests:
                break
            prompt, answer = pairs[index]
            tokens = encode_prompts([prompt], model, self.chat, self.name)[0]
            length = self.output_len or len(encode(model.tokenizer, answer, add_special_tokens=False))
            why = self._unfit(len(tokens), length, capacity(plan))
            if why:
                left_out[why] += 1
                continue
            prompts.append(tokens)
            lens.append(length)
        reasons = ", ".join(f"{count} {why}" for why, count in left_out.items())
        if not prompts:
            allowed = f"a conversation that passes the filters: {reasons or 'none has a human turn and its answer'}"
            raise InputError("workload.file", str(self.file), allowed)
        notes = []
        if left_out:
            notes.append(f"workload.file: of {sum(left_out.values()) + len(prompts)} conversations left out: {reasons}")
        count = self.requests or len(prompts)
        if count > len(prompts):
            notes.append(f"workload.requests={count}: {len(prompts)} conversations pass the filters, and are repeated")
        prompts = [prompts[i % len(prompts)] for i in range(count)]
        return Stream(prompts, [lens[i % len(lens)] for i in range(count)], self.arrivals(count), notes=notes)

    def _unfit(self, prompt_len: int, output_len: int, room: int) -> str:
        """Why vLLM leaves a pair out, or that the model cannot hold it; else nothing."""
        if prompt_len < MIN_LEN or (self.output_len is None and output_len < MIN_LEN):
            return f"under {MIN_LEN} tokens"
        if prompt_len > self.max_prompt_len:
            return f"over {self.max_prompt_len} prompt tokens"
        if prompt_len + output_len > min(self.max_total_len, room):
            return f"over {min(self.max_total_len, room)} tokens in all"
        return ""


def read_conversations(path: Path) -> list[tuple[str, str]]:
    """(first human turn, the turn behind it) of each conversation that has both, in the file's order.

    Raises InputError naming the entry and the field that is not as ShareGPT has it.
    """
    with opened(path, "a readable JSON file of conversations") as file:
        content = file.read()
    entries = parse_json(content, shown(str(path)))
    if not isinstance(entries, list):
        raise InputError("workload.file", path, "a JSON list of conversations")
    pairs = []
    for number, entry in enumerate(entries):
        pair = _pair(entry, f"{path}: entry {number}")
        if pair is not None:
            pairs.append(pair)
    return pairs


def _pair(entry: Any, where: str) -> tuple[str, str] | None:
    if not isinstance(entry, dict):
        raise InputError(where, shown(entry), "an object with conversations")
    turns = entry.get("conversations", [])
    if not isinstance(turns, list):
        raise InputError(f"{where}: conversations", shown(turns), "a list of turns")
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise InputError(f"{where}: conversations[{index}]", shown(turn), "an object with from and value")
        for key in ("from", "value"):
            value = turn.get(key)
            if not isinstance(value, str) or not is_text(value):
                raise InputError(f"{where}: conversations[{index}].{key}", shown(value), "a text")
    for turn, behind in pairwise(turns):
        if turn["from"] in HUMANS:
            return None if behind["from"] in HUMANS else (turn["value"], behind["value"])
    return None
