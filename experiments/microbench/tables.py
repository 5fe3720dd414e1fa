"""The results as Markdown, and the four numbers as one record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cases import BARRIER, BROADCAST, READ, RING, Case, all_cases

Record = Mapping[str, Any]
SHORT = {
    "read": ("Reading alone", ("case", "median us", "p10", "p90", "GB/s")),
    "barrier": ("The barrier alone", ("case", "mean ns", "p10", "p50", "p90", "p99")),
    "broadcast": ("A barrier and a vector behind it", ("case", "mean ns", "over the barrier alone, ns")),
    "ring": ("The ring through barriers", ("case", "slots", "median us", "p10", "p90", "floor us", "over the floor")),
}


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _read(record: Record, _: Mapping[str, Record]) -> list[str]:
    return [*(_number(record[f"{name}_us"]) for name in ("median", "p10", "p90")), _number(record["gb_per_s"], 0)]


def _barrier(record: Record, _: Mapping[str, Record]) -> list[str]:
    return [_number(record[name], 0) for name in ("mean_ns", "p10_ns", "p50_ns", "p90_ns", "p99_ns")]


def _broadcast(record: Record, cases: Mapping[str, Record]) -> list[str]:
    alone = cases.get(BARRIER.name, {}).get("mean_ns")
    return [_number(record["mean_ns"], 0), _number(None if alone is None else record["mean_ns"] - alone, 0)]


def _ring(record: Record, _: Mapping[str, Record]) -> list[str]:
    floor = record.get("floor_us")
    over = "-" if floor is None else f"{100 * (record['median_us'] / floor - 1):.1f} %"
    times = [_number(record[f"{name}_us"]) for name in ("median", "p10", "p90")]
    return [str(record["slots"]), *times, _number(floor), over]


CELLS: dict[str, Callable[[Record, Mapping[str, Record]], list[str]]] = {
    "read": _read,
    "barrier": _barrier,
    "broadcast": _broadcast,
    "ring": _ring,
}


def _clocks(clocks: Record | None) -> str:
    if clocks is None:
        return "not known"
    return "SM {sm_mhz:g} MHz, memory {memory_mhz:g} MHz, {power_w:g} W, {temperature_c:g} C".format(**clocks)


def markdown(results: Record) -> str:
    """The page: where and when, one table a section, what was not run."""
    device, cases = results["device"], results["cases"]
    commit = results["commit"]
    where = "no checkout" if commit is None else commit["hash"] + (" (modified)" if commit["modified"] else "")
    lines = [
        f"# Micro-benchmarks on {device['name']}",
        "",
        f"{results['date']}, {device['uuid']}, {device['multiprocessors']} multiprocessors, driver for CUDA "
        f"{device['driver'][0]}.{device['driver'][1]}, commit {where}, kernels {results['kernels']}.",
        f"Clocks before: {_clocks(results['clocks_before'])}; after: {_clocks(results['clocks_after'])}. "
        f"Smallest step of the timer: {results['timer_step_ns']} ns. Stream: {results['stream_bytes'] / 1e9:.3f} GB.",
    ]
    for section, (title, heads) in SHORT.items():
        rows = [(case, cases[case.name]) for case in all_cases() if case.section == section and case.name in cases]
        if not rows:
            continue
        lines += ["", f"## {title}", "", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
        for case, record in rows:
            lines.append(f"| {' | '.join([_label(case), *_cells(record, cases, section, len(heads) - 1)])} |")
    failed = {name: record["error"] for name, record in cases.items() if "error" in record}
    if failed:
        lines += ["", "## Failed", "", *(f"- {error}" for error in failed.values())]
    if results["not_run"]:
        lines += ["", f"Not run, out of time: {', '.join(results['not_run'])}."]
    return "\n".join(lines) + "\n"


def _label(case: Case) -> str:
    """The name with sizes in KiB and MiB."""
    words = [case.kernel]
    for key, value in case.parameters.items():
        if key == "kernel" or (key == "rounds" and case.section != "ring"):
            continue
        if key.endswith("_bytes") and value % 1024 == 0:
            size = f"{value >> 20} MiB" if value % (1 << 20) == 0 else f"{value >> 10} KiB"
            words.append(f"{key.removesuffix('_bytes')} {size}")
        else:
            words.append(f"{key} {value}")
    return ", ".join(words)


def _cells(record: Record, cases: Mapping[str, Record], section: str, count: int) -> list[str]:
    if "error" in record:
        return ["failed", *["-"] * (count - 1)]
    return CELLS[section](record, cases)


def headline(results: Record) -> dict[str, Any]:
    """The four numbers; None: not measured."""
    cases = results["cases"]
    read = [
        record["gb_per_s"]
        for case in all_cases()
        if case.section == "read" and case.hot_of_16 == 0 and "gb_per_s" in (record := cases.get(case.name, {}))
    ]
    barrier, broadcast, ring = (cases.get(case.name, {}) for case in (BARRIER, BROADCAST, RING))
    return {
        "device": results["device"]["name"],
        "read_gb_per_s": max(read, default=None),
        "read_loads_gb_per_s": cases.get(READ.name, {}).get("gb_per_s"),
        "barrier_p50_ns": barrier.get("p50_ns"),
        "barrier_broadcast_mean_ns": broadcast.get("mean_ns"),
        "ring_us": ring.get("median_us"),
        "ring_floor_us": ring.get("floor_us"),
        "not_run": len(results["not_run"]),
    }
