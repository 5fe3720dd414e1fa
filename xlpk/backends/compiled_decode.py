"""The compiled control plane of a decode worker: what DecodePlane of simulated_worker.py is in Python.

A request that another loop has prefilled waits as one that was preempted; its pages come from places without number.
The loop has a slot for everybody who runs or was preempted, so slots are added as requests arrive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Tokens
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backends.compiled_plane import CompiledPlane, submission_record
from xlpk.backends.memory import aligned_zeros
from xlpk.simulator.rules import SimRequest
from xlpk.simulator.sequence import Sequence
from xlpk.simulator.step import StepPlan

_WIDE = ("tokens", "oracle")  # [slots, max_len], of which a request touches what it has


class CompiledDecodePlane(CompiledPlane):
    """Arguments as of CompiledPlane; `plan` without a swap space."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        slots, self._slot_pages = self._buffers["page_table"].shape
        self._n_adopted = self._n_places = self._longest = 0
        self._put("moves", np.zeros(len(self._buffers["pages"]), layout.MOVE.dtype))
        self._put("swap_table", np.full((slots, self._slot_pages), -1, np.int32))
        self._put("swap_free", np.zeros(slots * self._slot_pages, np.int32))

    def adopt(self, request: SimRequest, output: Tokens[int], deadline_ns: int) -> None:
        """The request waits behind `output`, which another loop has put out. `deadline_ns`: on the clock; 0: none."""
        sequence = Sequence(self._rules, request, self._n_adopted)
        sequence.tokens += output
        answers = np.array(self._answers(sequence), np.int32)
        tokens = np.array(sequence.tokens, np.int32)
        self._longest = max(self._longest, len(request.prompt) + request.max_new_tokens, len(answers))
        if not int(self._state["n_free_slots"][0]):
            self._add_slots()
        record = submission_record(request, 0, len(answers))
        record["deadline_ns"] = deadline_ns
        self._dll.xl_adopt(
            *(ctypes.c_void_p(array.ctypes.data) for array in (self._params, self._dims, record, tokens)),
            ctypes.c_int32(len(tokens)),
            ctypes.c_void_p(answers.ctypes.data),
            ctypes.c_uint64(self._n_adopted),
            ctypes.c_int32(self._n_places),
        )
        self._n_adopted += 1
        self._n_places += -(-(len(tokens) - 1) // self._rules.page_size)
        self._sequences[request.request_id] = sequence

    def round(self, now_ns: int) -> StepPlan | None:
        planned = super().round(now_ns)
        self._state["n_free_swap"] = 0  # places are used once
        return planned

    def _add_slots(self) -> None:
        """Twice as many; who has one keeps it."""
        before = len(self._buffers["slots"])
        for name in ("slots", "page_table", "page_hashes", "swap_table", *_WIDE):
            old = self._buffers[name]
            new = aligned_zeros((2 * before, *old.shape[1:]), old.dtype)
            if name in _WIDE:
                new[:before, : self._longest] = old[:, : self._longest]
            else:
                new[:before] = old
            self._put(name, new)
        self._put("swap_free", np.zeros(2 * before * self._slot_pages, np.int32))
        heap = aligned_zeros((len(self._buffers["heap"]) + before,), layout.QUEUE_ENTRY.dtype)
        heap[: len(self._buffers["heap"])] = self._buffers["heap"]
        self._put("heap", heap)
        self._put("free_slots", np.arange(before, 3 * before, dtype=np.int32))
        self._params["max_slots"] = 2 * before
        self._state["n_free_slots"] = before

    def _put(self, name: str, buffer: np.ndarray[Any, Any]) -> None:
        self._buffers[name] = buffer
        self._params[name] = buffer.ctypes.data
