"""Configurations: what repeated runs have in common, what sets them apart, and how they compare.

The runs of a sweep whose `overrides` are equal are repetitions of one configuration. Runs named one by one are
configurations of their own, whatever they share: that is how two versions of the code are compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xlpk import statistics, sweep_folder
from xlpk.rundata import RunData
from xlpk.statistics import Comparison, Interval

DERIVED = (  # parts of the effective config that follow from others, or do not bear on what is measured
    "kv.pages",
    "kv.page_bytes",
    "kv.total_bytes",
    "model.parameters",
    "spec.num_speculative_tokens",
    "run.",
    "tracking.",
)
HIGHER, LOWER, NEITHER = 1, -1, 0


@dataclass(frozen=True)
class Headline:
    """A metric that every report compares. `better`: which direction is."""

    title: str
    key: str
    form: str
    better: int


HEADLINES = (
    Headline("tokens/s", "throughput/tokens_per_s", "{:,.1f}", HIGHER),
    Headline("TTFT p50, ms", "latency/ttft_ms.p50", "{:.3f}", LOWER),
    Headline("ITL p50, device, ms", "device_latency/itl_ms.p50", "{:.4f}", LOWER),
    Headline("ITL p90, device, ms", "device_latency/itl_ms.p90", "{:.4f}", LOWER),
    Headline("E2E p50, ms", "latency/e2e_ms.p50", "{:.2f}", LOWER),
    Headline("step p50, ms", "loop/step_ms.p50", "{:.4f}", NEITHER),
    Headline("steps", "loop/steps", "{:,.0f}", NEITHER),
    Headline("accepted drafts", "spec/acceptance_rate", "{:.1%}", NEITHER),
    Headline("tokens/verification", "spec/acceptance_length", "{:.3f}", NEITHER),
    Headline("device idle", "loop/device_idle_share", "{:.2%}", NEITHER),
    Headline("launches/token", "host/launches.per_output_token", "{:.4f}", NEITHER),
    Headline("KV active, peak, bytes", "kv/active_bytes.peak", "{:,.0f}", NEITHER),
    Headline("joules/token", "system/joules_per_token", "{:.4f}", NEITHER),
    Headline("NLL / reference", "quality/nll_ratio", "{:.5f}", NEITHER),
    Headline("KL, mean, nats", "quality/kl_nats.mean", "{:.2e}", NEITHER),
)


@dataclass(eq=False)
class Configuration:
    """Repetitions of one thing. `varied` is what sets it apart: key -> value, in the order of the sweep's keys."""

    argument: int  # 0-based, of the command line
    runs: list[RunData]
    varied: dict[str, str] = field(default_factory=dict)
    label: str = ""

    @property
    def done(self) -> list[RunData]:
        return [run for run in self.runs if run.finished]

    @property
    def keys(self) -> dict[str, str]:
        """Its overrides; of a key that was given twice, as Hydra takes it, the last value."""
        parts = (text.partition("=") for text in self.runs[0].overrides)
        pairs = {key.lstrip("+~"): value for key, _, value in parts}
        aside = (*sweep_folder.ASIDE, "run.outputs", "run.repeat")
        return {k: v for k, v in pairs.items() if k not in aside and not k.startswith(("tracking", "hydra"))}

    def values(self, key: str) -> list[float]:
        """Of each finished run that has the metric, by repetition."""
        return [value for run in self.done if (value := run.metrics.get(key)) is not None]

    def withheld(self, key: str) -> bool:
        return not self.values(key) and any(key in run.metrics for run in self.done)

    def interval(self, key: str) -> Interval | None:
        values = self.values(key)
        return statistics.median_interval(values) if values else None


def group(found: Sequence[Sequence[RunData]]) -> list[Configuration]:
    """The runs of each argument -> configurations, labelled by what differs, in the order of the folders."""
    out: list[Configuration] = []
    for argument, runs in enumerate(found):
        known: dict[tuple[object, ...], Configuration] = {}
        for run in runs:
            sweep = run.facts.get("sweep_id")
            same = (str(sweep), run.overrides) if sweep and run.overrides else (run.folder,)
            if same not in known:
                known[same] = Configuration(argument, [])
                out.append(known[same])
            known[same].runs.append(run)
    for configuration in out:
        configuration.runs.sort(key=lambda run: run.repetition)
    _label(out, len(found))
    return out


def _label(configurations: Sequence[Configuration], n_arguments: int) -> None:
    asked = [one.keys for one in configurations]
    known = [own for one, own in zip(configurations, asked, strict=True) if own or one.runs[0].config]
    keys = [key for key in dict.fromkeys(key for one in known for key in one) if len({o.get(key) for o in known}) > 1]
    for one, own in zip(configurations, asked, strict=True):
        config = one.runs[0].config if any(key not in own for key in keys) else {}
        one.varied = {key: value for key in keys if (value := own.get(key) or _value(config, key))}
        parts = [f"{key}={value}" for key, value in one.varied.items()]
        if n_arguments > 1:
            parts.insert(0, f"{letter(one.argument)}:")
            if not one.varied:
                parts.append(one.runs[0].folder.name)
        one.label = " ".join(parts) or str(one.runs[0].facts.get("name") or one.runs[0].folder.name)
    taken: dict[str, int] = {}
    for one in configurations:  # equal labels: runs that only a finer look tells apart
        taken[one.label] = taken.get(one.label, 0) + 1
        if taken[one.label] > 1:
            one.label += f" ({taken[one.label]})"


def letter(argument: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA."""
    text = ""
    argument += 1
    while argument:
        argument, rest = divmod(argument - 1, 26)
        text = chr(ord("A") + rest) + text
    return text


def _value(config: dict[str, Any], key: str) -> str:
    """What a key that was not typed came to; of a group its choice."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    value = value.get("name") if isinstance(value, dict) else value
    return "" if value is None else str(value)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return out


def configs(configurations: Sequence[Configuration]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """(what all share, what differs: key -> a value each) of the effective configs, dotted keys.

    What failed before it had a config counts for neither.
    """
    flat = [flatten(one.runs[0].config) for one in configurations]
    known = [one for one in flat if one]
    keys = dict.fromkeys(key for one in known for key in one)
    shared = {key: known[0][key] for key in keys if len({one.get(key) for one in known}) == 1}
    differ = [key for key in keys if key not in shared and not key.startswith(DERIVED) and "effective_" not in key]
    return shared, {key: [one.get(key, "-") for one in flat] for key in differ}


def compare(first: Configuration, second: Configuration, key: str) -> Comparison | None:
    """second / first; repetition by repetition where both ran in turns in one sweep."""
    sweeps = {str(run.facts.get("sweep_id") or "") for run in (*first.done, *second.done)}
    if len(sweeps) == 1 and "" not in sweeps:
        values = [{run.repetition: run.metrics.get(key) for run in one.done} for one in (first, second)]
        pairs = [(a, b) for r, a in values[0].items() if a is not None and (b := values[1].get(r)) is not None]
        if len(pairs) > 1:
            return statistics.compare([a for a, _ in pairs], [b for _, b in pairs], paired=True)
    return statistics.compare(first.values(key), second.values(key), paired=False)


def verdict(comparison: Comparison | None, better: int) -> str:
    """`faster by 1.12x (95 % interval 1.05x..1.20x)`, in two lines, or what stands in the way of saying so."""
    if comparison is None:
        return "-"
    if not comparison.known:
        return f"{comparison.ratio:.3f}x\n(one run: no interval)"
    if not comparison.shown:
        return f"no difference shown\n({comparison.low:.3f}x..{comparison.high:.3f}x)"
    more = comparison.ratio > 1
    ratio, low, high = comparison.ratio, comparison.low, comparison.high
    if not more:
        ratio, low, high = 1 / ratio, 1 / high, 1 / low
    if better == NEITHER:
        word = "higher" if more else "lower"
    else:
        word = "faster" if more == (better == HIGHER) else "slower"
    return f"{word} by {ratio:.3f}x\n(95 % interval {low:.3f}x..{high:.3f}x)"
