"""Replays a trace in Mooncake's columns (`workload=trace`): one JSON object a line.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ..., 2353]}

timestamp in ms; hash_ids one a block of `block_size` tokens, the last block may be partial (Qin et al. 2025, FAST). The
tokens of a block are a function of (seed, its hash id), so equal ids are equal tokens and share KV pages as in the
original service; without hash_ids a prompt is its own. Other columns are left alone but `priority`.

Read line by line into numeric columns: 32 bytes a line and 8 a hash id, whatever the file's size.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from xlpk.errors import InputError, shown
from xlpk.workload.arrivals import MAX_HORIZON_S
from xlpk.workload.base import (
    MAX_PRIORITY,
    MAX_REQUESTS,
    MAX_TOKENS,
    Draw,
    Prompt,
    Stream,
    Vocabulary,
    Workload,
    capacity,
    check_count,
    opened,
)

if TYPE_CHECKING:
    from xlpk.kv import KVPlan
    from xlpk.model import Model

MAX_LINE_BYTES = 1 << 24
MAX_HASH = (1 << 63) - 1


@dataclass
class Rows:
    """The columns of a trace; entry i of each belongs to the i-th request of the file."""

    lines: array[int] = field(default_factory=lambda: array("q"))  # where it stands, from 1
    timestamps_ms: array[float] = field(default_factory=lambda: array("d"))
    input_lens: array[int] = field(default_factory=lambda: array("i"))  # tokens
    output_lens: array[int] = field(default_factory=lambda: array("i"))  # tokens
    priorities: array[int] = field(default_factory=lambda: array("i"))
    hash_ends: array[int] = field(default_factory=lambda: array("q"))  # where its hash ids end in `hash_ids`
    hash_ids: array[int] = field(default_factory=lambda: array("q"))
    has_priorities: bool = False

    def __len__(self) -> int:
        return len(self.lines)

    def hashes(self, index: int) -> array[int]:
        """The hash ids of one request; none where the file has none."""
        return self.hash_ids[self.hash_ends[index - 1] if index else 0 : self.hash_ends[index]]


@dataclass
class Trace(Workload):
    """Recorded arrivals, lengths and shared blocks (`workload=trace`)."""

    name: str = "trace"
    file: str | None = None  # JSON lines in Mooncake's columns: timestamp, input_length, output_length, hash_ids
    scale: float = 1.0  # intended times are multiplied by this: 0.5 doubles the load
    limit: int | None = None  # requests from the file's beginning; null: all
    block_size: int = 512  # tokens that one hash id stands for in the file
    # Lengths and block_size are multiplied by this, so that a small model can replay the sharing of a large trace: with
    # 0.03125 a block of 512 tokens is one KV page of 16.
    length_scale: float = 1.0

    def check(self) -> None:
        super().check()
        if not 0 <= self.scale <= 1e6:
            raise InputError("workload.scale", self.scale, "0 (all at the start) to 1e6")
        if self.limit is not None:
            check_count("limit", self.limit, MAX_REQUESTS)
        check_count("block_size", self.block_size, MAX_TOKENS)
        if not 0 < self.length_scale <= 1e3:
            raise InputError("workload.length_scale", self.length_scale, "above 0 and at most 1000")
        block = self.block_size * self.length_scale
        if block < 1 or not math.isclose(block, round(block), rel_tol=1e-6):
            allowed = f"a scale that makes workload.block_size={self.block_size} a whole number of tokens"
            raise InputError("workload.length_scale", self.length_scale, allowed)
        if not self.file:
            raise InputError("workload.file", "null", "a trace of JSON lines: workload.file=FILE")
        with opened(Path(self.file), "a readable file of JSON lines"):
            pass

    def stream(self, model: Model, plan: KVPlan) -> Stream:
        rows = read_trace(Path(str(self.file)), self.limit, self.block_size)
        if rows.has_priorities and self.priorities is not None:
            raise InputError("workload.priorities", shown(self.priorities), "null: the trace has a column priority")
        times_s = self._times_s(rows)
        order = np.argsort(times_s, kind="stable").tolist()
        prompts = self._prompts(rows, order, model.config.vocab_size, capacity(plan))
        return Stream(
            prompts,
            output_lens=[self._scaled(rows.output_lens[index]) for index in order],
            arrivals_s=times_s[order].tolist(),
            priorities=[rows.priorities[index] for index in order] if rows.has_priorities else None,
        )

    def _scaled(self, length: int) -> int:
        return max(1, round(length * self.length_scale))

    def _times_s(self, rows: Rows) -> npt.NDArray[np.float64]:
        """[requests]: from the first arrival on."""
        stamps_ms = np.array(rows.timestamps_ms, np.float64)
        times_s: npt.NDArray[np.float64] = (stamps_ms - stamps_ms.min()) * (self.scale / 1e3)
        if times_s.max() > MAX_HORIZON_S:
            allowed = f"a scale or a limit with the last arrival within {MAX_HORIZON_S:.0e} s"
            raise InputError("workload.scale", self.scale, allowed)
        return times_s

    def _prompts(self, rows: Rows, order: list[int], vocab_size: int, room: int) -> list[Prompt]:
        lens = [self._scaled(length) for length in rows.input_lens]
        if sum(lens) > MAX_TOKENS:
            allowed = f"at most {MAX_TOKENS}: workload.limit and workload.length_scale make fewer"
            raise InputError("workload.file", f"{sum(lens)} tokens in {len(rows)} prompts", allowed)
        for index, length in enumerate(lens):
            if length >= room:
                allowed = f"below {room} tokens, what the model and kv.budget hold: see workload.length_scale"
                raise InputError(f"{self.file}: line {rows.lines[index]}: input_length", length, allowed)
        vocabulary, block = Vocabulary(vocab_size), round(self.block_size * self.length_scale)
        blocks: dict[int, Prompt] = {}
        prompts = []
        for index in order:
            tokens: list[int] = []
            for hash_id in rows.hashes(index):
                if hash_id not in blocks:
                    rng = np.random.default_rng([self.seed, Draw.TOKENS, 0, hash_id])
                    blocks[hash_id] = vocabulary.prompt(rng.integers(0, vocab_size, block))
                tokens += blocks[hash_id]
            if missing := max(0, lens[index] - len(tokens)):
                rng = np.random.default_rng([self.seed, Draw.TOKENS, 1, rows.lines[index]])
                tokens += vocabulary.prompt(rng.integers(0, vocab_size, missing))
            prompts.append(tuple(tokens[: lens[index]]))
        return prompts


def read_trace(path: Path, limit: int | None, block_size: int) -> Rows:
    """The columns of the file's first `limit` requests. Raises InputError naming line and field."""
    rows = Rows()
    most = MAX_REQUESTS if limit is None else limit
    for number, line in _lines(path):
        if len(rows) == most:
            if limit is not None:
                break
            raise InputError("workload.file", path, f"at most {MAX_REQUESTS} requests, or workload.limit")
        _Line(path, number, line, block_size).append_to(rows)
    if not len(rows):
        raise InputError("workload.file", path, "a trace of at least one line")
    return rows


class _Line:
    """One line of a trace, whose fields are checked as they are taken."""

    def __init__(self, path: Path, number: int, line: bytes, block_size: int) -> None:
        self.where, self.number, self.block_size = f"{path}: line {number}", number, block_size
        try:
            self.values: Any = json.loads(line)
        except (ValueError, RecursionError):  # JSON, UTF-8, integers of thousands of digits
            self.values = None
        if not isinstance(self.values, dict):
            raise InputError(self.where, shown(line[:60].decode("utf-8", "replace")), "one JSON object a line")

    def append_to(self, rows: Rows) -> None:
        timestamp_ms = self._timestamp()
        input_len = self._whole("input_length", 1, MAX_TOKENS)
        output_len = self._whole("output_length", 1, MAX_TOKENS)
        hashes = self._hashes(input_len)
        if self.values.get("priority") is not None:
            rows.has_priorities = True
            priority = self._whole("priority", -MAX_PRIORITY, MAX_PRIORITY)
        else:
            priority = 0
        rows.lines.append(self.number)
        rows.timestamps_ms.append(timestamp_ms)
        rows.input_lens.append(input_len)
        rows.output_lens.append(output_len)
        rows.priorities.append(priority)
        rows.hash_ids.extend(hashes)
        rows.hash_ends.append(len(rows.hash_ids))

    def _refuse(self, key: str, allowed: str) -> InputError:
        value = shown(self.values[key]) if key in self.values else "missing"
        return InputError(f"{self.where}: {key}", value, allowed)

    def _timestamp(self) -> float:
        value = self.values.get("timestamp")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e15:
            raise self._refuse("timestamp", "ms, 0 to 1e15")
        return float(value)

    def _whole(self, key: str, least: int, most: int) -> int:
        value = self.values.get(key)
        if type(value) is not int or not least <= value <= most:
            raise self._refuse(key, f"a whole number, {least} to {most}")
        return value

    def _hashes(self, input_len: int) -> list[int]:
        """None, or one a block, with or without the last partial one."""
        value = self.values.get("hash_ids")
        if value is None or value == []:
            return []
        if not isinstance(value, list) or not all(type(one) is int and 0 <= one <= MAX_HASH for one in value):
            raise self._refuse("hash_ids", "a list of whole numbers from 0 on")
        full, part = divmod(input_len, self.block_size)
        if len(value) not in (full, full + (part > 0)):
            allowed = f"{full + (part > 0)} ids for input_length={input_len} in blocks of {self.block_size} tokens"
            raise InputError(f"{self.where}: hash_ids", f"{len(value)} ids", allowed)
        return value


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of lines that are not blank."""
    number = 0
    with opened(path, "a readable file of JSON lines") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise InputError(f"{path}: line {number}", f"over {MAX_LINE_BYTES} bytes", "one JSON object a line")
            if line.strip():
                yield number, line
