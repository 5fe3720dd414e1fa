"""`xlpk report --fail-if "METRIC OP NUMBER[x]"`: a comparison as a check of a CI.

OP is one of > >= < <=. `latency/itl_ms.p50 > 1.05x` fails what is more than 1.05 times the baseline; without the x the
number is a value of the metric itself, and every configuration is held against it.

The baseline of `x` is the first argument: its only configuration, or of several the one with the same overrides. Of a
single sweep it is the first configuration. What fails is the estimate (the median over repetitions, or of the ratios
of repetitions that ran in turns); a line says when the 95 % interval does not exclude the threshold, and `--certain`
lets only those fail whose interval does.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xlpk import compare
from xlpk.compare import Configuration
from xlpk.errors import InputError

OPTION = "--fail-if"
ALLOWED = "METRIC OP NUMBER[x], OP one of > >= < <=, e.g. 'latency/itl_ms.p50 > 1.05x'"
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_HINTS = {"latency": " (several steps in one poll of the host; device_latency/ has no such bunches)"}
_NUMBER = r"[+-]?(?:\d{1,30}\.?\d{0,30}|\.\d{1,30})(?:e[+-]?\d{1,2})?"
GRAMMAR = re.compile(rf"\s*([A-Za-z0-9_./-]+)\s*(>=|<=|>|<)\s*({_NUMBER})\s*(x?)\s*")


@dataclass(frozen=True)
class Threshold:
    """One expression. `relative`: times the baseline."""

    text: str
    metric: str
    operator: str
    number: float
    relative: bool


@dataclass(frozen=True)
class Outcome:
    """What one threshold came to for one configuration."""

    failed: bool
    line: str


def parse(text: str) -> Threshold:
    match = GRAMMAR.fullmatch(text)
    if match is None:
        raise InputError(OPTION, text, ALLOWED)
    metric, sign, number, relative = match.groups()
    if relative and float(number) <= 0:
        raise InputError(OPTION, text, "a positive number before x")
    return Threshold(" ".join(text.split()), metric, sign, float(number), bool(relative))


def check(threshold: Threshold, configurations: Sequence[Configuration], certain: bool = False) -> list[Outcome]:
    """Raises InputError where a finished run lacks the metric, or nothing finished, or there is nothing to compare."""
    if not threshold.relative:
        return [_absolute(threshold, one, certain) for one in configurations]
    several = len({one.argument for one in configurations}) > 1
    tested = [one for one in configurations if one.argument > 0] if several else list(configurations[1:])
    if not tested:
        raise InputError(OPTION, threshold.text, "two runs or more: x is relative to the first one")
    return [_relative(threshold, _baseline(threshold, configurations, one), one, certain) for one in tested]


def _baseline(threshold: Threshold, configurations: Sequence[Configuration], tested: Configuration) -> Configuration:
    first = [one for one in configurations if one.argument == 0]
    if tested.argument == 0 or len(first) == 1:
        return first[0]
    same = [one for one in first if one.keys == tested.keys]
    if not same:
        raise InputError(OPTION, threshold.text, f"a first argument with a configuration like {tested.label}")
    return same[0]


def _values(threshold: Threshold, one: Configuration) -> list[float]:
    values = one.values(threshold.metric)
    if values:
        return values
    if not one.done:
        state = ", ".join(dict.fromkeys(run.status for run in one.runs))
        raise InputError(OPTION, threshold.text, f"runs that finished; {one.label} did not ({state})")
    if one.withheld(threshold.metric):
        raise InputError(OPTION, threshold.text, f"a metric with enough samples; {one.label} has too few")
    raise InputError(OPTION, threshold.text, f"a metric that each run has; {one.label} has no {threshold.metric}")


def _absolute(threshold: Threshold, one: Configuration, certain: bool) -> Outcome:
    _values(threshold, one)
    interval = one.interval(threshold.metric)
    assert interval is not None
    text = f"{one.label}: {interval.median:.6g}"
    return _outcome(threshold, text, "", interval.median, interval.low, interval.high, interval.n, certain)


def _relative(threshold: Threshold, base: Configuration, one: Configuration, certain: bool) -> Outcome:
    _values(threshold, base)
    _values(threshold, one)
    medians = [side.interval(threshold.metric) for side in (base, one)]
    assert medians[0] is not None
    assert medians[1] is not None
    before, after = medians[0].median, medians[1].median
    text = f"{one.label}: {after:.6g} against {before:.6g} of {base.label}"
    ratio = compare.compare(base, one, threshold.metric)
    if ratio is None:  # a zero: there is no ratio, but there is an order
        failed = OPERATORS[threshold.operator](after, threshold.number * before) and not certain
        hint = f"no ratio, a value is not positive{_HINTS.get(threshold.metric.partition('/')[0], '')}"
        return Outcome(failed, f"{threshold.text}: {text}; {hint}")
    text += f", {ratio.ratio:.4f}x"
    return _outcome(threshold, text, "x", ratio.ratio, ratio.low, ratio.high, ratio.n, certain)


def _outcome(
    threshold: Threshold, text: str, unit: str, value: float, low: float, high: float, n: int, certain: bool
) -> Outcome:
    beyond = OPERATORS[threshold.operator]
    failed = beyond(value, threshold.number)
    if n == 1:
        note = "one run: no interval (run.repeat=5 gives one)"
        excluded = False
    else:
        excluded = beyond(low, threshold.number) == beyond(high, threshold.number)
        note = f"95 % interval {low:.6g}{unit}..{high:.6g}{unit}"
        note += "" if excluded else ", which does not exclude the threshold"
    return Outcome(failed and (excluded or not certain), f"{threshold.text}: {text}; {note}")
