"""`backend=graph`: the launches of `launched`, captured once a shape of step into a CUDA graph and replayed."""

from __future__ import annotations

import itertools
from typing import Any

from xlpk import layout
from xlpk.backend import BackendReport
from xlpk.backends.launched import LaunchedBackend, Shape

_MOVE = layout.PHASE_NAMES.index("move")


class GraphBackend(LaunchedBackend):
    """Implements xlpk.backend.Backend. A replay counts as one launch; its copies count as copies."""

    name = "graph"
    orchestration = "graph"

    def __init__(self, **options: Any) -> None:
        super().__init__(sync="step", **options)
        self._graphs: dict[Shape, tuple[Any, BackendReport]] = {}

    def _start(self) -> None:
        super()._start()
        never = {_MOVE} if self._plan.swap_pages == 0 else set()
        optional = sorted(set(layout.OPTIONAL) - never)
        for count in range(len(optional) + 1):
            for left_out in itertools.combinations(optional, count):
                for patched in (False, True):
                    self._capture(Shape(frozenset(left_out) | never, patched))
        self._report.details["graphs"] = str(len(self._graphs))

    def _capture(self, shape: Shape) -> None:
        """Instantiated before the first step: nothing is allocated later. What it records does not run."""
        from xlpk.backends import driver

        device, own = self.device, self.device.counts
        device.counts = held = BackendReport()
        try:
            with device.errors("the step could not be captured"):
                with driver.capture(device.stream.handle) as graph:
                    self._enqueue(shape)
                graph.upload(device.stream.handle)
        finally:
            device.counts = own
        self._graphs[shape] = graph, held

    def _run_shape(self, shape: Shape) -> None:
        graph, held = self._graphs[shape]
        graph.launch(self.device.stream.handle)
        counts = self.device.counts
        counts.launches += 1
        for name in ("h2d_copies", "h2d_bytes", "d2h_copies", "d2h_bytes"):
            setattr(counts, name, getattr(counts, name) + getattr(held, name))

    def _stop(self) -> bool:
        ended = super()._stop()
        if ended:
            for graph, _ in self._graphs.values():
                graph.close()
        self._graphs.clear()
        return ended
