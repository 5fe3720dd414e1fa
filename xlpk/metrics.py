"""Events -> metrics, one code path for every backend; docs/metrics.md defines each figure.

`compute` takes the records of events.jsonl and gives a flat dict `group/name_unit.stat -> number`; None says that the
figure is withheld (a p99 of fewer than 1000 samples). Warm-up events are counted and otherwise left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from xlpk import divergence, waterfall
from xlpk.event_log import Log, Record, latencies
from xlpk.event_log import read_events as read_events
from xlpk.slo import goodput
from xlpk.statistics import within_run_interval
from xlpk.units import percentile

Metrics = dict[str, float | int | None]

MIN_P99 = 1000  # samples
COUNTERS = ("launches", "syncs", "h2d_copies", "d2h_copies", "h2d_bytes", "d2h_bytes")
FAILED_REASONS = ("error", "cancelled", "deadline")
MAX_POINTS = 250  # of a time series


def compute(events: Iterable[Record]) -> Metrics:
    """All metrics of one run."""
    log = Log(events)
    metrics: Metrics = {}
    metrics |= _requests(log)
    metrics |= _latencies(log)
    metrics |= _throughput(log)
    metrics |= goodput(log)
    metrics |= _speculation(log)
    metrics |= _host(log)
    metrics |= _loop(log)
    metrics |= _kv(log)
    metrics |= _system(log)
    metrics |= divergence.metrics(log.quality, MIN_P99)
    metrics |= _warmup(log)
    metrics |= _simulated(log)
    return metrics


def series(events: Iterable[Record]) -> dict[str, list[tuple[int, int, float]]]:
    """Time lines for plots: key -> [(step, device_ns since the first step began, value)], at most MAX_POINTS each."""
    log = Log(events)
    if not log.steps:
        return {}
    count = len(log.steps)
    picked = sorted({int(i) for i in np.linspace(0, count - 1, min(count, MAX_POINTS)).round()})
    finished = np.cumsum([step["n_finished"] for step in log.steps])
    first = log.steps[0]
    out: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
    for index in picked:
        step = log.steps[index]
        point = step["step"] - first["step"] + 1, step["end_ns"] - first["begin_ns"]
        values = {
            "loop/step_ms": (step["end_ns"] - step["begin_ns"]) / 1e6,
            "loop/rows": step["n_rows"],
            "loop/tokens": step["n_tokens"],
            "requests/waiting": step["n_waiting"],
            "requests/preempted": step.get("n_preempted", 0),
            "requests/prefill": step["n_prefill"],
            "requests/decode": step["n_decode"],
            "requests/finished": int(finished[index]),
            "kv/active_bytes": step["pages_active"] * log.page_bytes,
            "kv/locked_bytes": step["pages_locked"] * log.page_bytes,
            "kv/draft_bytes": step["pages_draft"] * log.page_bytes,
            "kv/cached_bytes": step.get("pages_cached", 0) * log.page_bytes,
            "kv/usage": _usage(step),
        }
        for key, value in values.items():
            out[key].append((*point, float(value)))
    return dict(out)


def _requests(log: Log) -> Metrics:
    reasons = Counter(event["reason"] for event in log.finished.values())
    out: Metrics = {
        "requests/total": len(log.arrivals),
        "requests/finished": len(log.finished),
        "requests/unfinished": len(log.arrivals) - len(log.finished),
        "requests/prompt_tokens": sum(event["prompt_tokens"] for event in log.arrivals.values()),
        "requests/output_tokens": log.n_output,
        "requests/overrun_tokens": log.overrun_tokens,
    }
    for reason, count in sorted(reasons.items()):
        out[f"requests/finished_{reason}"] = count
    for name in ("waiting", "prefill", "decode", "preempted"):
        values = [step.get(f"n_{name}", 0) for step in log.steps]
        if values:
            out[f"requests/{name}.mean"] = float(np.mean(values))
            out[f"requests/{name}.peak"] = max(values)
    return out


def _latencies(log: Log) -> Metrics:
    """By host clock from `latency/`, by device clock from `device_latency/`; all in ms."""
    out = _latencies_by(log, "latency", "host_ns", 0)
    if log.clock is not None:
        out |= _latencies_by(log, "device_latency", "device_ns", int(log.clock["offset_ns"]))
        out["device_latency/clock_error_us"] = log.clock["error_ns"] / 1e3
    return out


def _latencies_by(log: Log, group: str, clock: str, offset_ns: int) -> Metrics:
    out: Metrics = {}
    for name, samples in latencies(log, clock, offset_ns).items():
        out |= summary(f"{group}/{name}_ms", [value_ns / 1e6 for _, value_ns in sorted(samples)])
    return out


def summary(key: str, values: Sequence[float]) -> Metrics:
    """mean, p50, p90, p99 (None below MIN_P99), n, and the 95 % interval of the median; values in the order of time."""
    if not values:
        return {}
    low, high = within_run_interval(values)
    return {
        f"{key}.mean": float(np.mean(values)),
        f"{key}.p50": percentile(values, 50),
        f"{key}.p90": percentile(values, 90),
        f"{key}.p99": percentile(values, 99) if len(values) >= MIN_P99 else None,
        f"{key}.n": len(values),
        f"{key}.p50_low": low,
        f"{key}.p50_high": high,
    }


def _throughput(log: Log) -> Metrics:
    if log.window_s <= 0:
        return {}
    window_s = log.window_s
    done = sum(event["reason"] not in FAILED_REASONS for event in log.finished.values())
    return {
        "throughput/window_s": window_s,
        "throughput/tokens_per_s": log.n_output / window_s,
        "throughput/requests_per_s": done / window_s,
    }


def _speculation(log: Log) -> Metrics:
    """A verification is a decode row with its drafts, possibly none; a request's first token comes from prefill."""
    if log.header.get("spec", {}).get("name", "none") == "none":
        return {}
    verified = log.verifications()
    proposed = sum(drafts for drafts, _ in verified)
    accepted = sum(count for _, count in verified)
    out: Metrics = {
        "spec/verifications": len(verified),
        "spec/verifications_with_drafts": sum(drafts > 0 for drafts, _ in verified),
        "spec/proposed": proposed,
        "spec/accepted": accepted,
    }
    if verified:
        out["spec/acceptance_length"] = 1 + accepted / len(verified)
    if proposed:
        out["spec/acceptance_rate"] = accepted / proposed
    for position in range(1, max((drafts for drafts, _ in verified), default=0) + 1):
        had = [count for drafts, count in verified if drafts >= position]
        reached = [count for count in had if count >= position - 1]
        hits = sum(count >= position for count in had)
        out[f"spec/acceptance_at.{position}"] = hits / len(had)
        if reached:
            out[f"spec/acceptance_given.{position}"] = hits / len(reached)
    return out


def _host(log: Log) -> Metrics:
    """Counts of the whole session, warm-up included, so they are divided by its tokens and requests, all of them."""
    if log.counters is None:
        return {}
    n_tokens = log.n_output + log.warmup_tokens
    n_requests = len(log.finished) + (1 if log.warmup_tokens else 0)
    out: Metrics = {}
    for name in COUNTERS:
        count = log.counters[name]
        out[f"host/{name}"] = count
        if n_tokens:
            out[f"host/{name}.per_output_token"] = count / n_tokens
        if n_requests:
            out[f"host/{name}.per_request"] = count / n_requests
    return out


def _loop(log: Log) -> Metrics:
    if not log.steps:
        return {"loop/steps": 0}
    tokens = sum(step["n_tokens"] for step in log.steps)
    out: Metrics = {"loop/steps": len(log.steps), "loop/tokens_per_step.mean": tokens / len(log.steps)}
    for name in ("rows", "prefill_rows", "decode_rows", "draft_rows"):
        out[f"loop/{name}.mean"] = sum(step[f"n_{name}"] for step in log.steps) / len(log.steps)
    out |= summary("loop/step_ms", [(step["end_ns"] - step["begin_ns"]) / 1e6 for step in log.steps])
    phases = log.header["phases"]
    total_ns = {phase: sum(step["phase_ns"].get(phase, 0) for step in log.steps) for phase in phases}
    all_ns = sum(total_ns.values())
    moved = _phase_bytes(log)
    peak_gb_per_s = log.header.get("peak", {}).get("memory_gb_per_s")
    for phase in phases:
        out[f"phase/{phase}_ms.mean"] = total_ns[phase] / len(log.steps) / 1e6
        if all_ns:
            out[f"phase/{phase}_share"] = total_ns[phase] / all_ns
        if phase in moved and total_ns[phase]:
            out[f"phase/{phase}_bytes"] = moved[phase]
            out[f"phase/{phase}_gb_per_s"] = moved[phase] / total_ns[phase]
            if peak_gb_per_s:
                out[f"phase/{phase}_mbu"] = moved[phase] / total_ns[phase] / peak_gb_per_s
    steps_ns = sum(step["end_ns"] - step["begin_ns"] for step in log.steps)
    if peak_gb_per_s and steps_ns:
        out["loop/mbu"] = sum(moved.get(phase, 0) for phase in phases) / steps_ns / peak_gb_per_s
    window_ns = log.steps[-1]["end_ns"] - log.steps[0]["begin_ns"]
    if window_ns > 0 and log.header.get("backend") != "hf":  # whose gaps between kernels nobody sees
        # Where the host launches, control runs on the host and the device waits for it.
        on_device = [phase for phase in phases if phase != "control" or log.header.get("orchestration") == "persistent"]
        n_devices = log.header.get("simulated", {}).get("workers", 1)
        busy_ns = sum(total_ns[phase] for phase in on_device)
        out["loop/device_idle_share"] = max(0.0, 1 - busy_ns / (window_ns * n_devices))
    return out


def _phase_bytes(log: Log) -> dict[str, int]:
    """What the steps had to read: each weight once a step, K and V of each running request once a step."""
    weights = log.header.get("phase_bytes", {})
    moved = {phase: size * len(log.steps) for phase, size in weights.items()}
    if "lm_head" in moved:
        moved["lm_head"] = weights["lm_head"] * sum(step["n_sample_rows"] > 0 for step in log.steps)
    if token_bytes := log.header["kv"].get("token_bytes"):
        moved["attend"] = token_bytes * sum(step["context_tokens"] for step in log.steps)
        if "forward" in moved:
            moved["forward"] += moved["attend"]
    return moved


def _usage(step: Record) -> float:
    return 1 - float(step["pages_free"]) / float(step["pages_total"])


def _kv(log: Log) -> Metrics:
    """Each sampled in every step: mean, p99 and peak. External fragmentation is 0 by construction: pages are equal."""
    out = _sharing(log)
    if not log.steps:
        return out
    page_size = log.header["kv"]["page_size"]
    lines = {
        "kv/active_bytes": [step["pages_active"] * log.page_bytes for step in log.steps],
        "kv/locked_bytes": [step["pages_locked"] * log.page_bytes for step in log.steps],
        "kv/draft_bytes": [step["pages_draft"] * log.page_bytes for step in log.steps],
        "kv/cached_bytes": [step.get("pages_cached", 0) * log.page_bytes for step in log.steps],
        "kv/usage": [_usage(step) for step in log.steps],
        "kv/fragmentation": [
            1 - step["live_tokens"] / (step["live_pages"] * page_size) for step in log.steps if step["live_pages"]
        ],
    }
    if log.header["kv"].get("pinned_pages"):
        lines["kv/pinned_bytes"] = [step["pages_pinned"] * log.page_bytes for step in log.steps]
    for key, values in lines.items():
        if values:
            out[f"{key}.mean"] = float(np.mean(values))
            out[f"{key}.p99"] = percentile(values, 99)
            out[f"{key}.peak"] = max(values)
    for key, name, size in (
        ("kv/evictions", "n_evictions", 1),
        ("kv/preemptions", "n_preemptions", 1),
        ("kv/recomputed_tokens", "n_recomputed_rows", 1),
        ("kv/moved_bytes", "n_moves", log.page_bytes),
    ):
        out[key] = size * sum(step.get(name, 0) for step in log.steps)
    return out


def _sharing(log: Log) -> Metrics:
    """Over requests that were admitted; what is computed again after a preemption does not count."""
    if not log.header.get("kv", {}).get("prefix_sharing"):
        return {}
    asked = sum(log.arrivals[request_id]["prompt_tokens"] for request_id in log.admitted if request_id in log.arrivals)
    found = sum(event.get("n_cached", 0) for event in log.admitted.values())
    out: Metrics = {"kv/prefix_tokens": asked, "kv/prefix_hit_tokens": found}
    if asked:
        out["kv/hit_rate"] = found / asked
    return out


def _system(log: Log) -> Metrics:
    """Of the samples within the window, at least two."""
    begin_ns, end_ns = log.window_ns
    samples = [sample for sample in log.power if begin_ns <= sample["host_ns"] <= end_ns]
    if len(samples) < 2:
        return {}
    out: Metrics = {}
    for name in ("power_w", "sm_clock_mhz", "temperature_c"):
        values = [sample[name] for sample in samples]
        out |= {f"system/{name}.mean": float(np.mean(values)), f"system/{name}.peak": max(values)}
    seconds = [sample["host_ns"] / 1e9 for sample in samples]
    counted = all("energy_j" in sample for sample in samples)
    power = [sample["power_w"] for sample in samples]
    joules = samples[-1]["energy_j"] - samples[0]["energy_j"] if counted else float(np.trapezoid(power, seconds))
    out["system/joules_per_token"] = joules / (seconds[-1] - seconds[0]) * log.window_s / log.n_output
    return out


def _simulated(log: Log) -> Metrics:
    """What only a simulated run has: the mark that its answers mean nothing, and where a token's time goes."""
    if "simulated" not in log.header:
        return {}
    return {"simulated/synthetic": 1, **waterfall.metrics(log)}


def _warmup(log: Log) -> Metrics:
    return {"warmup/steps": log.warmup_steps, "warmup/tokens": log.warmup_tokens}
