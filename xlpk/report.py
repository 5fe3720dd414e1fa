"""Tables for people, from run folders alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xlpk import record, side_by_side
from xlpk.metrics import Metrics
from xlpk.units import format_bytes

LATENCIES = (
    ("ttft", "time to first token"),
    ("itl", "between tokens"),
    ("tpot", "per output token"),
    ("step_gap", "between publishing steps"),
    ("e2e", "whole request"),
)
MAX_SHOWN = 1000  # characters of a prompt or a completion


def columns(rows: Sequence[Sequence[str]], left: bool = False) -> str:
    """Rows of cells as aligned text; the first column is left-aligned, the others right unless `left`."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.ljust(width) if left else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def cell(metrics: dict[str, Any], key: str, form: str) -> str:
    if key not in metrics:
        return "-"
    value = metrics[key]
    return record.TOO_FEW if value is None else form.format(value)


def run_table(folder: Path) -> str:
    """One run in a screen: what ran, latencies, and what the loop and the host did."""
    metrics, status = record.read_json(folder / record.METRICS), record.read_json(folder / record.STATUS)
    lossless = "lossless" if status.get("lossless") else "lossy"
    out = [
        f"{status.get('mode')} on {status.get('backend')} ({status.get('orchestration')}), "
        f"model {status.get('model')}, "
        f"drafts {status.get('spec')}, acceptance {status.get('acceptance')} ({lossless}): {status.get('status')}"
    ]
    if status.get("synthetic"):
        out.append(f"SYNTHETIC: a simulation on a virtual clock, answers {status.get('answers')}; nothing was computed")
    for group, clock, names in (("latency", "host", LATENCIES), ("device_latency", "device", LATENCIES[:2])):
        rows: list[tuple[str, ...]] = [(f"by {clock} clock, ms", "mean", "p50", "95 % interval", "p90", "p99", "n")]
        for name, title in names:
            key = f"{group}/{name}_ms"
            if f"{key}.p50" in metrics:
                interval = f"{metrics[f'{key}.p50_low']:.3f} .. {metrics[f'{key}.p50_high']:.3f}"
                cells = [cell(metrics, f"{key}.{stat}", "{:.3f}") for stat in ("mean", "p50", "p90", "p99")]
                rows.append((f"{title} ({name})", *cells[:2], interval, *cells[2:], str(metrics[f"{key}.n"])))
        if len(rows) > 1:
            out += ["", columns(rows)]
    out += ["", columns(_facts(metrics), left=True)]
    for rows in side_by_side.tables(metrics):
        out += ["", columns(rows)]
    return "\n".join(out)


def _facts(metrics: Metrics) -> list[tuple[str, str]]:
    def number(key: str, form: str) -> str:
        return cell(metrics, key, form)

    facts = [
        ("requests", f"{number('requests/finished', '{:d}')} of {number('requests/total', '{:d}')} finished"),
        ("output", f"{number('requests/output_tokens', '{:d}')} tokens in {number('throughput/window_s', '{:.3f}')} s"),
        ("throughput", f"{number('throughput/tokens_per_s', '{:.1f}')} tokens/s"),
        (
            "loop",
            f"{number('loop/steps', '{:d}')} steps, {number('loop/tokens_per_step.mean', '{:.2f}')} tokens each, "
            f"{number('loop/step_ms.p50', '{:.3f}')} ms (p50)",
        ),
        (
            "host, whole session",
            f"{number('host/launches', '{:d}')} launches, {number('host/syncs', '{:d}')} syncs, "
            f"{number('host/h2d_copies', '{:d}')} + {number('host/d2h_copies', '{:d}')} copies; "
            f"{number('host/launches.per_output_token', '{:.4f}')} launches a token"
            if "host/launches" in metrics
            else "launches, syncs and copies are not counted",
        ),
    ]
    if "throughput/goodput_per_s" in metrics:
        met = f"{number('requests/slo_met', '{:d}')} of {number('requests/total', '{:d}')} requests met the objectives"
        facts.insert(3, ("goodput", f"{number('throughput/goodput_per_s', '{:.1f}')} requests/s, {met}"))
    if "spec/proposed" in metrics:
        drafts = f"{number('spec/accepted', '{:d}')} of {number('spec/proposed', '{:d}')} drafts accepted"
        facts.append(
            (
                "speculation",
                f"{drafts} ({number('spec/acceptance_rate', '{:.1%}')}), "
                f"{number('spec/acceptance_length', '{:.2f}')} tokens a verification",
            )
        )
    if "kv/active_bytes.peak" in metrics:
        peak = metrics["kv/active_bytes.peak"] or 0
        facts.append(
            (
                "KV",
                f"{format_bytes(peak)} active at most, {number('kv/usage.peak', '{:.1%}')} of the pages, "
                f"fragmentation {number('kv/fragmentation.mean', '{:.1%}')} (mean)",
            )
        )
    if "quality/tokens" in metrics:
        facts.append(
            (
                "numerics",
                f"perplexity {number('quality/perplexity', '{:.4f}')} over {number('quality/tokens', '{:d}')} tokens, "
                f"loss {number('quality/nll_ratio', '{:.6f}')} of float32's; "
                f"KL {number('quality/kl_nats.mean', '{:.2e}')} nats (mean), {number('quality/kl_nats.max', '{:.2e}')} "
                f"(most); same top-1 {number('quality/top1_agreement', '{:.2%}')}",
            )
        )
    warmup = f"{number('warmup/steps', '{:d}')} steps, {number('warmup/tokens', '{:d}')} tokens"
    facts.append(("warm-up, left out", warmup))
    return facts


def text_of(folder: Path) -> str | None:
    try:
        return (folder / record.TEXT).read_text(encoding="utf-8")
    except OSError:
        return None


def completion(folder: Path) -> str:
    """The first request of a run in words: its prompt and, marked, what the model added."""
    text = text_of(folder) or ""
    head, _, rest = text.partition("=== request 0: prompt\n")[2].partition("\n=== request 0: completion\n")
    added = rest.partition("\n=== request 1: prompt")[0].rstrip()
    shown = head if len(head) <= MAX_SHOWN else "..." + head[-MAX_SHOWN:]
    return f"{shown}>>>{added if len(added) <= MAX_SHOWN else added[:MAX_SHOWN] + '...'}"


def ui_command(uri: str) -> str:
    """What to type to see the store."""
    if uri.startswith(("http:", "https:")):
        return f"open {uri}"
    default = f"sqlite:///{Path.cwd() / 'outputs' / 'mlflow.db'}"
    return f"{record.program()} ui" if uri == default else f"{record.program()} ui --store {uri}"
