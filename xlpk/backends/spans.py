"""Phase spans of a session: the shapes of their rings, and what lies in them once the session has ended."""

from __future__ import annotations

from typing import Any

import numpy as np

from xlpk import layout
from xlpk.trace import HOST, SPAN

LEAST = 16  # spans of a ring
_WORDS = layout.CONSTANTS["kLine"][0] // 8  # a counter's line


def span_table(teams: int, spans: int) -> dict[str, tuple[tuple[int, int], Any]]:
    """Rings of control and `teams` teams for `spans` in all, a power of two each; empty if that is 0."""
    share = max(LEAST, spans // teams)
    capacity = 1 << (share.bit_length() - 1) if spans else 0
    return {
        "spans": ((1 + teams, capacity), layout.SPAN_ENTRY.dtype),
        "span_counts": ((1 + teams, _WORDS if spans else 0), np.uint64),
    }


def read_spans(
    rings: np.ndarray[Any, Any], counts: np.ndarray[Any, Any], *, resident: bool
) -> tuple[np.ndarray[Any, Any], int]:
    """Rings as of `span_table` -> (spans [n] of trace.SPAN, oldest first by ring; how many were overwritten).

    `resident`: team 0 ran control; else the host did.
    """
    parts, lost = [], 0
    for ring, entries in enumerate(rings):
        count = int(counts[ring, 0])
        first = max(0, count - (len(entries) - 1))  # one place may hold a span that was begun and never ended
        kept = entries[np.arange(first, count) & (len(entries) - 1)]
        part = np.zeros(len(kept), SPAN)
        for name in layout.SPAN_ENTRY.dtype.names or ():
            part[name] = kept[name]
        part["team"] = ring - 1 if ring else 0 if resident else HOST
        parts.append(part)
        lost += first
    return np.concatenate(parts), lost
