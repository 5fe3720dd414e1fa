"""Where a token's time goes: simulated requests from intended arrival to last token, split by what each moment was for.

A step's record says what its time went into; a request is charged every step between its admission and its last token,
whole, because it waits for all of it. Before admission, and while preempted or under way to another worker, it queues.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from itertools import accumulate

from xlpk.event_log import Log, Record

QUEUE, PUBLISH = "queue", "publish"  # before it runs; from the end of its last step until the host sees it
_ORDER = ("weights", "kv", "compute", "filter", "barrier", "launch", "sync", "copy", "control", PUBLISH, QUEUE)


def metrics(log: Log) -> dict[str, float]:
    """`waterfall/PART_ms`: milliseconds an output token, over finished requests; `waterfall/token_ms`: their sum.

    Empty where steps do not say what they cost. The sum is the mean of E2E over output tokens, weighted by tokens.
    """
    if not log.steps or any("cost_ns" not in step for step in log.steps):
        return {}
    ledgers = _ledgers(log)
    totals = dict.fromkeys((*log.steps[0]["cost_ns"], QUEUE, PUBLISH), 0.0)
    n_tokens = 0
    for request_id, tokens in log.tokens.items():
        if request_id not in log.finished or request_id not in log.arrivals or not log.turns.get(request_id):
            continue
        n_tokens += len(tokens)
        e2e_ns = tokens[-1]["host_ns"] - log.arrivals[request_id]["host_ns"]
        publish_ns = tokens[-1]["host_ns"] - tokens[-1]["device_ns"]
        in_steps_ns = 0
        for begin, end in _turns(log.turns[request_id], tokens):
            for name, cost_ns in ledgers.between(begin, end).items():
                totals[name] += cost_ns
                in_steps_ns += cost_ns
        totals[PUBLISH] += publish_ns
        totals[QUEUE] += max(0, e2e_ns - publish_ns - in_steps_ns)
    if not n_tokens:
        return {}
    out = {f"waterfall/{name}_ms": total_ns / n_tokens / 1e6 for name, total_ns in totals.items()}
    return {**out, "waterfall/token_ms": sum(out.values())}


def parts(values: Mapping[str, float | int | None], prefix: str = "") -> dict[str, float]:
    """The parts among the metrics of a run, in their order, without those that are nothing."""
    head = f"{prefix}waterfall/"
    found = {key.removeprefix(head).removesuffix("_ms"): value for key, value in values.items() if key.startswith(head)}
    kept = {name: float(value) for name, value in found.items() if name != "token" and value}
    return dict(sorted(kept.items(), key=lambda item: _ORDER.index(item[0]) if item[0] in _ORDER else -1))


def _turns(turns: list[Record], tokens: list[Record]) -> list[tuple[int, int]]:
    """(first step, last step) of each time that a request ran, by its admissions, preemptions and tokens."""
    out = []
    for i, turn in enumerate(turns):
        if turn["event"] == "preempted":
            continue
        after = turns[i + 1] if i + 1 < len(turns) else None
        if after is not None and after["event"] == "preempted":
            end = after["step"] - 1  # it names the step that was planned without it
        else:  # its last token before it goes on elsewhere, or at all
            before = after["device_ns"] if after is not None else None
            own = [token["step"] for token in tokens if before is None or token["device_ns"] < before]
            end = own[-1] if own else turn["step"]
        out.append((turn["step"], end))
    return out


class _Ledger:
    """One worker's steps: running sums of each part by number of the step."""

    def __init__(self, steps: list[Record]) -> None:
        self.numbers = [step["step"] for step in steps]
        self._sums = {name: [0, *accumulate(s["cost_ns"][name] for s in steps)] for name in steps[0]["cost_ns"]}

    def between(self, begin: int, end: int) -> dict[str, int]:
        low, high = bisect_left(self.numbers, begin), bisect_right(self.numbers, end)
        return {name: sums[max(low, high)] - sums[low] for name, sums in self._sums.items()}


class _Ledgers:
    def __init__(self, by_worker: dict[int, list[Record]]) -> None:
        self._ledgers = [_Ledger(steps) for steps in by_worker.values()]
        self._of = {number: ledger for ledger in self._ledgers for number in ledger.numbers}

    def between(self, begin: int, end: int) -> dict[str, int]:
        """Of the worker that ran `begin`."""
        ledger = self._of.get(begin)
        return {} if ledger is None else ledger.between(begin, end)


def _ledgers(log: Log) -> _Ledgers:
    by_worker: dict[int, list[Record]] = {}
    for step in sorted(log.steps, key=lambda step: int(step["step"])):
        by_worker.setdefault(step.get("worker", 0), []).append(step)
    return _Ledgers(by_worker)
