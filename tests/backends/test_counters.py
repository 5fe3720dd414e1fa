"""What the GPU backends count of their own calls is what reached the driver: compared with the stand-in's counters."""

from __future__ import annotations

import pytest
from drive import finish
from kinds import GPU, make, on
from standin.library import counters
from standin.session import on_standin, run_body

from xlpk.kv import KV, KVPlan
from xlpk.model import load_model
from xlpk.workload import Request


@pytest.mark.heavy
@on_standin()
def test_counts_of_a_session_are_those_of_the_driver() -> None:
    model = load_model("tiny")
    plan = KVPlan.make(KV(budget="64pages"), model.config, model.weights.dtype, 512)
    requests = [Request(i, (1, 2, 3 + i), 12, ignore_eos=True, top_k=5 * i) for i in range(3)]
    for kind in GPU:
        with on(kind):
            stays = {"lease_s": 0.0, "idle_s": 0.0} if kind == "persistent" else {}  # launches are counted
            backend = make(max_num_seqs=4, max_step_rows=16, prefill_chunk=8, **stays)
            backend.open(model, plan)
            opened = counters()
            result = finish(backend, requests)
            called = {name: value - opened[name] for name, value in counters().items()}
            report = backend.close()
        assert len(result.steps) >= 12
        if kind == "persistent":  # launched when it was opened
            assert (report.launches, opened["launches"], called["launches"]) == (1, 1, 0)
        else:
            assert report.launches == called["launches"] + called["graph_launches"] > 0
            assert called["graph_launches"] == (len(result.steps) if kind == "graph" else 0)
        for name in ("h2d_copies", "d2h_copies", "h2d_bytes", "d2h_bytes"):
            assert (getattr(report, name), name) == (called[name], name)
        assert report.syncs == called["waits"] + 1  # one more in close
        resident = {name: value for name, value in counters().items() if name.startswith("resident_")}
        assert not any(resident.values()), resident


if __name__ == "__main__":
    run_body()
