"""Run folders as xlpk writes them, with figures of a test's choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from xlpk import metrics, record
from xlpk.speculation import Oracle

MS = 1_000_000


def oracle_log(
    block: int = 4, stride: int = 4, n_output: int = 40, slow: Sequence[int] = (), spec: str = "oracle"
) -> list[dict[str, Any]]:
    """One request alone in the loop, its verifications those of the oracle; steps of 1 ms, `slow` ones of 10."""
    out: list[dict[str, Any]] = [
        {
            "event": "header",
            "spec": {"name": spec, "block": block, "mismatch_stride": stride},
            "acceptance": {"name": "keyed"},
            "kv": {"page_bytes": 4096, "page_size": 16},
            "phases": [],
        },
        {"event": "clock", "offset_ns": 0, "error_ns": 10},
        {"event": "arrival", "request_id": 0, "host_ns": 0, "prompt_tokens": 8, "max_new_tokens": n_output},
        {"event": "submit", "request_id": 0, "host_ns": 1000},
    ]
    at_ns = MS
    index = 0
    each = [(-1, 0), *Oracle(block=block, mismatch_stride=stride).verifications(n_output)]
    for step, (drafts, accepted) in enumerate(each, start=1):
        begin_ns, at_ns = at_ns, at_ns + MS * (10 if step in slow else 1)
        token = {"event": "token", "request_id": 0, "step": step, "host_ns": at_ns, "device_ns": at_ns, "token": 7}
        for place in range(accepted + 1):
            verified = (
                {"n_drafts": drafts, "n_accepted": accepted} if place == 0 else {"n_drafts": -1, "n_accepted": -1}
            )
            out.append({**token, "output_index": index, **verified})
            index += 1
        out.append(
            {
                "event": "step",
                "step": step,
                "begin_ns": begin_ns,
                "end_ns": at_ns,
                "host_ns": at_ns,
                "n_rows": 8 if step == 1 else 1 + drafts,
                "n_prefill_rows": 8 if step == 1 else 0,
                "n_decode_rows": 0 if step == 1 else 1,
                "n_draft_rows": max(0, drafts),
                "n_sample_rows": 1,
                "n_tokens": accepted + 1,
                "n_waiting": 0,
                "n_prefill": int(step == 1),
                "n_decode": int(step > 1),
                "n_finished": 0,
                "pages_total": 10,
                "pages_free": 10 - (1 + index // 16),
                "pages_active": 1 + index // 16,
                "pages_draft": 0,
                "pages_locked": 1,
                "context_tokens": index,
                "live_tokens": index,
                "live_pages": 1 + index // 16,
                "phase_ns": {},
            }
        )
    out.append({"event": "finished", "request_id": 0, "step": len(each), "reason": "length", "host_ns": at_ns})
    return out


@cache
def _default_metrics() -> dict[str, float | int | None]:
    return metrics.compute(oracle_log())


def run_folder(
    folder: Path,
    overrides: Sequence[str] = (),
    repetition: int = 0,
    sweep_id: str | None = "s",
    status: str = "FINISHED",
    log: Sequence[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    **values: float | None,
) -> Path:
    """`values`: metrics in place of the log's, `__` for `/`, `_p50` at the end for `.p50`."""
    folder.mkdir(parents=True)
    facts: dict[str, Any] = {"status": status, "overrides": list(overrides), "repetition": repetition, "name": "a run"}
    if sweep_id is not None:
        facts["sweep_id"] = sweep_id
    record.write_json(
        folder / record.STATUS, {**facts, "model": "tiny", "backend": "cpu", "mode": "speculative_decode"}
    )
    events = list(oracle_log() if log is None else log)
    (folder / record.EVENTS).write_text("".join(json.dumps(e, separators=(",", ":")) + "\n" for e in events))
    named = {key.replace("__", "/").replace("_p50", ".p50").replace("_p99", ".p99"): v for key, v in values.items()}
    measured = _default_metrics() if log is None else metrics.compute(events)
    record.write_json(folder / record.METRICS, {**measured, **named})
    record.write_config(folder, config or {"run": {"warmup_steps": 8}, "spec": {"name": "oracle", "block": 4}})
    record.write_json(folder / record.BUILD, {"backend": {"device": "cpu"}, "processor": "a processor", "cores": 2})
    return folder


def sweep(root: Path, rates: dict[str, Sequence[float]], key: str = "spec.block", sweep_id: str = "s") -> Path:
    """A sweep over `key`, a point each repetition in turns; `rates`: tokens/s of each value, by repetition."""
    number = 0
    for repetition in range(max(map(len, rates.values()))):
        for value, of in rates.items():
            point = root / str(number)
            run_folder(point, [f"{key}={value}"], repetition, sweep_id, throughput__tokens_per_s=of[repetition])
            number += 1
    return root
