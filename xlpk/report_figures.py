"""The parts of a report, and those that come from event logs: figures, drafts, warm-up and steady state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xlpk import acceptance, compare, plot_style, plots, rundata, side_by_side, statistics
from xlpk.compare import Configuration
from xlpk.plots import Drawn, Swept
from xlpk.rundata import RunData, Timeline

RATE = "throughput/tokens_per_s"


@dataclass
class Table:
    """Cells as text. Columns are aligned as numbers are, but for the first; `words`: as text, `wrap`: long text."""

    head: list[str]
    rows: list[list[str]]
    words: bool = False
    wrap: bool = False


@dataclass
class Figure:
    """An SVG element. `name`: of its file; `alt`: what it shows, for those who do not see it."""

    name: str
    alt: str
    svg: str


@dataclass
class Section:
    """A part of the page; a folded one opens at a click."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figure: Figure | None = None
    folded: bool = False


@dataclass
class Steadiness:
    """Where one run settles, judged by its steps that only decode (chunks of prompts take longer by nature)."""

    n_steps: int  # measured
    n_decode: int  # of them with decode rows and without prompt rows
    steady: int | None  # measured steps before the steady state
    p50_ms: float  # of the decode steps
    steady_p50_ms: float
    n_slow: int  # outliers among the decode steps of the steady state
    slowest_ms: float


def read_logs(configurations: Sequence[Configuration]) -> tuple[list[Drawn], dict[str, list[Steadiness]]]:
    """(what the plots draw, where each run of a configuration settles: by label); every log is read once."""
    chosen = plots.choose(configurations)
    settled: dict[str, list[Steadiness]] = {}
    drawn: list[Drawn] = []
    for one in configurations:
        timelines: list[tuple[RunData, Timeline]] = []
        for run in one.done:
            timeline = rundata.timeline(run, tokens=one in chosen)
            if timeline is None:
                continue
            if (found := steadiness(timeline)) is not None:
                settled.setdefault(one.label, []).append(found)
            if one in chosen:
                timelines.append((run, timeline))
        if timelines:
            drawn.append(_drawn(one, timelines))
    return drawn, settled


def steadiness(timeline: Timeline) -> Steadiness | None:
    steps = timeline.steps
    which = np.flatnonzero((steps.prefill_rows == 0) & (steps.decode_rows > 0))
    if not len(which):
        return None
    took_ms = steps.took_ms[which]
    cut = statistics.steady_from(took_ms.tolist())
    steady = took_ms[cut or 0 :]
    slow = statistics.outliers(steady.tolist()) & (steady > np.median(steady))
    return Steadiness(
        n_steps=len(steps.took_ms),
        n_decode=len(which),
        steady=None if cut is None else int(which[cut]) if cut else 0,
        p50_ms=float(np.median(took_ms)),
        steady_p50_ms=float(np.median(steady)),
        n_slow=int(slow.sum()),
        slowest_ms=float(took_ms.max()),
    )


def _drawn(one: Configuration, timelines: Sequence[tuple[RunData, Timeline]]) -> Drawn:
    rates = [run.metrics.get(RATE) or 0.0 for run, _ in timelines]
    middle = timelines[int(np.argsort(rates, kind="stable")[(len(rates) - 1) // 2])][1]
    found = steadiness(middle)
    return Drawn(one.label, [timeline for _, timeline in timelines], middle, found.steady if found else None)


def figures(configurations: Sequence[Configuration], drawn: Sequence[Drawn]) -> list[Section]:
    out = []
    if (found := swept(configurations)) is not None:
        key, points = found
        alt = f"tokens/s against {key}"
        if any(point.interval.known for point in points):
            alt += ": the median, its 95 % interval over repetitions, a ring each repetition"
        n_lines = len({point.line for point in points})
        some = f" The first {plots.MAX_DRAWN} of {n_lines} lines are drawn." if n_lines > plots.MAX_DRAWN else ""
        out.append(Section("Throughput", [f"{alt}.{some}"], [], _figure("throughput", alt, plots.swept, key, points)))
    if not drawn:
        return out
    able = sum(bool(one.done) for one in configurations)
    note = []
    if able > len(drawn):
        note = [
            f"{len(drawn)} of {able} configurations are drawn: the first, the slowest, the fastest, and evenly between."
        ]
    repeated = any(len(one.timelines) > 1 for one in drawn)
    middle = " Of repetitions, the one whose tokens/s are the median." if repeated else ""
    band = " Pooled over repetitions" + (
        "; the band is what single ones span." if len(drawn) <= plots.MAX_BANDS else "."
    )
    band = band if repeated else ""
    for title, name, alt, draw in (
        (
            "Latency",
            "latency",
            f"Share of inter-token latencies and of times to first token below a value.{band}",
            plots.latency_cdf,
        ),
        (
            "Inter-token latency over time",
            "itl",
            f"Dots are tokens, the line is the median of a stretch of time.{middle}",
            plots.itl_over_time,
        ),
        (
            "Composition of the steps",
            "composition",
            f"Rows of a step by kind, the mean of a stretch of time.{middle}",
            plots.composition,
        ),
        (
            "KV pages over time",
            "kv",
            f"Bytes of pages in use, the most in a stretch of time.{middle}",
            plots.kv_over_time,
        ),
    ):
        out.append(Section(title, [*note, alt], [], _figure(name, alt, draw, drawn)))
    return out


def waterfalls(configurations: Sequence[Configuration]) -> list[Section]:
    """Where a token's time goes, of simulated runs: a bar each, or one for each orchestration that it compares."""
    bars = []
    for one in plots.choose(configurations):
        own = side_by_side.bars(one.done[0].metrics)
        bars += [
            (f"{one.label} {name}".strip() if len(configurations) > 1 or not name else name, bar) for name, bar in own
        ]
    if not bars:
        return []
    alt = "Simulated: milliseconds an output token, from intended arrival to last token, by what they went into."
    figure = _figure("waterfall", alt, plots.waterfalls, bars)
    return [Section("Where a token's time goes", [alt], [], figure)]


def _figure(name: str, alt: str, draw: Any, *args: Any) -> Figure:
    return Figure(name, alt, plot_style.render(name, draw, *args))


def swept(configurations: Sequence[Configuration]) -> tuple[str, list[Swept]] | None:
    """The key on the x axis (numbers first, then the one with most values) and the points; None if nothing differs."""
    able = [one for one in configurations if one.values(RATE)]
    if len(able) < 2:
        return None
    several = len({one.argument for one in able}) > 1

    def rank(key: str) -> tuple[bool, int]:
        values = {one.varied.get(key) for one in able}
        return all(value is not None and _is_number(value) for value in values), len(values)

    keys = [key for key in dict.fromkeys(key for one in able for key in one.varied) if rank(key)[1] > 1]
    key = max(keys, key=rank) if keys else ""
    points = []
    for one in able:
        others = [f"{name}={value}" for name, value in one.varied.items() if name != key and name in keys]
        line = " ".join([*([f"{compare.letter(one.argument)}:"] if several and key else []), *others])
        interval = one.interval(RATE)
        assert interval is not None
        points.append(Swept(one.varied.get(key, "-") if key else one.label, line, one.values(RATE), interval))
    return key or "configuration", points


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def drafts(drawn: Sequence[Drawn]) -> list[Section]:
    """Acceptance by position, measured and by formula; the length that follows."""
    able = [one for one in drawn if acceptance.expected(one.timelines) is not None]
    if not able:
        return []
    rows = []
    for one in able:
        made, taken = acceptance.pooled(one.timelines)
        rate = acceptance.independent_rate(made, taken)
        block, oracle = one.middle.spec.get("block"), acceptance.oracle_of(one.middle)
        full = there = "-"
        if oracle is not None:
            each = [pair for timeline in one.timelines for n in timeline.outputs for pair in oracle.verifications(n)]
            there = f"{1 + float(np.mean([accepted for _, accepted in each])):.3f} (oracle)" if each else "-"
        elif isinstance(block, int) and 1 <= block <= acceptance.MAX_BLOCK:
            full = f"{acceptance.expected_length(rate, block):.3f}"
            lengths = [acceptance.expected_length(rate, min(int(n), acceptance.MAX_BLOCK) + 1) for n in made.clip(0)]
            there = f"{float(np.mean(lengths)):.3f}"
        measured = 1 + float(taken.mean())
        rows.append([one.label, str(block), f"{rate:.3f}", f"{measured:.3f}", there, full])
    head = [
        "configuration",
        "block b",
        "a of a tried draft",
        "tokens/verification",
        "formula, drafts as they were",
        "formula, always b - 1 drafts",
    ]
    alt = "Accepted / proposed by position of the draft: markers measured, thin lines the closed formula."
    text = [
        alt,
        "a = accepted / (accepted + rejected). The formula (1 - a^b) / (1 - a) takes drafts as independent and alike; "
        "with d drafts, b is d + 1. Prompt lookup often finds fewer than b - 1. The oracle's is exact.",
    ]
    return [Section("Acceptance", text, [Table(head, rows)], _figure("acceptance", alt, plots.acceptance, able))]


def steady_state(configurations: Sequence[Configuration], settled: dict[str, list[Steadiness]]) -> Section:
    rows = []
    enough = 2 * statistics.MIN_BATCHES_LEFT * statistics.BATCH
    for one in configurations:
        found = settled.get(one.label)
        if not found:
            continue
        config = one.done[0].config.get("run")
        warmup = config.get("warmup_steps", "-") if isinstance(config, dict) else "-"
        froms = [str(s.steady) if s.steady is not None else "none" if s.n_decode >= enough else "?" for s in found]
        rows.append(
            [
                one.label,
                str(warmup),
                ", ".join(froms),
                f"{np.median([s.n_steps for s in found]):.0f}",
                f"{np.median([s.p50_ms for s in found]):.4f}",
                f"{np.median([s.steady_p50_ms for s in found]):.4f}",
                ", ".join(str(s.n_slow) for s in found),
                f"{max(s.slowest_ms for s in found):.3f}",
            ]
        )
    head = [
        "configuration",
        "run.warmup_steps",
        "measured steps before the steady state, by repetition",
        "measured steps",
        "decode step p50, ms",
        "the same, steady",
        "slow steps (outliers)",
        "slowest, ms",
    ]
    text = [
        "MSER-5 on the durations of the measured steps that only decode. 0: run.warmup_steps was enough; none: "
        f"no steady state; ?: fewer than {enough} such steps. All other figures of this report are of all measured "
        "steps; slow steps are counted here and dropped nowhere.",
    ]
    return Section("Warm-up and steady state", text, [Table(head, rows)])
