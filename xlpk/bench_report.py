"""Rounds of `xlpk.bench` -> medians, intervals and ratios, and the tables that people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xlpk.units import format_bytes

SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s")

Answer = dict[str, Any]
Round = Mapping[str, Answer]  # name of an engine -> what it answered


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most, to six digits."""
    found = {"median": np.median(values), "least": min(values), "most": max(values)}
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def summarise(model: str, threads: int, rounds: Sequence[Round], widths: Sequence[int]) -> Answer:
    """One row of the report. Every ratio is taken within a round, then its median over rounds."""
    ours = [answers["xlpk"] for answers in rounds]
    moved = ours[0]["bytes_per_token"]
    engines: dict[str, Answer] = {}
    for name in rounds[0]:
        if name == "bandwidth":
            continue
        good = [answers for answers in rounds if "error" not in answers[name]]
        if not good:
            engines[name] = {"error": rounds[0][name]["error"]}
            continue
        engines[name] = {
            "rounds": len(good),
            **{speed: spread([answers[name][speed] for answers in good]) for speed in SPEEDS},
            "mbu": spread(
                [a[name]["decode_tokens_per_s"] * moved / 1e9 / a["bandwidth"]["gb_per_s"] for a in good]
            ),
            "same_tokens": common_prefix(good[0][name]["tokens"], ours[0]["tokens"]),
            "xlpk_is_times": {
                speed: spread([answers["xlpk"][speed] / answers[name][speed] for answers in good]) for speed in SPEEDS
            },
        }  # fmt: skip
        if "peak_bytes" in good[0][name]:
            peak = max(answers[name]["peak_bytes"] for answers in good)
            held = ours[0]["weights_bytes"] + ours[0]["kv_bytes"]
            engines[name] |= {"peak_bytes": peak, "beyond_bytes": peak - held}
    row: Answer = {
        "model": model,
        "threads": threads,
        "read_gb_per_s": spread([answers["bandwidth"]["gb_per_s"] for answers in rounds]),
        "decode_tokens": len(ours[0]["tokens"]),
        "bytes_per_token": moved,
        "weights_bytes": ours[0]["weights_bytes"],
        "kv_bytes": ours[0]["kv_bytes"],
        "engines": engines,
        "xlpk_is_times_best": best_of_peers(rounds),
        "step_us": spread([1e6 * own["width_step_s"][str(widths[0])] for own in ours]),
        "width_cost": {
            str(width): spread([o["width_step_s"][str(width)] / o["width_step_s"][str(widths[0])] for o in ours])
            for width in widths
        },
        "phase_us": {name: spread([own["phase_us"][name] for own in ours])["median"] for name in ours[0]["phase_us"]},
    }
    if "fixed_step_us" in ours[0]:
        row["fixed_step_us"] = spread([own["fixed_step_us"] for own in ours])
    return row


def best_of_peers(rounds: Sequence[Round]) -> Answer:
    """xlpk over the fastest peer of each round, by speed; empty if none ever answered."""
    ratios: dict[str, list[float]] = {speed: [] for speed in SPEEDS}
    for answers in rounds:
        for speed, found in ratios.items():
            peers = [answer[speed] for name, answer in answers.items() if "xlpk" not in name and speed in answer]
            if peers:
                found.append(answers["xlpk"][speed] / max(peers))
    return {speed: spread(found) for speed, found in ratios.items() if found}


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def shown(value: Mapping[str, float], digits: int = 0, scale: float = 1) -> str:
    """`median [least, most]`, or one number where all are the same."""
    median, least, most = (f"{scale * value[name]:,.{digits}f}" for name in ("median", "least", "most"))
    return median if least == most else f"{median} [{least}, {most}]"


def print_report(report: Answer) -> None:
    """For people. Brackets: the least and the most over the rounds."""
    for row in report["rows"]:
        print_row(row)
    if cold := report["first_token"]:
        parts = f"header {shown(cold['header_s'], 2)}, request submitted {shown(cold['submit_s'], 2)}"
        print(f"first token of a cold process, tiny model: {shown(cold['token_s'], 2)} s ({parts})")
    for note in report["skipped"]:
        print(note)
    print(
        f"median [least, most] of {report['rounds']} rounds, {report['cores']} cores, {report['seconds']:.0f} s in all"
    )


def print_row(row: Answer) -> None:
    held = f"weights {format_bytes(row['weights_bytes'])}, KV {format_bytes(row['kv_bytes'])}"
    print(f"{row['model']}, {row['threads']} threads: a token moves {row['bytes_per_token'] / 1e6:,.1f} MB,", end=" ")
    print(f"the machine reads {shown(row['read_gb_per_s'], 1)} GB/s")
    lines = [("", "prefill tok/s", "xlpk is x", "decode tok/s", "xlpk is x", "MBU", "same tokens")]
    for name, found in row["engines"].items():
        if "error" in found:
            lines.append((name, found["error"][:90], "", "", "", "", ""))
            continue
        ratios = ["" if name == "xlpk" else shown(found["xlpk_is_times"][speed], 2) for speed in SPEEDS]
        speeds = [shown(found[speed], digits) for speed, digits in zip(SPEEDS, (0, 1), strict=True)]
        agreement = f"{found['same_tokens']} of {row['decode_tokens']}"
        lines.append((name, speeds[0], ratios[0], speeds[1], ratios[1], shown(found["mbu"], 2), agreement))
    if best := row["xlpk_is_times_best"]:
        lines.append(("best of the peers", "", shown(best[SPEEDS[0]], 2), "", shown(best[SPEEDS[1]], 2), "", ""))
    narrow = [line for line in lines if line[2] or line[3]]  # an error is longer than its column
    widths = [max(len(line[column]) for line in narrow) for column in range(len(lines[0]))]
    widths[0] = max(len(line[0]) for line in lines)
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    cost = ", ".join(f"{width} rows {shown(found, 2)}" for width, found in row["width_cost"].items())
    print(f"  a step of one row {shown(row['step_us'], 1)} us; relative to it: {cost}")
    if "fixed_step_us" in row:
        print(f"  a step of as many layers with next to no weights {shown(row['fixed_step_us'], 1)} us")
    for name, found in row["engines"].items():
        if "peak_bytes" in found:
            peak, beyond = format_bytes(found["peak_bytes"]), format_bytes(found["beyond_bytes"])
            print(f"  most memory resident, {name}: {peak} ({held}, beyond them {beyond})")
    print("  us by phase: " + ", ".join(f"{name} {value:.1f}" for name, value in row["phase_us"].items()) + "\n")
