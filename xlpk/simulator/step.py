"""A step of the simulated loop: what it was planned to be, and the record that its commit completes."""

from __future__ import annotations

from dataclasses import dataclass

from xlpk import layout

RECORD_FIELDS = tuple(name for name, _, _ in layout.STEP_RECORD.fields if name != "phase_ns")


@dataclass(slots=True)
class StepPlan:
    """The fields of layout.STEP_RECORD, of which the commit fills the last ones, and `n_filter_rows`."""

    step: int = 0
    begin_ns: int = 0
    n_rows: int = 0
    n_prefill_rows: int = 0
    n_decode_rows: int = 0
    n_draft_rows: int = 0
    n_sample_rows: int = 0
    n_filter_rows: int = 0  # sampled rows that take the filter phase
    n_prefill: int = 0
    n_decode: int = 0
    n_waiting: int = 0
    n_preempted: int = 0
    n_recomputed_rows: int = 0
    n_preemptions: int = 0
    n_moves: int = 0
    n_evictions: int = 0
    pages_total: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    pages_active: int = 0
    pages_draft: int = 0
    pages_locked: int = 0
    pages_pinned: int = 0
    context_tokens: int = 0
    attended_tokens: int = 0
    end_ns: int = 0  # from here on: the commit's
    n_accepted: int = 0
    n_tokens: int = 0
    n_finished: int = 0
    live_tokens: int = 0
    live_pages: int = 0

    def record(self) -> dict[str, int]:
        """The StepRecord of a committed step, without `phase_ns`."""
        return {name: getattr(self, name) for name in RECORD_FIELDS}
