"""The figures of a report. plot_style.py has what they look like.

At most MAX_DRAWN configurations are drawn, and series are reduced to a few hundred points: fifty long runs take no more
than one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from xlpk import acceptance as drafts
from xlpk.compare import Configuration
from xlpk.plot_style import (
    COLOURS,
    MARKERS,
    Array,
    legend_below,
    line_style,
    log_if_wide,
    marked_line,
    new_figure,
    plain_tick,
)
from xlpk.rundata import Timeline
from xlpk.statistics import Interval

MAX_DRAWN = 6
MAX_BINS = 100  # of a line over time
MAX_BANDS = 3  # more hide each other
MAX_DOTS = 300  # of a scatter
N_QUANTILES = 161


@dataclass
class Drawn:
    """A configuration as the plots see it. `timelines`: of each repetition; `steady`: steps before the steady state."""

    label: str
    timelines: list[Timeline]
    middle: Timeline  # of the repetition whose tokens/s are the median
    steady: int | None


@dataclass
class Swept:
    """One configuration's tokens/s: its value of the swept key, the line it belongs to, a value each repetition."""

    x: str
    line: str
    values: list[float]
    interval: Interval


def choose(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Those to draw: all, or the first, the slowest, the fastest and what lies evenly between by tokens/s."""
    able = [one for one in configurations if one.done]
    if len(able) <= MAX_DRAWN:
        return able
    rates = [float(np.median(one.values("throughput/tokens_per_s") or [0.0])) for one in able]
    order = np.argsort(rates, kind="stable")
    picked = {0, *(int(order[i]) for i in np.linspace(0, len(able) - 1, MAX_DRAWN - 1).round().astype(int))}
    return [able[i] for i in sorted(picked)]


def _panels(drawn: Sequence[Drawn]) -> tuple[Any, list[Any]]:
    """One panel a configuration, at most three in a row, axes shared."""
    n_columns = 2 if len(drawn) == 4 else min(3, len(drawn))
    n_rows = -(-len(drawn) // n_columns)
    figure = new_figure(4.6 if n_columns == 1 else 9.6, 2.1 * n_rows + 0.3)
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    axes = [axis for row in grid for axis in row]
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    for axis, one in zip(axes, drawn, strict=False):
        axis.set_title("\n".join(textwrap.wrap(one.label, 30)[:3]), loc="left")
    for axis in grid[-1]:
        axis.set_xlabel("time, s")
    if n_rows > 1:  # above an empty place
        for index in range(len(drawn) - n_columns, (n_rows - 1) * n_columns):
            axes[index].tick_params(labelbottom=True)
            axes[index].set_xlabel("time, s")
    return figure, axes[: len(drawn)]


def _bins(x: Array) -> npt.NDArray[np.int64]:
    """Which of at most MAX_BINS equal stretches of `x` (ascending) each value lies in."""
    low, high = float(x[0]), float(x[-1])
    if high <= low:
        return np.zeros(len(x), dtype=np.int64)
    n = min(MAX_BINS, len(x))
    return np.minimum(((x - low) / (high - low) * n).astype(np.int64), n - 1)


def _by_bin(x: Array, y: Array, statistic: Callable[[Array], float]) -> tuple[Array, Array]:
    """x and the statistic of y in each stretch that has values."""
    index = _bins(x)
    edges = np.flatnonzero(np.diff(index)) + 1
    parts = [(float(a.mean()), statistic(b)) for a, b in zip(np.split(x, edges), np.split(y, edges), strict=True)]
    return np.array([a for a, _ in parts]), np.array([b for _, b in parts])


def _mean(values: Array) -> float:
    return float(values.mean())


def _median(values: Array) -> float:
    return float(np.median(values))


def _max(values: Array) -> float:
    return float(values.max())


def _thinned(count: int, most: int) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _quantiles(values: Array, levels: Array) -> Array:
    """Of the samples themselves, so that few of them give steps."""
    return np.asarray(np.quantile(values, levels, method="inverted_cdf"), dtype=np.float64)


def latency_cdf(drawn: Sequence[Drawn]) -> Any:
    """ITL and TTFT, pooled over repetitions; of up to MAX_BANDS, the band is what single repetitions span."""
    figure = new_figure(9.6, 3.4)
    axes = figure.subplots(1, 2, sharey=True)
    clocks = {one.middle.clock for one in drawn}
    clock = f"{clocks.pop()}'s clock" if len(clocks) == 1 else "device's clock where there is one"
    levels = np.linspace(0, 1, N_QUANTILES)
    for axis, title, name in (
        (axes[0], f"inter-token latency, ms ({clock})", "itl_ms"),
        (axes[1], "time to first token, ms (host's clock)", "ttft_ms"),
    ):
        pooled = []
        for index, one in enumerate(drawn):
            parts = [values for timeline in one.timelines if len(values := getattr(timeline, name))]
            if not parts:
                continue
            pooled.append(np.concatenate(parts))
            if len(parts) > 1 and len(drawn) <= MAX_BANDS:
                each = np.array([_quantiles(values, levels) for values in parts])
                axis.fill_betweenx(levels, each.min(0), each.max(0), color=line_style(index)["color"], alpha=0.15, lw=0)
            marks = {"marker": MARKERS[index % len(MARKERS)], "markevery": (10 + 3 * index, 40), "markersize": 4.5}
            axis.plot(_quantiles(pooled[-1], levels), levels, label=one.label, **line_style(index), **marks)
        log_if_wide(axis, pooled)
        axis.set_xlabel(title)
    axes[0].set_ylabel("share of samples")
    axes[0].set_ylim(0, 1.02)
    legend_below(figure, max(axes, key=lambda axis: len(axis.lines)), len(drawn))
    return figure


def itl_over_time(drawn: Sequence[Drawn]) -> Any:
    """Dots: single tokens; line: the median of a stretch; dotted: where MSER-5 sees the steady state begin."""
    figure, axes = _panels(drawn)
    for axis, one in zip(axes, drawn, strict=True):
        x, y = one.middle.itl_s, one.middle.itl_ms
        if not len(x):
            axis.text(0.5, 0.5, "no two tokens of a request", transform=axis.transAxes, ha="center")
            continue
        some = _thinned(len(x), MAX_DOTS)
        axis.plot(x[some], y[some], ".", color="#999999", markersize=3, label="a token")
        axis.plot(*_by_bin(x, y, _median), color=COLOURS[0], label="median")
        if one.steady:
            begin_s = float(one.middle.steps.end_s[min(one.steady, len(one.middle.steps.end_s) - 1)])
            axis.axvline(begin_s, color="black", linestyle=":", label="steady from here (MSER-5)")
    every = np.concatenate([one.middle.itl_ms for one in drawn])
    if len(every) and every.min() > 0 and np.percentile(every, 99.5) > 10 * np.median(every):
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter(plain_tick)
    elif len(every):
        axes[0].set_ylim(0, max(1.15 * float(np.percentile(every, 99.5)), 1e-6))
    axes[0].set_ylabel("ITL, ms")
    legend_below(figure, max(axes, key=lambda axis: len(axis.lines)), 3)
    return figure


def composition(drawn: Sequence[Drawn]) -> Any:
    """Rows of a step by kind, the mean of each stretch."""
    figure, axes = _panels(drawn)
    kinds = (
        ("prefill", "#E69F00", "////", "prefill_rows"),
        ("decode", "#0072B2", None, "decode_rows"),
        ("draft", "#56B4E9", "....", "draft_rows"),
    )
    for axis, one in zip(axes, drawn, strict=True):
        steps, below = one.middle.steps, None
        for name, colour, hatch, rows in kinds:
            x, y = _by_bin(steps.end_s, getattr(steps, rows), _mean)
            below = np.zeros(len(y)) if below is None else below
            axis.fill_between(
                x, below, below + y, step="mid", facecolor=colour, hatch=hatch, edgecolor="black", lw=0.3, label=name
            )
            below = below + y
    axes[0].set_ylim(bottom=0)  # of all panels, now that each has its data
    axes[0].set_ylabel("rows of a step")
    legend_below(figure, axes[0], 1)
    return figure


def kv_over_time(drawn: Sequence[Drawn]) -> Any:
    """Bytes of pages by what they hold, the most of each stretch."""
    figure, axes = _panels(drawn)
    lines = (
        ("active", "#0072B2", "-", "active_bytes"),
        ("locked by the step", "black", (0, (4, 2)), "locked_bytes"),
        ("drafts only", "#D55E00", (0, (1, 1.2)), "draft_bytes"),
    )
    for axis, one in zip(axes, drawn, strict=True):
        steps = one.middle.steps
        for name, colour, stroke, held in lines:
            x, y = _by_bin(steps.end_s, getattr(steps, held) / (1 << 20), _max)
            axis.plot(x, y, color=colour, linestyle=stroke, label=name, drawstyle="steps-mid")
        if steps.total_bytes > 0:
            peak = float((steps.active_bytes + steps.draft_bytes).max()) / steps.total_bytes
            text = f"at most {peak:.1%} of {steps.total_bytes / (1 << 20):,.1f} MiB"
            axis.text(0.02, 0.9, text, transform=axis.transAxes, fontsize=8)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("KV pages, MiB")
    legend_below(figure, axes[0], 1)
    return figure


def acceptance(drawn: Sequence[Drawn]) -> Any:
    """Accepted at position i / drafts that had one: markers measured, thin lines the formula."""
    figure = new_figure(9.6, 3.4)
    axis = figure.subplots()
    for index, one in enumerate(drawn):
        measured = drafts.positions(*drafts.pooled(one.timelines))
        if not len(measured.had):
            continue
        x = np.arange(1, len(measured.had) + 1)
        style = marked_line(index)
        spread = (index - (len(drawn) - 1) / 2) * 0.05  # so that equal values do not hide each other
        axis.plot(x + spread, measured.rate, **{**style, "linestyle": ""}, label=one.label)
        known = drafts.expected(one.timelines)
        if known is not None:
            name, rates = known
            axis.plot(x[: len(rates)] + spread, rates[: len(x)], **line_style(index), linewidth=1, label=f"  {name}")
    axis.set_ylim(0, 1.05)
    axis.set_xlabel("position of the draft in its block")
    axis.set_ylabel("accepted / proposed")
    axis.xaxis.get_major_locator().set_params(integer=True)
    legend_below(figure, axis, len(drawn))
    return figure


def swept(key: str, points: Sequence[Swept]) -> Any:
    """tokens/s against the swept key: the median, its 95 % interval, and a small dot each repetition."""
    names = list(dict.fromkeys(point.x for point in points))
    numbers = [_number(name) for name in names]
    numeric = all(number is not None for number in numbers)
    places = dict(zip(names, [n or 0.0 for n in numbers] if numeric else map(float, range(len(names))), strict=True))
    lines = list(dict.fromkeys(point.line for point in points))[:MAX_DRAWN]
    figure = new_figure(9.6, 3.6)
    axis = figure.subplots()
    values = sorted(places.values())
    logarithmic = numeric and values[0] > 0 and values[-1] >= 8 * values[0]
    if logarithmic:
        axis.set_xscale("log", base=2)
    gap = min((b - a for a, b in pairwise(values)), default=1.0)
    crowded = len({(point.x, point.line) for point in points}) > len(names)
    for index, line in enumerate(lines):
        shift = 0.0 if not crowded else (index - (len(lines) - 1) / 2) * 0.08
        own = sorted((point for point in points if point.line == line), key=lambda point: places[point.x])
        x = np.array([places[point.x] for point in own])
        x = x * 2 ** (shift / 2) if logarithmic else x + shift * gap
        middle = np.array([point.interval.median for point in own])
        style = marked_line(index) if numeric else {**marked_line(index), "linestyle": ""}
        axis.plot(x, middle, **style, label=line or None)
        for at, point in zip(x, own, strict=True):
            if point.interval.known:
                low, high = point.interval.low, point.interval.high
                bar = [[max(0.0, point.interval.median - low)], [max(0.0, high - point.interval.median)]]
                axis.errorbar([at], [point.interval.median], bar, fmt="none", ecolor=style["color"], capsize=4, lw=1.2)
                repeats = [at] * len(point.values)
                axis.plot(repeats, point.values, "o", mfc="none", mec="black", mew=0.6, markersize=3)
    axis.set_xticks([places[name] for name in names], [textwrap.shorten(name, 28, placeholder="…") for name in names])
    axis.minorticks_off()
    if not numeric and len(names) > 4:
        axis.tick_params(axis="x", rotation=30)
    axis.set_ylim(0)
    axis.set_xlabel(key)
    axis.set_ylabel("tokens/s")
    if lines != [""]:
        legend_below(figure, axis, len(lines))
    return figure


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def waterfalls(bars: Sequence[tuple[str, dict[str, float]]]) -> Any:
    """(name, milliseconds an output token by part) -> a bar each, its parts one behind the other in the same order."""
    parts = list(dict.fromkeys(part for _, bar in bars for part in bar))
    figure = new_figure(9.6, 1.3 + 0.5 * len(bars))
    axis = figure.subplots()
    for index, part in enumerate(parts):
        before = [sum(bar.get(earlier, 0.0) for earlier in parts[:index]) for _, bar in bars]
        axis.barh(
            range(len(bars)),
            [bar.get(part, 0.0) for _, bar in bars],
            left=before,
            height=0.62,
            color=COLOURS[index % len(COLOURS)],
            hatch=(None, "////", "....", "xx")[index // len(COLOURS) % 4],
            edgecolor="black",
            linewidth=0.4,
            label=part,
        )
    for row, (_, bar) in enumerate(bars):
        total = sum(bar.values())
        axis.text(total, row, f" {total:.3g}", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), ["\n".join(textwrap.wrap(name, 34)[:2]) for name, _ in bars])
    axis.invert_yaxis()
    axis.margins(x=0.08)
    axis.set_axisbelow(True)
    axis.set_title("simulated: where a token's time goes", loc="left")
    axis.set_xlabel("ms an output token, from intended arrival to last token")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=6, handlelength=1.6)
    return figure
