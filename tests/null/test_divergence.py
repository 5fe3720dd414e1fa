"""Divergence from a reference, by hand; the windows that score each token once."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from xlpk import divergence, metrics
from xlpk.quality import windows_of


def test_two_tokens_by_hand() -> None:
    """p = (1/4, 3/4) against q = (1/2, 1/2), and equal ones that logits say with different constants."""
    reference = np.log(np.float64([[0.25, 0.75], [0.5, 0.5]]))
    logits = np.float32([[7.0, 7.0], [-300.0, -300.0]])
    found = divergence.compare(logits, reference, [0, 1])
    assert found["nll"] == pytest.approx([math.log(2), math.log(2)])
    assert found["reference_nll"] == pytest.approx([math.log(4), math.log(2)])
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert found["kl"] == pytest.approx([kl, 0.0], rel=1e-8, abs=1e-12)
    assert found["same_top1"] == 1, "the likelier token differs in row 0; ties go to the lower id"


def test_it_is_the_divergence_from_the_reference() -> None:
    """Kullback-Leibler is not symmetric: the reference's probabilities weigh."""
    p, q = np.log(np.float64([[0.9, 0.1]])), np.log(np.float64([[0.5, 0.5]]))
    (there,), (back,) = divergence.compare(q, p, [0])["kl"], divergence.compare(p, q, [0])["kl"]
    assert there == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert back == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5))


def test_what_the_reference_excludes_costs_nothing() -> None:
    assert divergence.compare(np.zeros((1, 2)), np.float64([[0.0, -np.inf]]), [0])["kl"] == pytest.approx([math.log(2)])


HEADER = {"event": "header", "kv": {"page_bytes": 1, "page_size": 1}, "phases": []}


def event(nll: list[float], reference: list[float], kl: list[float], same: int, n_bytes: int) -> dict:
    return {
        "event": "quality", "window": 0, "tokens": len(nll), "bytes": n_bytes,
        "nll": nll, "reference_nll": reference, "kl": kl, "same_top1": same,
    }  # fmt: skip


def test_metrics_of_the_log() -> None:
    events = [event([1.0, 2.0], [1.0, 1.0], [0.0, 0.5], 1, 6), event([3.0], [2.0], [0.1], 1, 2)]
    found = metrics.compute([HEADER, *events])
    quality = {key.removeprefix("quality/"): value for key, value in found.items() if key.startswith("quality/")}
    assert quality == {
        "tokens": 3,
        "nll_nats.mean": 2.0,
        "reference_nll_nats.mean": pytest.approx(4 / 3),
        "nll_ratio": pytest.approx(1.5),
        "perplexity": pytest.approx(math.exp(2)),
        "kl_nats.mean": pytest.approx(0.2),
        "kl_nats.p99": None,
        "kl_nats.max": 0.5,
        "top1_agreement": pytest.approx(2 / 3),
        "bits_per_byte": pytest.approx(6 / math.log(2) / 8),
    }
    page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()
    assert not [key for key in quality if f"`quality/{key.partition('.')[0]}`" not in page]
    assert not [key for key in metrics.compute([HEADER]) if key.startswith("quality/")]
    many = event([1.0] * 1000, [1.0] * 1000, [i / 999 for i in range(1000)], 0, 0)
    found = metrics.compute([HEADER, many])
    assert found["quality/kl_nats.p99"] == pytest.approx(0.99)
    assert "quality/bits_per_byte" not in found
    assert metrics.compute([HEADER, event([1e5], [1.0], [1.0], 0, 1)])["quality/perplexity"] > 1e300


@pytest.mark.parametrize(("n", "window", "stride"), [(2, 8, 4), (9, 4, 4), (50, 16, 5), (50, 16, 16), (33, 16, 8)])
def test_each_token_is_scored_once_with_the_context_it_may_have(n: int, window: int, stride: int) -> None:
    ids = tuple(range(100, 100 + n))
    ends = [3 * (i + 1) for i in range(n)]
    found = list(windows_of(ids, ends, window, stride))
    assert [token for one in found for token in one.targets] == list(ids[1:])
    assert sum(one.n_bytes for one in found) == ends[-1] - ends[0]
    for one in found:
        assert len(one.tokens) <= window
        for i, target in enumerate(one.targets):
            row = one.first + i
            assert one.tokens[row] == target - 1, "the row that predicts it"
            assert row + 1 >= min(target - 100, window - stride + 1), "with enough text before it"
