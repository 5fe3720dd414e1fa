"""Service-level objectives and goodput: which requests were served well enough, and how many of those a second.

DistServe (Zhong et al. 2024, OSDI) and vLLM's `--goodput`, by the host's clock and from the intended arrival.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from xlpk.errors import InputError
from xlpk.event_log import Log

FAILED_REASONS = ("error", "cancelled", "deadline")


@dataclass
class Slo:
    """What a request must meet to count as good (the `slo` group); null: no such objective."""

    ttft_ms: float | None = None  # time to first token, from the intended arrival
    tpot_ms: float | None = None  # time per output token after the first; met by outputs of one token
    e2e_ms: float | None = None  # whole request, from the intended arrival

    def check(self) -> None:
        """Raises InputError."""
        for name, value in self.chosen().items():
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"slo.{name}", value, "a finite number of ms above 0, or null")

    def chosen(self) -> dict[str, float]:
        """Objective -> ms; without those that are null."""
        named = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in named.items() if value is not None}


def goodput(log: Log) -> dict[str, float | int | None]:
    """The metrics of the objectives in the log's header; none without any.

    A request that failed, or that has no end, meets none.
    """
    slo: Mapping[str, float] = {key: ms for key, ms in log.header.get("slo", {}).items() if ms is not None}
    if not slo or not log.arrivals or log.window_s <= 0:
        return {}
    met = dict.fromkeys(slo, 0)
    good = 0
    for request_id in log.arrivals:
        measured = _measured_ms(log, request_id)
        within = [name for name, most_ms in slo.items() if measured.get(name, math.inf) <= most_ms]
        for name in within:
            met[name] += 1
        good += len(within) == len(slo)
    shares = {f"requests/slo_met_share.{name.removesuffix('_ms')}": met[name] / len(log.arrivals) for name in slo}
    return {
        "throughput/goodput_per_s": good / log.window_s,
        "requests/slo_met": good,
        "requests/slo_met_share": good / len(log.arrivals),
        **shares,
    }


def _measured_ms(log: Log, request_id: int) -> dict[str, float]:
    """ttft_ms, tpot_ms and e2e_ms of a request that was served to its end; else nothing."""
    tokens, end = log.tokens.get(request_id), log.finished.get(request_id)
    if not tokens or end is None or end["reason"] in FAILED_REASONS:
        return {}
    begin_ns, first_ns, last_ns = log.arrivals[request_id]["host_ns"], tokens[0]["host_ns"], tokens[-1]["host_ns"]
    return {
        "ttft_ms": (first_ns - begin_ns) / 1e6,
        "tpot_ms": (last_ns - first_ns) / max(1, len(tokens) - 1) / 1e6,
        "e2e_ms": (last_ns - begin_ns) / 1e6,
    }
