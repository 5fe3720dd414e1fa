"""What a report says, section by section: text and tables from statuses, configs and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xlpk import compare, report_figures, statistics
from xlpk.compare import HEADLINES, Configuration, Headline
from xlpk.report_figures import Section, Table
from xlpk.rundata import RunData
from xlpk.thresholds import Outcome

MACHINE = ("processor", "cores", "system", "python", "xlpk", "git_commit")
MAX_LISTED = 40  # problems, columns
MAX_ACROSS = 5  # configurations side by side


def build(configurations: Sequence[Configuration], outcomes: Sequence[Outcome]) -> list[Section]:
    """All sections that the runs have something to say on."""
    drawn, settled = report_figures.read_logs(configurations)
    sections = [
        what_ran(configurations),
        *([checks(outcomes)] if outcomes else []),
        *([results(configurations)] if any(one.done for one in configurations) else []),
        *comparisons(configurations),
        outliers(configurations),
        *report_figures.figures(configurations, drawn),
        *report_figures.waterfalls(configurations),
        *report_figures.drafts(drawn),
        *quality(configurations),
        *([report_figures.steady_state(configurations, settled)] if settled else []),
        machine(configurations),
        common(configurations),
        every_metric(configurations),
        METHOD,
    ]
    return [section for section in sections if section.text or section.tables or section.figure]


def what_ran(configurations: Sequence[Configuration]) -> Section:
    """A row a configuration: what sets it apart, how many of its runs finished; below, what did not."""
    keys = list(dict.fromkeys(key for one in configurations for key in one.varied))
    several = len({one.argument for one in configurations}) > 1
    table = Table([*(["", "folder"] if several else ["configuration"]), *keys, "runs finished"], [], words=True)
    for one in configurations:
        name = [compare.letter(one.argument), _folder(one)] if several else [one.label]
        runs = f"{len(one.done)} of {len(one.runs)}"
        table.rows.append([*name, *(one.varied.get(key, "-") for key in keys), runs])
    if keys and not several:  # the columns say it
        table = Table(table.head[1:], [row[1:] for row in table.rows], words=True)
    done = [run for one in configurations for run in one.done]
    facts = {name: {str(run.facts.get(name)) for run in done} for name in ("model", "backend", "mode")}
    same = [f"{name} {values.pop()}" for name, values in facts.items() if len(values) == 1]
    text = [f"{'The same in all: ' if len(configurations) > 1 else ''}{', '.join(same)}."] if same else []
    if simulated := sum(bool(run.facts.get("synthetic")) for run in done):
        text.append(
            f"SYNTHETIC: {simulated} of {len(done)} runs are simulations on a virtual clock; nothing was computed."
        )
    troubled = [
        [one.label, str(run.repetition), run.status, "; ".join(_reasons(run)) or "-", str(run.folder)]
        for one in configurations
        for run in one.runs
        if not run.finished or run.problems
    ]
    tables = [table]
    if troubled:
        head = ["not finished, or damaged", "repetition", "status", "why", "folder"]
        rows = troubled[:MAX_LISTED]
        if len(troubled) > MAX_LISTED:
            rows.append([f"and {len(troubled) - MAX_LISTED} more", "", "", "", ""])
        tables.append(Table(head, rows, wrap=True))
    return Section("What was run", text, tables)


def _folder(one: Configuration) -> str:
    return str(one.runs[0].folder)


def _reasons(run: RunData) -> list[str]:
    error = run.facts.get("error")
    return [*([error] if isinstance(error, str) else []), *run.problems]


def checks(outcomes: Sequence[Outcome]) -> Section:
    rows = [["failed" if outcome.failed else "passed", outcome.line] for outcome in outcomes]
    return Section("Checks (--fail-if)", [], [Table(["", "threshold: what was measured"], rows, wrap=True)])


def present(configurations: Sequence[Configuration]) -> list[Headline]:
    return [one for one in HEADLINES if any(one.key in run.metrics for c in configurations for run in c.done)]


def cell(one: Configuration, key: str, form: str) -> str:
    """The median, and below it the 95 % interval: [over repetitions], or of one run (within it)."""
    interval = one.interval(key)
    if interval is None:
        return "n too small" if one.withheld(key) else "-"
    marks = "†" * int(statistics.outliers(one.values(key)).sum())
    text = form.format(interval.median) + marks
    if interval.known:
        ends = form.format(interval.low), form.format(interval.high)
        return text if ends[0] == ends[1] else f"{text}\n[{ends[0]}..{ends[1]}]"
    low, high = (one.values(f"{key}_{end}") for end in ("low", "high"))
    if low and high and low != high:
        return f"{text}\n({form.format(low[0])}..{form.format(high[0])})"
    return text


def results(configurations: Sequence[Configuration]) -> Section:
    """Medians over repetitions with intervals; outliers named."""
    heads = present(configurations)
    repeats = max(len(one.done) for one in configurations)
    rows = [
        [one.label, str(len(one.done)), *(cell(one, head.key, head.form) for head in heads)]
        for one in configurations
        if one.done
    ]
    if repeats > 1:
        text = [f"Medians over up to {repeats} repetitions; in brackets the 95 % interval over repetitions."]
    else:
        text = [
            "One run each: what another run would have given is not known (run.repeat=5 shows it). In parentheses the "
            "95 % interval within the run, which takes its samples as the only source of chance.",
        ]
    if any("†" in text for row in rows for text in row):
        text.append("† an outlier among the repetitions, counted like any other; they are listed below.")
    table = Table(["configuration", "runs", *(head.title for head in heads)], rows)
    return Section("Results", text, [_upright(table)])


def _upright(table: Table) -> Table:
    """Turned, where that spares the reader from scrolling sideways."""
    if len(table.rows) > MAX_ACROSS:
        return table
    turned = list(zip(table.head, *table.rows, strict=True))
    return Table(["", *turned[0][1:]], [list(row) for row in turned[1:]], table.words, table.wrap)


def outliers(configurations: Sequence[Configuration]) -> Section:
    """A row a repetition: in which figures it is an outlier."""
    rows = []
    for one in configurations:
        found: dict[int, list[str]] = {}
        for head in present(configurations):
            having = [run for run in one.done if run.metrics.get(head.key) is not None]
            for run, far in zip(having, statistics.outliers(one.values(head.key)), strict=True):
                if far:
                    found.setdefault(run.repetition, []).append(
                        f"{head.title} {head.form.format(run.metrics[head.key])}"
                    )
        rows += [[one.label, str(repetition), "; ".join(texts)] for repetition, texts in sorted(found.items())]
    table = Table(["configuration", "repetition", "outliers"], rows, wrap=True)
    return Section("Outliers among repetitions", [], [table] if rows else [], folded=True)


def comparisons(configurations: Sequence[Configuration]) -> list[Section]:
    """Each configuration against the first that finished."""
    able = [one for one in configurations if one.done]
    if len(able) < 2:
        return []
    first, others = able[0], able[1:]
    heads = [head for head in present(configurations) if head.better != compare.NEITHER]
    neutral = [head for head in present(configurations) if head.better == compare.NEITHER]
    sections = []
    for title, which, folded in (("faster or slower", heads, False), ("other figures", neutral, True)):
        made = [[compare.compare(first, one, head.key) for head in which] for one in others]
        kept = [i for i in range(len(which)) if any(row[i] is not None for row in made)]
        n = sum(comparison is not None and comparison.known for row in made for comparison in row)
        rows = []
        for one, row in zip(others, made, strict=True):
            verdicts = [compare.verdict(row[i], which[i].better) for i in kept]
            rows.append([one.label, *(verdicts if n else (verdict.partition("\n")[0] for verdict in verdicts))])
        text = []
        if not n:
            text = ["Ratios of single runs: no intervals, so no difference is shown."]
        elif not folded:
            chance = max(1, round(n / 20))
            text = [f"Of {n} comparisons of equal things, about {chance} would show a difference by chance."]
        if kept:
            head = ["configuration", *(which[i].title for i in kept)]
            table = _upright(Table(head, rows, words=True))
            sections.append(Section(f"Against {first.label}: {title}", text, [table], None, folded))
    return sections


def quality(configurations: Sequence[Configuration]) -> list[Section]:
    keys = list(
        dict.fromkeys(k for one in configurations for run in one.done for k in run.metrics if k.startswith("quality/"))
    )
    if not keys:
        return []
    rows = [[one.label, *(cell(one, key, "{:.6g}") for key in keys)] for one in configurations if one.done]
    return [Section("Quality", [], [Table(["configuration", *(key.partition("/")[2] for key in keys)], rows)])]


def machine(configurations: Sequence[Configuration]) -> Section:
    """What is common, and what differs with the configurations that had it."""
    builds = [{**run.build, **_details(run.build)} for one in configurations for run in one.runs if run.build]
    keys = list(dict.fromkeys([*MACHINE, *(key for one in builds for key in one)]))
    skip = {"backend", "argv", "build_seconds", "build_cached"}
    rows = []
    for key in keys:
        values = list(dict.fromkeys(str(one[key]) for one in builds if one.get(key) is not None))
        if values and key not in skip:
            rows.append([key, " | ".join(values[:5]) + (f" and {len(values) - 5} more" if len(values) > 5 else "")])
    return Section("Machine and build", [], [Table(["", ""], rows, wrap=True)] if rows else [])


def _details(build: dict[str, Any]) -> dict[str, Any]:
    details = build.get("backend")
    return details if isinstance(details, dict) else {}


def common(configurations: Sequence[Configuration]) -> Section:
    shared, differ = compare.configs(configurations)
    tables = []
    if differ and len(configurations) <= MAX_LISTED:
        head = ["differs", *(one.label for one in configurations)]
        tables.append(Table(head, [[key, *values] for key, values in differ.items()], wrap=True))
    if shared:
        tables.append(Table(["the same in all", ""], [[key, value] for key, value in shared.items()], wrap=True))
    return Section("Config", [], tables, folded=True)


def every_metric(configurations: Sequence[Configuration]) -> Section:
    able = [one for one in configurations if one.done]
    keys = list(dict.fromkeys(key for one in able for run in one.done for key in run.metrics))
    keys = [key for key in keys if not key.endswith(("_low", "_high"))]
    rows = [[key, *(_short(one, key) for one in able)] for key in keys]
    tables = [Table(["median over repetitions", *(one.label for one in able)], rows)] if rows else []
    return Section("All metrics", [], tables, folded=True)


def _short(one: Configuration, key: str) -> str:
    values = one.values(key)
    return f"{float(np.median(values)):.6g}" if values else "n too small" if one.withheld(key) else "-"


METHOD = Section(
    "How to read this",
    [
        "A run gives one value of a metric; a figure is the median over the repetitions of a configuration.",
        "Intervals, 95 %: of six and more repetitions the percentile bootstrap of the median, its quantiles expanded "
        "for small n (Hesterberg 2015); of two to five Student's t, because resampled medians cannot reach 95 % there.",
        "Comparisons: repetitions of one sweep run in turns (A B A B), so ratios are taken repetition by repetition "
        "and their median is given; runs that took no turns are compared as independent samples (Welch). `No "
        "difference shown` says that the interval holds 1, not that there is none.",
        "Outliers: 0.6745 |x - median| / MAD > 3.5 (Iglewicz & Hoaglin 1993), of fewer than 20 values more, so that "
        "one in 20 normal samples has any. They are marked and never dropped.",
        "Steady state: MSER-5 (White, Cobb & Spratt 2000).",
        "Definitions of the metrics: docs/metrics.md. ITL is by the device's clock where there is one.",
    ],
    folded=True,
)
