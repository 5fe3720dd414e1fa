"""Costs from measured steps: least squares with coefficients that cannot be negative and curves that cannot fall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xlpk.costs import KNOTS

Array = npt.NDArray[np.float64]

HELD_OUT = 5  # every fifth step is left out of the first fit and predicted by it
_HUBER = 1.345  # in standard deviations: 95 % as efficient as least squares on normal residuals (Huber 1981)
_ROUNDS = 20
_LINKED = 1e-3  # a column of which the others explain all but this share of its length is not identified


@dataclass(frozen=True)
class Measured:
    """Steps of one configuration, a value each."""

    n_rows: Array
    n_sample_rows: Array
    context_tokens: Array
    attended_tokens: Array
    n_moves: Array
    n_filter_rows: Array
    forward_ns: Array  # from plan to commit, filter and control left out
    filter_ns: Array
    control_ns: Array

    def __len__(self) -> int:
        return len(self.n_rows)

    def take(self, which: npt.NDArray[np.bool_]) -> Measured:
        return Measured(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Fitted:
    """Coefficients as StepCosts has them, and how well they say what was measured."""

    values: dict[str, float | tuple[float, ...]]
    r2: float  # of steps that the fit did not see
    median_error: float  # of them: |predicted / measured - 1|
    p95_error: float
    bias: float  # predicted / measured - 1, of their sums
    n_held_out: int
    unidentified: tuple[str, ...]  # coefficients that these steps cannot tell from others


def nnls(a: Array, b: Array) -> Array:
    """argmin |a x - b| over x >= 0, by the active set method of Lawson & Hanson (1974). a [m, n], b [m] -> [n]."""
    n = a.shape[1]
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    if len(a) > n:  # the same problem with a square matrix; a product a.T a would square its condition
        basis, a = np.linalg.qr(a / scale)
        b = basis.T @ b
    else:
        a = a / scale
    target = a.T @ b
    x, free = np.zeros(n), np.zeros(n, dtype=bool)
    for _ in range(3 * n):
        gradient = target - a.T @ (a @ x)
        gradient[free] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-10 * max(1.0, float(np.abs(target).max())):
            break
        free[best] = True
        while True:
            trial = np.zeros(n)
            trial[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            bad = free & (trial <= 0)
            if not bad.any():
                x = trial
                break
            ratio = x[bad] / np.maximum(x[bad] - trial[bad], 1e-300)
            x = x + float(ratio.min()) * (trial - x)
            free &= x > 1e-12
            x[~free] = 0.0
    return np.asarray(x / scale, dtype=np.float64)


def ramps(counts: Array, top: int, first: bool) -> Array:
    """[steps, knots]: column i climbs from 0 at KNOTS[i - 1] to 1 at KNOTS[i], and on from there only for i = `top`.

    Nonnegative multiples of them are the curves of StepCosts that do not fall. `first`: with the step at one row.
    """
    columns = []
    for i, knot in enumerate(KNOTS[: top + 1]):
        if i == 0:
            columns.append((counts >= 1).astype(np.float64) * first)
            continue
        below = KNOTS[i - 1]
        climbed = (counts - below) / (knot - below)
        columns.append(np.clip(climbed, 0.0, None if i == top else 1.0))
    return np.stack(columns, axis=1)


def curve(increments: Sequence[float]) -> tuple[float, ...]:
    """Increments by knot -> values at all KNOTS, continued with the last slope that has data behind it."""
    values = list(np.cumsum(increments))
    while len(values) < len(KNOTS):
        slope = (
            (values[-1] - values[-2]) / (KNOTS[len(values) - 1] - KNOTS[len(values) - 2]) if len(values) > 1 else 0.0
        )
        values.append(values[-1] + slope * (KNOTS[len(values)] - KNOTS[len(values) - 1]))
    return tuple(float(value) for value in values)


def fit(steps: Measured) -> Fitted:
    """Robust for the shape (Huber's weights on relative residuals), then one factor so that the sums agree.

    The factor keeps what stalls cost on average, which means of latencies contain, without letting single ones bend
    the curves.
    """
    held = np.arange(len(steps)) % HELD_OUT == HELD_OUT - 1
    first = _solve(steps.take(~held))
    test = steps.take(held)
    predicted, actual = _predict(first, test), test.forward_ns + test.filter_ns + test.control_ns
    error = np.abs(predicted / actual - 1)
    spread = float(((actual - actual.mean()) ** 2).sum())
    whole = _solve(steps)
    return Fitted(
        values=_values(whole),
        r2=1 - float(((predicted - actual) ** 2).sum()) / spread if spread else 1.0,
        median_error=float(np.median(error)),
        p95_error=float(np.percentile(error, 95)),
        bias=float(predicted.sum() / actual.sum() - 1),
        n_held_out=len(test),
        unidentified=_unidentified(steps),
    )


@dataclass(frozen=True)
class _Solution:
    top_rows: int
    top_samples: int
    forward: Array
    filters: Array  # increments of the curve by knot
    control: Array


def _top(counts: Array) -> int:
    """The last knot that has steps at or beyond the one before it."""
    most = int(counts.max(initial=1))
    return min(max(1, (max(most, 1) - 1).bit_length()), len(KNOTS) - 1)


def _filter_columns(steps: Measured, top: int) -> Array:
    return ramps(steps.n_filter_rows, top, True)


def _columns(steps: Measured, top_rows: int, top_samples: int) -> tuple[list[str], Array]:
    """Names and columns of the forward pass; of n_rows the jump at one row is `fixed_ns`."""
    names = ["fixed_ns", *(f"row_ns[{i}]" for i in range(1, top_rows + 1))]
    names += [*(f"sample_ns[{i}]" for i in range(top_samples + 1)), "context_ns", "attended_ns", "move_ns"]
    parts = [
        np.ones((len(steps), 1)),
        ramps(steps.n_rows, top_rows, False)[:, 1:],
        ramps(steps.n_sample_rows, top_samples, True),
        np.stack([steps.context_tokens, steps.attended_tokens, steps.n_moves], axis=1),
    ]
    return names, np.concatenate(parts, axis=1)


def _solve(steps: Measured) -> _Solution:
    top_rows, top_samples = _top(steps.n_rows), _top(steps.n_sample_rows)
    _, columns = _columns(steps, top_rows, top_samples)
    forward = _robust(columns, steps.forward_ns)
    control = _robust(np.stack([np.ones(len(steps)), steps.n_rows], axis=1), steps.control_ns)
    filtered = steps.take(steps.n_filter_rows > 0)
    filters = _robust(_filter_columns(filtered, _top(filtered.n_filter_rows)), filtered.filter_ns)
    return _Solution(top_rows, top_samples, forward, filters, control)


def _robust(columns: Array, target: Array) -> Array:
    """NNLS of relative residuals under Huber's weights; scaled so that predictions and `target` have one sum."""
    if not target.any():
        return np.zeros(columns.shape[1])
    unit = np.maximum(target, float(np.median(target)) / 10)
    weights = np.ones(len(target))
    found = np.zeros(columns.shape[1])
    for _ in range(_ROUNDS):
        factor = np.sqrt(weights) / unit
        found = nnls(columns * factor[:, None], target * factor)
        residual = (target - columns @ found) / unit
        spread = 1.4826 * float(np.median(np.abs(residual - np.median(residual))))
        if spread == 0:
            break
        updated = np.minimum(1.0, _HUBER * spread / np.maximum(np.abs(residual), 1e-300))
        if np.abs(updated - weights).max() < 1e-3:
            break
        weights = updated
    total = float((columns @ found).sum())
    return found * (float(target.sum()) / total) if total else found


def _predict(solution: _Solution, steps: Measured) -> Array:
    _, columns = _columns(steps, solution.top_rows, solution.top_samples)
    control = np.stack([np.ones(len(steps)), steps.n_rows], axis=1) @ solution.control
    filters = _filter_columns(steps, len(solution.filters) - 1) @ solution.filters
    return np.asarray(columns @ solution.forward + filters + control, dtype=np.float64)


def _values(solution: _Solution) -> dict[str, float | tuple[float, ...]]:
    found = list(solution.forward)
    rows = [0.0, *found[1 : 1 + solution.top_rows]]
    samples = found[1 + solution.top_rows : 2 + solution.top_rows + solution.top_samples]
    context, attended, move = (float(value) for value in found[-3:])
    return {
        "fixed_ns": float(found[0]),
        "row_ns": curve(rows),
        "sample_ns": curve(samples),
        "filter_ns": curve(list(solution.filters)),
        "context_ns": context,
        "attended_ns": attended,
        "move_ns": move,
        "control_ns": float(solution.control[0]),
        "control_row_ns": float(solution.control[1]),
    }


def _unidentified(steps: Measured) -> tuple[str, ...]:
    """Columns that are zero throughout, or that the others add up to."""
    names, columns = _columns(steps, _top(steps.n_rows), _top(steps.n_sample_rows))
    filtered = steps.take(steps.n_filter_rows > 0)
    if not len(filtered):
        return (*_dependent(names, columns, steps.forward_ns), "filter_ns")
    filters = _filter_columns(filtered, _top(filtered.n_filter_rows))
    filter_names = [f"filter_ns[{i}]" for i in range(filters.shape[1])]
    return (*_dependent(names, columns, steps.forward_ns), *_dependent(filter_names, filters, filtered.filter_ns))


def _dependent(names: Sequence[str], columns: Array, target: Array) -> tuple[str, ...]:
    columns = columns / np.maximum(target, 1.0)[:, None]
    out = []
    for i, name in enumerate(names):
        column, others = columns[:, i], np.delete(columns, i, axis=1)
        size = float(np.linalg.norm(column))
        left = column - others @ np.linalg.lstsq(others, column, rcond=None)[0]
        if size == 0 or float(np.linalg.norm(left)) < _LINKED * size:
            out.append(name)
    return tuple(out)
