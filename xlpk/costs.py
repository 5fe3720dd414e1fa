"""What a step costs on a virtual clock: `StepCosts`, a formula whose figures come from data sheets or from a fit.

xlpk/hardware.py makes them from peak figures, `xlpk calibrate` from measured runs, `read_costs` from the file that it
wrote. kernels/simulate.cpp has the same formula and gives the same nanoseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.errors import InputError, shown

KNOTS = tuple(1 << i for i in range(layout.COST_KNOTS))  # rows: 1, 2, 4, ... 2048
FILE_VERSION = 1
_NONE = (0.0,) * len(KNOTS)
_MAX_NS = 1e15  # eleven days: a larger figure is a broken file
_LAST = len(KNOTS) - 2
_CURVES = ("row_ns", "sample_ns", "filter_ns")


COUNTS = ("n_rows", "n_sample_rows", "context_tokens", "attended_tokens", "n_moves", "n_filter_rows")


def at_knots(values: Sequence[float], n: int) -> float:
    """Piecewise linear through (KNOTS[i], values[i]), on with the last slope; 0 rows cost nothing.

    The segment is that of the largest knot at or below `n` but for the last knot, so that C++ rounds alike.
    """
    if n <= 0:
        return 0.0
    i = min(n.bit_length() - 1, _LAST)
    low, knot = values[i], KNOTS[i]
    return low + (values[i + 1] - low) * ((n - knot) / knot)


@dataclass(frozen=True)
class StepCosts:
    """Nanoseconds; fields as of layout.STEP_COSTS. A step takes the sum, rounded half up to whole nanoseconds:

    fixed + rows(n_rows) + samples(n_sample_rows) + filters(n_filter_rows) + context_ns context_tokens
    + attended_ns attended_tokens + move_ns n_moves + control_ns + control_row_ns n_rows
    """

    fixed_ns: float = 0.0  # a step
    row_ns: tuple[float, ...] = _NONE  # [12] all rows of a step, at KNOTS rows
    sample_ns: tuple[float, ...] = _NONE  # [12] all sampled rows, likewise
    filter_ns: tuple[float, ...] = _NONE  # [12] all rows that top-k, top-p, min-p or logprobs filter, likewise
    context_ns: float = 0.0  # a token whose K and V are read, once a request
    attended_ns: float = 0.0  # a token that a row attends to, summed over rows
    move_ns: float = 0.0  # a page to the swap space or back
    control_ns: float = 0.0  # control, a step
    control_row_ns: float = 0.0  # control, a row
    publish_ns: float = 0.0  # from the end of a step until the host sees its tokens
    submit_ns: float = 0.0  # from submission until the loop can see it

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            curve = item.name in _CURVES
            entries = value if curve else (value,)
            if curve and len(entries) != len(KNOTS):
                raise InputError(item.name, f"{len(entries)} values", f"{len(KNOTS)}, at 1, 2, 4, ... {KNOTS[-1]} rows")
            for entry in entries:
                if not 0 <= entry <= _MAX_NS:  # nan compares false
                    raise InputError(item.name, entry, "0 or more nanoseconds, finite")

    def exact_ns(
        self,
        n_rows: int,
        n_sample_rows: int = 0,
        context_tokens: int = 0,
        attended_tokens: int = 0,
        n_moves: int = 0,
        n_filter_rows: int = 0,
    ) -> float:
        """The sum before it is rounded, in the order that kernels/simulate.cpp has."""
        total = self.fixed_ns + at_knots(self.row_ns, n_rows)
        total = total + at_knots(self.sample_ns, n_sample_rows)
        total = total + at_knots(self.filter_ns, n_filter_rows)
        total = total + self.context_ns * context_tokens
        total = total + self.attended_ns * attended_tokens
        total = total + self.move_ns * n_moves
        total = total + self.control_ns
        return total + self.control_row_ns * n_rows

    def step_ns(self, *counts: int) -> int:
        """Nanoseconds of a step with `counts`, as exact_ns takes them."""
        return math.floor(self.exact_ns(*counts) + 0.5)

    def __add__(self, other: StepCosts) -> StepCosts:
        """Both, one after the other."""
        values: dict[str, Any] = {}
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            same = isinstance(mine, tuple)
            values[item.name] = tuple(a + b for a, b in zip(mine, theirs, strict=True)) if same else mine + theirs
        return StepCosts(**values)

    def record(self) -> np.ndarray[Any, Any]:
        """As layout.STEP_COSTS, a scalar array."""
        out = np.zeros((), layout.STEP_COSTS.dtype)
        for name, value in asdict(self).items():
            out[name] = value
        return out

    @staticmethod
    def from_mapping(values: Mapping[str, Any], source: str) -> StepCosts:
        """Fields by name, all but filter_ns, which costs nothing then. InputError naming `source` and the field."""
        names = [item.name for item in fields(StepCosts)]
        for name in values:
            if name not in names:
                raise InputError(f"{source}: {name}", shown(str(values[name])), f"one of {', '.join(names)}")
        out: dict[str, Any] = {}
        for name in names:
            value = values.get(name, _NONE if name == "filter_ns" else None)
            curve = name in _CURVES
            given: list[Any] = list(value) if curve and isinstance(value, list | tuple) else [value]
            if any(isinstance(entry, bool) or not isinstance(entry, int | float) for entry in given):
                allowed = f"{len(KNOTS)} numbers" if curve else "a number"
                raise InputError(f"{source}: {name}", shown(str(value)), f"{allowed} of nanoseconds")
            out[name] = tuple(map(float, given)) if curve else float(given[0])
        try:
            return StepCosts(**out)
        except InputError as error:
            raise InputError(f"{source}: {error.field}", error.value, error.allowed) from None


@dataclass(frozen=True)
class PricedCosts:
    """The costs of a step and what they are made of; the parts' sums are the whole's, but for rounding."""

    costs: StepCosts
    parts: Mapping[str, StepCosts]  # what the time goes into -> its share
    phases: Mapping[str, StepCosts] = field(default_factory=dict)  # by layout.PHASES: the device's time

    def part_ns(self, name: str, step: Mapping[str, int]) -> float:
        """A part's nanoseconds in a step with COUNTS; what is not there is 0."""
        return priced(self.parts[name], step)


def priced(costs: StepCosts, step: Mapping[str, int]) -> float:
    """Nanoseconds, not rounded, of a step with COUNTS; what is not there is 0."""
    return costs.exact_ns(*(int(step.get(name, 0)) for name in COUNTS))


@dataclass(frozen=True)
class CostFile:
    """What `xlpk calibrate` writes: costs, what they were measured on, how well they fit."""

    costs: StepCosts
    model: str
    orchestration: str  # persistent | launched | graph
    facts: Mapping[str, Any]  # the rest of the file


def read_costs(path: Path) -> CostFile:
    """A costs.yaml. InputError naming the file and what is wrong with it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    name = str(path)
    try:
        value = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise InputError("backend.costs", name, f"a file of `xlpk calibrate` ({error.strerror})") from None
    except (OmegaConfBaseException, ValueError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError("backend.costs", name, f"a file of `xlpk calibrate` ({shown(reason)})") from None
    except Exception as error:  # PyYAML's own
        raise InputError("backend.costs", name, f"YAML ({shown(str(error).splitlines()[0])})") from None
    if not isinstance(value, dict) or not isinstance(value.get("costs"), dict):
        raise InputError("backend.costs", name, "a file of `xlpk calibrate`, with `costs` in it")
    if value.get("version") != FILE_VERSION:
        raise InputError(f"{name}: version", value.get("version"), str(FILE_VERSION))
    for key in ("model", "orchestration"):
        if not isinstance(value.get(key), str):
            raise InputError(f"{name}: {key}", shown(str(value.get(key))), "a name")
    facts = {str(key): item for key, item in value.items() if key not in ("costs", "model", "orchestration", "version")}
    costs = StepCosts.from_mapping({str(key): item for key, item in value["costs"].items()}, name)
    return CostFile(costs, value["model"], value["orchestration"], facts)


def write_costs(path: Path, file: CostFile) -> None:
    """Whole or not at all; figures to a hundredth of a nanosecond."""
    from omegaconf import OmegaConf

    costs = {name: _rounded(value) for name, value in asdict(file.costs).items()}
    head = {"version": FILE_VERSION, "model": file.model, "orchestration": file.orchestration}
    text = OmegaConf.to_yaml(OmegaConf.create({**head, "costs": costs, **file.facts}))
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _rounded(value: Any) -> Any:
    return [round(entry, 2) for entry in value] if isinstance(value, tuple | list) else round(value, 2)
