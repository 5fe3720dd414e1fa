"""What a traced session records: phases of every team in every step, and the same tokens as untraced."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drive
import kinds
import numpy as np
import pytest
import trace_format

from xlpk import layout, record, trace_file
from xlpk.backends.spans import span_table
from xlpk.kv import KV, KVPlan
from xlpk.layout import TraceKind
from xlpk.model import Model, load_model
from xlpk.trace import HOST
from xlpk.trace_events import CONTROL, REQUESTS, TEAMS
from xlpk.workload import Request

TEAMS_USED = 3
CONTROL_PHASE = layout.PHASE_NAMES.index("control")
REQUESTED = [
    Request(i, (5, 6, 7, 8 + i), 12, ignore_eos=True, seed=i, temperature=0.7, top_k=5 if i == 2 else 0)
    for i in range(5)
]


@dataclass
class Traced:
    """A closed session, its steps in order, and its spans by (team, step)."""

    backend: Any
    result: drive.Result
    spans: np.ndarray[Any, Any]
    lost: int

    @property
    def steps(self) -> list[dict[str, int]]:
        return [{**step.values, "step": step.step, "phase_ns": step.phase_ns} for step in self.result.steps]

    def of(self, team: int, step: int) -> np.ndarray[Any, Any]:
        """Of its forward phases, in order of time."""
        mine = self.spans[(self.spans["team"] == team) & (self.spans["step"] == step)]
        return np.sort(mine[mine["phase"] != CONTROL_PHASE], order=["begin_ns", "end_ns"])


def session(model: Model, *, trace: bool = True, spans: int = 1 << 16, **options: Any) -> Traced:
    """Three teams, and requests that are all there before the first is done."""
    backend = kinds.make(threads=TEAMS_USED, trace=trace, spans=spans, max_num_seqs=4, max_step_rows=24, **options)
    plan = KVPlan.make(KV(budget="64pages"), model.config, model.weights.dtype, 256)
    try:
        backend.open(model, plan)
        result = drive.finish(backend, REQUESTED)
    finally:
        backend.close()
    return Traced(backend, result, *backend.spans())


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("tiny")


ORCHESTRATIONS = ["cpu-persistent", "cpu-launched", *kinds.HEAVY_GPU]


@pytest.fixture(scope="module", params=ORCHESTRATIONS)
def traced(request: pytest.FixtureRequest, model: Model) -> Any:
    kind, _, orchestration = request.param.partition("-")
    with kinds.on(kind):
        yield session(model, orchestration=orchestration or "persistent")


def test_every_team_has_every_phase_of_every_step_once(traced: Traced, model: Model) -> None:
    sequence = layout.phase_sequence(model.config.num_hidden_layers)
    assert traced.lost == 0
    filtered = {bool(entry["n_filter_rows"]) for entry in step_plans(traced)}
    assert filtered == {True, False}, "the request with top_k runs in some steps only"
    with_filter = {entry["step"]: bool(entry["n_filter_rows"]) for entry in step_plans(traced)}
    for step in traced.steps:
        left_out = {layout.PHASE_NAMES.index("move")}
        if not with_filter[step["step"]]:
            left_out.add(layout.PHASE_NAMES.index("filter"))
        expected = [(phase, layer) for phase, layer in sequence if phase not in left_out]
        for team in range(TEAMS_USED):
            mine = traced.of(team, step["step"])
            assert list(zip(mine["phase"].tolist(), mine["layer"].tolist(), strict=True)) == expected


def step_plans(traced: Traced) -> list[dict[str, int]]:
    """Steps with the number of their filtered rows: those of request 2, from its last prompt row to its end."""
    out, number, rows = [], 0, 0
    for entry in traced.backend.decisions():
        if entry["kind"] == TraceKind.ROWS and entry["value"] == 2:
            rows = 1
        if entry["kind"] == TraceKind.STEP:
            out.append({"step": int(entry["value"]), "n_filter_rows": rows})
            rows = 0
            number += 1
    assert number == len(traced.steps)
    return out


def test_spans_of_a_team_do_not_overlap_and_lie_in_their_step(traced: Traced) -> None:
    steps = {step["step"]: step for step in traced.steps}
    for team in {HOST, *range(TEAMS_USED)}:
        mine = np.sort(traced.spans[traced.spans["team"] == team], order=["begin_ns", "end_ns"])
        assert (mine["begin_ns"] <= mine["end_ns"]).all()
        assert (mine["end_ns"][:-1] <= mine["begin_ns"][1:]).all()
        if kinds.real_driver() and traced.backend.orchestration in ("launched", "graph"):
            continue  # a clock of the device's own
        for span in mine[mine["phase"] != CONTROL_PHASE]:
            step = steps[int(span["step"])]
            assert step["begin_ns"] <= span["begin_ns"]
            assert span["end_ns"] <= step["end_ns"]


def test_nobody_begins_before_all_have_ended(traced: Traced) -> None:
    """Between two phases there is a barrier: spans begin behind it, and end in front of it."""
    barriers = 0
    for step in traced.steps:
        teams = [traced.of(team, step["step"]) for team in range(TEAMS_USED)]
        last_end = np.max([mine["end_ns"] for mine in teams], axis=0)
        first_begin = np.min([mine["begin_ns"] for mine in teams], axis=0)
        assert (last_end[:-1] <= first_begin[1:]).all()
        barriers += len(last_end) - 1
    assert barriers > 100


def test_team_0_agrees_with_the_times_of_phases(traced: Traced) -> None:
    """What a step record says of a phase runs from in front of each span of team 0 to behind the barrier after it."""
    if kinds.real_driver():
        pytest.skip("phases are timed by a counter of the multiprocessor, spans by the global timer")
    controls = traced.spans[traced.spans["phase"] == CONTROL_PHASE]
    row = np.sort(np.concatenate([traced.spans[traced.spans["team"] == 0], controls[controls["team"] == HOST]]))
    row = row[np.argsort(row["begin_ns"], kind="stable")]
    for step in traced.steps:
        for phase, name in enumerate(layout.PHASE_NAMES[:CONTROL_PHASE]):
            (at,) = np.nonzero((row["step"] == step["step"]) & (row["phase"] == phase))
            if not len(at):
                assert step["phase_ns"][name] == 0
                continue
            least = int((row["end_ns"][at] - row["begin_ns"][at]).sum())
            most = int((row["begin_ns"][at + 1] - row["end_ns"][at - 1]).sum())
            assert 0 < least <= step["phase_ns"][name] <= most


def test_control_has_a_span_a_round_that_plans_or_commits(traced: Traced) -> None:
    resident = traced.backend.orchestration == "persistent"
    controls = np.sort(traced.spans[traced.spans["phase"] == CONTROL_PHASE], order=["begin_ns"])
    assert set(controls["team"].tolist()) == {0 if resident else HOST}
    planned = [step["step"] for step in traced.steps]
    assert sorted(set(controls["step"].tolist())) == planned
    together = 0
    for before, step in itertools.pairwise(traced.steps):
        if before["end_ns"] != step["begin_ns"]:
            continue  # rounds that found nothing to do were in between: they have time, and no span
        together += 1
        (span,) = controls[controls["step"] == step["step"]][:1]
        assert span["begin_ns"] <= step["begin_ns"] <= span["end_ns"]
        assert 0 < step["phase_ns"]["control"] <= span["end_ns"] - span["begin_ns"]
    assert together > len(traced.steps) // 2


def test_a_trace_changes_no_token(traced: Traced, model: Model, request: pytest.FixtureRequest) -> None:
    kind, _, orchestration = request.node.callspec.params["traced"].partition("-")
    with kinds.on(kind):
        plain = session(model, trace=False, spans=0, orchestration=orchestration or "persistent")
    assert plain.result.tokens == traced.result.tokens
    assert (len(plain.spans), len(plain.backend.decisions())) == (0, 0)
    assert len(traced.backend.decisions()) > len(traced.steps)
    assert traced.backend.lost_decisions == 0


def test_decisions_are_complete(traced: Traced) -> None:
    """Each request is seen, admitted and finished once, and each step of the records was planned."""
    decisions = traced.backend.decisions()
    for kind in (TraceKind.SEEN, TraceKind.ADMIT, TraceKind.FINISH):
        assert sorted(decisions["value"][decisions["kind"] == kind].tolist()) == [
            request.request_id for request in REQUESTED
        ]
    planned = decisions["value"][decisions["kind"] == TraceKind.STEP].tolist()
    assert planned == [step["step"] for step in traced.steps]


def test_a_planner_of_its_own_has_spans_beside_the_steps(model: Model) -> None:
    with kinds.on("cpu"):
        made = session(model, orchestration="persistent", planner="team")
    planner = made.spans[made.spans["team"] == TEAMS_USED]
    assert set(planner["phase"].tolist()) == {CONTROL_PHASE}
    assert sorted(planner["step"].tolist()) == [step["step"] for step in made.steps]
    for step in made.steps:
        assert all(len(made.of(team, step["step"])) == len(made.of(0, step["step"])) > 0 for team in range(TEAMS_USED))
        (mine,) = planner[planner["step"] == step["step"]]
        assert step["begin_ns"] <= mine["begin_ns"] <= mine["end_ns"] <= step["end_ns"]


def test_spans_go_on_after_a_lease(model: Model) -> None:
    """A launch that leaves and is entered again goes on in its rings."""
    with kinds.on("cpu"):
        made = session(model, orchestration="persistent", lease_s=0.001)
    assert made.backend.close().launches > 1
    for team in range(TEAMS_USED):
        mine = made.spans[made.spans["team"] == team]
        assert sorted(set(mine["step"].tolist())) == [step["step"] for step in made.steps]
    assert len(made.spans[made.spans["phase"] == layout.PHASE_NAMES.index("embed")]) == TEAMS_USED * len(made.steps)


@pytest.mark.parametrize("orchestration", ["persistent", "launched"])
def test_the_last_spans_are_kept(model: Model, orchestration: str) -> None:
    small = TEAMS_USED * 64
    with kinds.on("cpu"):
        made = session(model, spans=small, orchestration=orchestration)
    capacity = span_table(TEAMS_USED, small)["spans"][0][1]
    assert capacity == 64
    per_step = len(layout.phase_sequence(model.config.num_hidden_layers)) - 2
    filtered = sum(bool(entry["n_filter_rows"]) for entry in step_plans(made))
    written = per_step * len(made.steps) + filtered
    assert written > capacity
    control = made.spans[made.spans["phase"] == CONTROL_PHASE]
    assert made.lost == TEAMS_USED * (written - (capacity - 1)), "control's ring is not full"
    assert len(control) < capacity - 1
    for team in range(TEAMS_USED):
        mine = made.spans[(made.spans["team"] == team) & (made.spans["phase"] != CONTROL_PHASE)]
        assert len(mine) == capacity - 1
        assert mine["step"].max() == made.steps[-1]["step"]


def test_a_run_leaves_a_timeline(tmp_path: Path) -> None:
    """From the command line, with evictions and preemptions, which show; `xlpk trace` makes the same again."""
    (tmp_path / "outputs").mkdir()
    kinds.CACHE.mkdir(parents=True, exist_ok=True)
    (tmp_path / "outputs" / "cache").symlink_to(kinds.CACHE)
    arguments = ["mode=kv_pressure", "kv.pressure=0.3", "kv.preemption=swap", "workload.requests=10", "run.trace=on"]
    arguments += ["tracking=none", "backend.threads=2"]
    command = [sys.executable, "-m", "xlpk.run", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{trace_file.TRACE} at {trace_file.VIEWER}" in done.stdout
    (folder,) = (tmp_path / "outputs" / "runs").glob("*/*")
    assert {place.name for place in folder.iterdir()} == {*record.FILES, *record.TRACES}
    assert np.load(folder / trace_file.DECISIONS).dtype == layout.TRACE_ENTRY.dtype
    events = trace_format.read(folder / trace_file.TRACE)
    steps = [e for e in trace_format.row(events, CONTROL, "steps") if e["ph"] == "X"]
    log = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert len(steps) == sum(one["event"] == "step" for one in log)
    assert all(len(step["args"]["rows"]) > 0 for step in steps)
    rows = {name: trace_format.row(events, CONTROL, name) for name in ("decisions", "pages", "swap")}
    names = {name: {event["name"] for event in row} for name, row in rows.items()}
    assert {"round", "seen", "admit", "resume", "preempt", "commit", "finish"} <= names["decisions"]
    assert {"alloc", "release", "publish", "evict"} <= names["pages"]
    assert names["swap"] == {"swap out", "swap in"}
    assert len([e for e in events if e["ph"] == "X" and e["pid"] == TEAMS]) == len(np.load(folder / trace_file.SPANS))
    parts = {event["name"] for event in events if event["ph"] == "X" and event["pid"] == REQUESTS}
    assert {"waiting", "prefill", "decode", "preempted"} <= parts
    tokens = [e for e in events if e["ph"] == "i" and e["pid"] == REQUESTS]
    assert sum(len(e["args"]["tokens"]) for e in tokens) == sum(one["event"] == "token" for one in log)
    (folder / trace_file.TRACE).rename(tmp_path / "first")
    again = subprocess.run([sys.executable, "-m", "xlpk.cli", "trace", str(folder)], capture_output=True, check=False)
    assert again.returncode == 0
    assert trace_format.read(folder / trace_file.TRACE) == events


def test_a_peer_has_no_trace(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xlpk.run", "backend=hf", "run.trace=on", "tracking=none", "mode=serial_decode"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("xlpk: run.trace")
    assert "backend=hf" in line
