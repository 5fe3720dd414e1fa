"""`python experiments/continuous_batching/figure.py`: results/sweep.csv -> results/load.png, and the page's table."""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (  # heading, metric, format; the mean over seeds is shown
    ("finished/s", "throughput/requests_per_s", "{:.0f}"),
    ("goodput/s", "throughput/goodput_per_s", "{:.0f}"),
    ("good", "requests/slo_met_share", "{:.0%}"),
    ("ttft p50, p90, ms", "latency/ttft_ms.p50 latency/ttft_ms.p90", "{:.1f}"),
    ("tpot p50, p90, ms", "latency/tpot_ms.p50 latency/tpot_ms.p90", "{:.2f}"),
    ("tokens/step", "loop/tokens_per_step.mean", "{:.1f}"),
)
STYLES = {1: ("#D55E00", "s", "--"), 64: ("#0072B2", "o", "-")}  # Okabe and Ito; markers and lines for print
TTFT_MS, TPOT_MS = 20, 1  # conf/experiment/continuous_batching.yaml
Rows = dict[tuple[int, float], list[dict[str, str]]]  # (max_num_seqs, rate_per_s) -> a row a seed


def read() -> Rows:
    """The sweep's rows by what they compare."""
    found: Rows = defaultdict(list)
    with (RESULTS / "sweep.csv").open() as file:
        for row in csv.DictReader(file):
            found[int(row["scheduler.max_num_seqs"]), float(row["workload.rate_per_s"])].append(row)
    return dict(sorted(found.items()))


def table(rows: Rows) -> str:
    """Markdown: a line a rate and a batch limit."""
    out = [
        "| at most in a step | arrivals/s | " + " | ".join(title for title, _, _ in COLUMNS) + " |",
        "|" + "---|" * (2 + len(COLUMNS)),
    ]
    for (limit, rate), seeds in rows.items():
        cells = [
            ", ".join(form.format(mean(float(row[key]) for row in seeds)) for key in keys.split())
            for _, keys, form in COLUMNS
        ]
        out.append(f"| {limit} | {rate:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def draw(rows: Rows, path: Path) -> None:
    """Three panels over the rate of arrivals: first token, the others, goodput."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), constrained_layout=True)
    for limit, (colour, marker, line) in STYLES.items():
        rates = sorted(rate for one, rate in rows if one == limit)

        def values(key: str, pick: Callable[..., float], limit: int = limit, rates: list[float] = rates) -> list[float]:
            return [pick([float(row[key]) for row in rows[limit, rate]]) for rate in rates]

        label = "one at a time" if limit == 1 else f"up to {limit} in a step"
        for axis, key in zip(axes, ("latency/ttft_ms", "latency/tpot_ms", "throughput/goodput_per_s"), strict=True):
            if key.endswith("_ms"):
                axis.plot(rates, values(f"{key}.p50", mean), line, marker=marker, color=colour, label=f"{label}, p50")
                axis.plot(rates, values(f"{key}.p90", mean), ":", marker=marker, mfc="white", color=colour, label="p90")
            else:
                axis.plot(rates, values(key, mean), line, marker=marker, color=colour, label=label)
                axis.fill_between(rates, values(key, min), values(key, max), color=colour, alpha=0.2)
    every = sorted({rate for _, rate in rows})
    axes[2].plot(every, every, color="grey", linewidth=1, label="all that arrive")
    best = max(float(row["throughput/goodput_per_s"]) for seeds in rows.values() for row in seeds)
    axes[2].set_ylim(0, 1.3 * best)
    for axis, (title, limit_ms) in zip(
        axes, (("time to first token, ms", TTFT_MS), ("time per output token, ms", TPOT_MS), ("", None)), strict=True
    ):
        if limit_ms is not None:
            axis.set_yscale("log")
            axis.axhline(limit_ms, color="black", linewidth=1, linestyle="-.", label="objective")
        axis.set_ylabel(title or "good requests a second")
        axis.set_xlabel("arrivals a second (Poisson)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> int:
    rows = read()
    print(table(rows))
    draw(rows, RESULTS / "load.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
