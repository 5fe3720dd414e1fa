"""A synthetic trace in Mooncake's columns: `python experiments/capacity/trace.py > trace.jsonl`.

Conversations begin as a Poisson process. Each has one of a few system prompts, often a document, and turns that repeat
all that was said before, as chat services do; a block of 512 tokens gets one hash id, so what turns share is shared.
Its moments are set near those of Mooncake's conversation trace (Qin et al. 2025, FAST: 12,035 tokens in, 343 out in
the mean, 40 % of blocks seen before), with shorter prompts (4,927) and more in common (68 %); nothing is taken from its
files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

SEED = 1
REQUESTS = 5000
CONVERSATIONS_PER_S = 8.0
BLOCK = 512  # tokens a hash id
SYSTEM_PROMPTS = 12  # chosen by Zipf's law
MAX_TOKENS = 32_000  # of prompt and output
MEAN_TURNS = 3.0
THINK_S = 20.0  # mean time from an answer, guessed at 30 tokens/s, to the next question


def requests() -> Iterator[tuple[float, int, int, list[int]]]:
    """(seconds, input tokens, output tokens, hash ids), conversation by conversation, for ever."""
    rng = np.random.default_rng(SEED)
    system_blocks = rng.integers(1, 5, SYSTEM_PROMPTS)
    shares = 1 / np.arange(1, SYSTEM_PROMPTS + 1)
    next_id, begin_s = int(system_blocks.sum()), 0.0
    firsts = np.concatenate(([0], np.cumsum(system_blocks)[:-1]))
    while True:
        begin_s += rng.exponential(1 / CONVERSATIONS_PER_S)
        system = rng.choice(SYSTEM_PROMPTS, p=shares / shares.sum())
        ids = list(range(int(firsts[system]), int(firsts[system] + system_blocks[system])))
        document = int(rng.lognormal(8.2, 0.9)) if rng.random() < 0.5 else 0
        length, now_s = len(ids) * BLOCK + document, begin_s
        for _ in range(rng.geometric(1 / MEAN_TURNS)):
            length += 1 + int(rng.lognormal(5.0, 1.0))
            output = int(np.clip(rng.lognormal(5.4, 0.8), 1, 2000))
            if length + output > MAX_TOKENS:
                break
            while len(ids) < -(-length // BLOCK):
                ids.append(next_id)
                next_id += 1
            yield now_s, length, output, list(ids)
            length += output
            now_s += output / 30 + rng.exponential(THINK_S)


def main() -> None:
    """The first REQUESTS of those that arrive once the number of conversations is steady."""
    made = requests()
    begin_s = 120.0
    rows = [next(made) for _ in range(4 * REQUESTS)]
    rows = sorted(row for row in rows if row[0] >= begin_s)[:REQUESTS]
    names: dict[int, int] = {}
    for at_s, length, output, ids in rows:
        renamed = [names.setdefault(one, len(names)) for one in ids]
        stamp = round(1e3 * (at_s - begin_s))
        row = {"timestamp": stamp, "input_length": length, "output_length": output, "hash_ids": renamed}
        print(json.dumps(row, separators=(",", ":")))


if __name__ == "__main__":
    main()
