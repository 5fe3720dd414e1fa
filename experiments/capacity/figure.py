"""`python experiments/capacity/figure.py [FOLDER...]`: results/capacity.csv -> results/capacity.png, the page's table.

With folders of `xlpk capacity` that file is made of theirs first.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
TTFT_MS, TPOT_MS, ARRIVALS_PER_S = 2000, 30, 45.8  # conf/experiment/capacity.yaml and its trace
SHOWN = range(5, 11)  # fleets in the table
STYLES = {  # router: colour (Okabe and Ito), marker, line
    "round_robin": ("#E69F00", "^", ":"),
    "least_outstanding": ("#0072B2", "o", "-"),
    "prefix_affinity, 1 block": ("#CC79A7", "D", "-."),
    "prefix_affinity, 6 blocks": ("#D55E00", "s", "--"),
}
Rows = dict[str, list[dict[str, str]]]  # router -> a row a fleet


def gather(folders: list[Path]) -> None:
    """results/capacity.csv from the folders of runs."""
    rows = []
    for folder in folders:
        facts = json.loads((folder / "capacity.json").read_text())
        router, blocks = facts["router"], facts["affinity_blocks"]
        if router == "prefix_affinity":
            router += f", {blocks} block{'s' * (blocks > 1)}"
        with (folder / "capacity.csv").open() as file:
            rows += [{"router": router, **row} for row in csv.DictReader(file)]
    for row in rows:
        del row["simulated_in_s"]  # the rest is the same whenever it is made again
    with (RESULTS / "capacity.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read() -> Rows:
    found: Rows = {}
    with (RESULTS / "capacity.csv").open() as file:
        for row in csv.DictReader(file):
            found.setdefault(row["router"], []).append(row)
    return found


def smallest(rows: Rows) -> dict[str, int]:
    """Router -> the smallest fleet that is enough."""
    return {router: min(int(row["fleet"]) for row in each if row["enough"] == "True") for router, each in rows.items()}


def table(rows: Rows) -> str:
    """Markdown: a line a router and a fleet."""
    out = [
        "| router | fleet | goodput/s | good | ttft p50, p99, ms | tpot p50, p99, ms | hits |",
        "|---|---|---|---|---|---|---|",
    ]
    enough = smallest(rows)
    for router, each in rows.items():
        for row in each:
            fleet = int(row["fleet"])
            if fleet in SHOWN:
                named = f"**{fleet}**" if fleet == enough[router] else str(fleet)
                ttft, tpot = ([float(row[f"{name}_ms_p{p}"]) for p in (50, 99)] for name in ("ttft", "tpot"))
                out.append(
                    f"| {router} | {named} | {float(row['goodput_per_s']):.1f} | {float(row['met_share']):.1%} "
                    f"| {ttft[0]:,.0f}, {ttft[1]:,.0f} | {tpot[0]:.1f}, {tpot[1]:.1f} | {float(row['hit_rate']):.0%} |"
                )
    return "\n".join(out)


def draw(rows: Rows, path: Path) -> None:
    """Three panels over the size of the fleet: goodput, first token, the other tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), constrained_layout=True)
    enough = smallest(rows)
    panels = (
        ("goodput_per_s", "requests/s that meet both objectives", None),
        ("ttft_ms_p99", "time to first token, p99, ms", TTFT_MS),
        ("tpot_ms_p99", "time per output token, p99, ms", TPOT_MS),
    )
    for axis, (key, title, objective) in zip(axes, panels, strict=True):
        for router, each in rows.items():
            colour, marker, line = STYLES[router]
            sizes, values = [int(row["fleet"]) for row in each], [float(row[key]) for row in each]
            axis.plot(sizes, values, line, marker=marker, ms=5, color=colour, label=f"{router}: {enough[router]}")
            at = sizes.index(enough[router])
            axis.plot(sizes[at], values[at], marker, ms=12, mfc="none", mew=1.8, color=colour)
        if objective is not None:
            axis.axhline(objective, color="grey", linewidth=1)
            axis.annotate("objective", (16, objective), ha="right", va="bottom", color="grey", fontsize=8)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("instances")
        axis.set_xticks(range(2, 17, 2))
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(ARRIVALS_PER_S, color="grey", linewidth=1)
    axes[0].annotate("all that arrive", (1, ARRIVALS_PER_S), va="bottom", color="grey", fontsize=8)
    axes[0].set_ylim(0, 1.12 * ARRIVALS_PER_S)
    axes[0].legend(title="router: instances it takes (ringed)", frameon=False, loc="lower right", fontsize=8)
    axes[1].set_yscale("log")
    axes[2].set_ylim(0, None)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    if folders := [Path(name) for name in sys.argv[1:]]:
        gather(folders)
    rows = read()
    draw(rows, RESULTS / "capacity.png")
    print(table(rows))


if __name__ == "__main__":
    main()
