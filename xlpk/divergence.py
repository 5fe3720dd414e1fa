"""How far next-token distributions are from a reference's: per token in the event log, and the metrics of a run.

Logits in, nats out; all in float64. Kullback and Leibler 1951: KL(p || q) = sum of p (log p - log q), p the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from xlpk.units import percentile

Logits: TypeAlias = npt.NDArray[np.floating[Any]]


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """[n, vocab] -> [n, vocab]"""
    wide = np.asarray(logits, np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def compare(logits: Logits, reference: Logits, targets: Sequence[int]) -> dict[str, Any]:
    """Both [n, vocab], each row before the token of `targets` [n] -> the figures of a `quality` event, token by token:
    `nll` and `reference_nll` (nats), `kl` (nats, reference || logits), and `same_top1`, how many rows agree in it."""
    q, p = log_softmax(logits), log_softmax(reference)
    rows = np.arange(len(targets))
    with np.errstate(invalid="ignore"):  # 0 x -inf
        kl = np.where(p > -np.inf, np.exp(p) * (p - q), 0.0).sum(axis=-1)
    return {
        "nll": [_short(value) for value in -q[rows, list(targets)]],
        "reference_nll": [_short(value) for value in -p[rows, list(targets)]],
        "kl": [_short(max(0.0, value)) for value in kl],  # rounding makes equal distributions differ by -1e-17
        "same_top1": int((np.argmax(logits, axis=-1) == np.argmax(reference, axis=-1)).sum()),
    }


def _short(value: float) -> float:
    """Nine significant digits: the log is text."""
    return float(f"{value:.9g}")


def metrics(events: Sequence[dict[str, Any]], min_p99: int) -> dict[str, float | int | None]:
    """The `quality/` metrics of a run's `quality` events; nothing without any.

    `min_p99`: with fewer tokens the p99 is withheld (None).
    """
    if not events:
        return {}
    nll = np.concatenate([event["nll"] for event in events])
    reference = np.concatenate([event["reference_nll"] for event in events])
    kl = np.concatenate([event["kl"] for event in events])
    out: dict[str, float | int | None] = {
        "quality/tokens": len(nll),
        "quality/nll_nats.mean": float(nll.mean()),
        "quality/reference_nll_nats.mean": float(reference.mean()),
        "quality/nll_ratio": float(nll.mean() / reference.mean()),
        "quality/perplexity": math.exp(min(float(nll.mean()), 700.0)),
        "quality/kl_nats.mean": float(kl.mean()),
        "quality/kl_nats.p99": percentile(kl.tolist(), 99) if len(kl) >= min_p99 else None,
        "quality/kl_nats.max": float(kl.max()),
        "quality/top1_agreement": sum(event["same_top1"] for event in events) / len(nll),
    }
    n_bytes = sum(event["bytes"] for event in events)
    if n_bytes:
        out["quality/bits_per_byte"] = float(nll.sum()) / math.log(2) / n_bytes
    return out
