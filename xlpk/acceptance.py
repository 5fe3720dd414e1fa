"""Accepted drafts by their position in the block, measured, and what closed forms expect of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xlpk.rundata import Timeline
from xlpk.speculation import Oracle

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

MAX_BLOCK = 1 << 10


@dataclass
class Positions:
    """By position 1, 2, ...: how many verifications had a draft there, and how many accepted it."""

    had: Array
    hits: Array

    @property
    def rate(self) -> Array:
        return self.hits / self.had


def pooled(timelines: Sequence[Timeline]) -> tuple[Counts, Counts]:
    """(drafts, accepted) of each verification of all repetitions."""
    drafts = np.concatenate([timeline.drafts for timeline in timelines])
    accepted = np.concatenate([timeline.accepted for timeline in timelines])
    return drafts, accepted


def positions(drafts: Counts, accepted: Counts) -> Positions:
    """(drafts, accepted) of each verification -> counts by position, as `spec/acceptance_at` has them."""
    top = min(int(drafts.max(initial=0)), MAX_BLOCK)
    places = range(1, top + 1)
    had = np.array([(drafts >= place).sum() for place in places], dtype=np.float64)
    hits = np.array([((drafts >= place) & (accepted >= place)).sum() for place in places], dtype=np.float64)
    return Positions(had, hits)


def independent_rate(drafts: Counts, accepted: Counts) -> float:
    """The probability a of a draft, were they independent and alike: accepted / (accepted + rejections).

    The maximum of the likelihood; a verification sees at most one rejection, and what lies behind it was not tried.
    """
    n_accepted = float(np.minimum(accepted, drafts).clip(0).sum())
    rejections = float((accepted < drafts).sum())
    return n_accepted / (n_accepted + rejections) if n_accepted + rejections else 0.0


def expected_length(rate: float, block: int) -> float:
    """Tokens of a verification with block - 1 independent drafts: (1 - a^b) / (1 - a) (Leviathan et al. 2023)."""
    return float(block) if rate >= 1 else (1 - rate**block) / (1 - rate)


def oracle_of(timeline: Timeline) -> Oracle | None:
    """The proposer, where the outcome of every verification is known: spec=oracle under acceptance=keyed."""
    block, stride = timeline.spec.get("block"), timeline.spec.get("mismatch_stride")
    known = timeline.spec.get("name") == "oracle" and timeline.acceptance.get("name") == "keyed"
    if not known or not isinstance(block, int) or not isinstance(stride, int):
        return None
    return Oracle(block=block, mismatch_stride=stride) if 1 <= block <= MAX_BLOCK and stride >= 0 else None


def expected(timelines: Sequence[Timeline]) -> tuple[str, Array] | None:
    """What a closed form says of the acceptance by position, with its name; None without drafts.

    For the oracle the form is exact. Else a^i, as if drafts were independent with the rate of the same run: where
    the measurement departs from it, they are not.
    """
    drafts, accepted = pooled(timelines)
    n_positions = len(positions(drafts, accepted).had)
    if not n_positions:
        return None
    oracle = oracle_of(timelines[0])
    if oracle is not None:
        each = [
            pair for timeline in timelines for n_output in timeline.outputs for pair in oracle.verifications(n_output)
        ]
        wide = np.array(each, dtype=np.int64).reshape(-1, 2)
        rates = positions(wide[:, 0], wide[:, 1]).rate
        if len(rates):
            return "closed form of the oracle", rates[:n_positions]
    return "a^i, independent drafts", independent_rate(drafts, accepted) ** np.arange(1.0, n_positions + 1)
