"""A report holds what the runs measured, opens without a network, and survives whatever a run folder holds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import MS, oracle_log, run_folder, sweep

from xlpk import (
    acceptance,
    compare,
    metrics,
    plot_style,
    plots,
    record,
    report_figures,
    report_page,
    report_sections,
    rundata,
)
from xlpk.errors import InputError

VOID = {"meta", "link", "br", "img", "use", "path", "rect"}


class Page(HTMLParser):
    """Checks that elements nest; collects ids, what would be fetched, and the cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID or tag in ("path", "rect", "use"):
            self.open.append(tag)
        self._look(attrs)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look(attrs)

    def _look(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            elif name in ("src", "href", "xlink:href", "action") and not str(value).startswith("#"):
                self.fetched.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a sweep with repetitions, a point that failed, one that was refused, one that never began."""
    root = tmp_path_factory.mktemp("sweep")
    sweep(
        root, {"2": [100.0, 101, 99, 100, 102], "4": [120.0, 119, 121, 120, 500], "<b>&|": [50.0, 50.6, 49.4, 50, 51]}
    )
    run_folder(root / "15", ["spec.block=99"], status="REFUSED", log=[])
    status = json.loads((root / "15/status.json").read_text())
    (root / "15/status.json").write_text(json.dumps({**status, "error": "spec.block=99: at most 16"}))
    (root / "16").mkdir()
    return report_page.write_report([root], root / "out").parent


def test_the_page_is_whole_and_needs_no_network(report: Path) -> None:
    text = (report / "report.html").read_text()
    page = Page(text)
    assert not page.fetched
    assert "url(http" not in text
    assert "@import" not in text
    repeated = {name for name in page.ids if page.ids.count(name) > 1}
    assert not {name for name in repeated if not re.match(r"[a-z]+-[a-z]*[0-9a-f]{10,}", name)}, (
        "hashes of equal shapes"
    )
    assert text.count("<svg") == len(list((report / "figures").iterdir())) == 6
    for figure in (report / "figures").iterdir():
        ElementTree.parse(figure)
    markdown = (report / "report.md").read_text()
    named = re.findall(r"\]\((figures/[a-z]+\.svg)\)", markdown)
    assert sorted(named) == sorted(f"figures/{path.name}" for path in (report / "figures").iterdir())


def test_the_page_says_what_was_measured(report: Path) -> None:
    cells = Page((report / "report.html").read_text()).cells
    assert "5 of 5" in cells
    assert "0 of 1" in cells
    assert any(cell.startswith("120.0†\n[") for cell in cells)
    assert any(cell.startswith("slower by 2.000x\n(95 % interval ") for cell in cells)
    assert any(cell.startswith("no difference shown") for cell in cells)
    assert "spec.block=99: at most 16" in " ".join(cells)
    assert "an empty folder: the point never began" in cells
    assert "<b>&|" in cells, "shown as text"


def test_markdown_tables_keep_their_columns(report: Path) -> None:
    rows = [line for line in (report / "report.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert any("\\<b\\>&amp;\\|" in row for row in rows)
    tables = re.findall(r"(?:^\|.*\n)+", (report / "report.md").read_text(), re.M)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from xlpk import cli

    monkeypatch.setattr(plot_style, "render", lambda name, draw, *args: "<svg></svg>")
    monkeypatch.chdir(tmp_path)
    for name, rate in (("a", 100.0), ("b", 80.0)):
        run_folder(tmp_path / "runs" / name, sweep_id=None, throughput__tokens_per_s=rate)
    both = ["report", "runs/a", "runs/b"]
    slower = "throughput/tokens_per_s < 0.9x"
    assert cli.main(both) == 0
    assert list((tmp_path / "reports").iterdir())
    assert cli.main([*both, "--fail-if", slower, "-o", "out"]) == 1
    out = capsys.readouterr().out
    assert out.count("failed: ") == 1
    assert "0.8000x" in out
    assert "against A: a" in out
    assert "0.800x (one run: no interval)" in out
    assert "failed" in (tmp_path / "out/report.md").read_text()
    assert cli.main([*both, "--fail-if", slower, "--certain"]) == 0
    assert cli.main([*both, "--fail-if", "throughput/tokens_per_s < 0.7x"]) == 0
    for bad in (["--fail-if", "nonsense"], ["--fail-if", "no/metric > 1x"], ["-o", "/proc/self/nothing"]):
        assert cli.main([*both, *bad]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["report", "nowhere"]) == 2
    assert cli.main(["report", str(tmp_path)]) == 2


def test_nothing_heavy_is_imported_before_a_report_is_made() -> None:
    code = "import sys, xlpk.cli, xlpk.report_page; assert not {'matplotlib', 'jinja2', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_oracle_is_what_its_closed_form_says() -> None:
    """The log is that of `Oracle.verifications`; counted, it must give the form's curve and metrics' own figures."""
    events = oracle_log(block=8, stride=4, n_output=50)
    run = rundata.RunData(Path(), "FINISHED")
    timeline = _timeline(events)
    name, rates = acceptance.expected([timeline]) or ("", np.zeros(0))
    assert "oracle" in name
    drafts, accepted = acceptance.pooled([timeline])
    assert acceptance.positions(drafts, accepted).rate.tolist() == rates.tolist()
    measured = metrics.compute(events)
    assert [measured[f"spec/acceptance_at.{i}"] for i in range(1, 8)] == pytest.approx(rates.tolist())
    assert not run.problems


def _timeline(events: list[dict[str, Any]]) -> rundata.Timeline:
    from xlpk.event_log import Log

    return rundata._timeline(Log(events))


def test_independent_drafts_follow_the_formula() -> None:
    rng = np.random.default_rng(0)
    rate, block = 0.7, 5
    hits = rng.random((200_000, block - 1)) < rate
    accepted = np.cumprod(hits, axis=1).sum(axis=1)
    drafts = np.full(len(hits), block - 1)
    assert acceptance.independent_rate(drafts, accepted) == pytest.approx(rate, abs=0.003)
    by_place = acceptance.positions(drafts, accepted).rate
    assert by_place == pytest.approx([rate**i for i in range(1, block)], abs=0.005)
    assert 1 + accepted.mean() == pytest.approx(acceptance.expected_length(rate, block), abs=0.01)
    assert acceptance.expected_length(1.0, 4) == 4


def test_the_steady_state_leaves_prompts_and_slow_steps_out() -> None:
    events = oracle_log(block=1, stride=0, n_output=300, slow=[*range(2, 42), 200])
    found = report_figures.steadiness(_timeline(events))
    assert found is not None
    assert (found.n_steps, found.n_decode) == (300, 299)
    assert found.steady == 41  # the prompt's step and forty slow ones
    assert (found.steady_p50_ms, found.n_slow, found.slowest_ms) == (1.0, 1, 10.0)


def test_a_dead_process_is_told_from_a_running_one(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a", status="RUNNING")
    status = json.loads((folder / "status.json").read_text())
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    (folder / "status.json").write_text(json.dumps({**status, "pid": done.pid}))
    assert rundata.read(folder).status == "FAILED"
    import os

    (folder / "status.json").write_text(json.dumps({**status, "pid": os.getpid()}))
    assert rundata.read(folder).status == "RUNNING"


def test_damaged_records_are_counted_and_left_out(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a")
    path = folder / record.EVENTS
    lines = path.read_text().splitlines()
    lines[5] = lines[5][:20]
    lines[6] = '{"event":"step","step":3}'
    path.write_text("\n".join(lines))
    run = rundata.read(folder)
    assert rundata.timeline(run) is not None
    assert run.problems == ["events.jsonl: 2 damaged records left out"]


@pytest.mark.parametrize("junk", ["text", [1], {"a": 1}, True, float("nan"), float("inf"), 10**400, None])
def test_metrics_that_are_no_numbers_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, junk: object
) -> None:
    root = sweep(tmp_path, {"2": [100.0, 101], "4": [120.0, 119]})
    path = root / "0" / record.METRICS
    path.write_text(json.dumps(dict.fromkeys(record.read_json(path), junk)))
    monkeypatch.setattr(plot_style, "render", lambda name, draw, *args: "<svg></svg>")
    [results] = [section for section in sections_of(root) if section.title == "Results"]
    rates = next(row for row in results.tables[0].rows if row[0] == "tokens/s")
    assert rates[1] == "101.0", "of the other repetition"


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "$x^", "_a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    sweep(root, {"2": [100.0, 101], "4": [120.0, 119]})
    return root


def damage(data: st.DataObject, root: Path) -> None:
    """Bytes cut out and put in, a file gone, or a value of a JSON object replaced."""
    folder = root / data.draw(st.sampled_from("0123"))
    path = folder / data.draw(st.sampled_from(record.FILES))
    kind = data.draw(st.sampled_from(["bytes", "gone", "value", "event"]))
    if not path.exists():
        return
    if kind == "gone":
        path.unlink()
    elif kind == "bytes":
        content = path.read_bytes()
        at, count = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 200))
        path.write_bytes(content[:at] + data.draw(st.binary(max_size=20)) + content[at + count :])
    elif kind == "value" and path.suffix == ".json":
        value = record.read_json(path)
        if value:
            value[data.draw(st.sampled_from(sorted(value)))] = data.draw(JUNK)
            path.write_text(json.dumps(value))
    elif kind == "event":
        path = folder / record.EVENTS
        lines = path.read_bytes().splitlines() if path.exists() else []
        if lines:
            at = data.draw(st.integers(0, len(lines) - 1))
            try:
                event = json.loads(lines[at])
            except ValueError:
                return
            event[data.draw(st.sampled_from(sorted(event)))] = data.draw(JUNK)
            lines[at] = json.dumps(event, separators=(",", ":")).encode()
            path.write_bytes(b"\n".join(lines))


def sections_of(root: Path) -> list[report_sections.Section]:
    return report_sections.build(compare.group(rundata.find([root])), [])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_damage_stops_a_report(good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("damaged") / "sweep"
    shutil.copytree(good, root)
    for _ in range(data.draw(st.integers(1, 4))):
        damage(data, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot_style, "render", lambda name, draw, *args: "<svg></svg>")
        assert sections_of(root)


@pytest.mark.heavy
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_damage_stops_a_report_with_its_figures(
    good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("damaged") / "sweep"
    shutil.copytree(good, root)
    for _ in range(data.draw(st.integers(1, 4))):
        damage(data, root)
    Page(report_page.write_report([root], root / "out").read_text())


@pytest.mark.parametrize("n_output", [1, 2, 3])
def test_the_shortest_runs_are_drawn(tmp_path: Path, n_output: int) -> None:
    root = run_folder(tmp_path / "a", log=oracle_log(n_output=n_output), sweep_id=None)
    Page(report_page.write_report([root], tmp_path / "out").read_text())


def test_a_log_without_a_device_clock_is_drawn_by_the_hosts(tmp_path: Path) -> None:
    events = [event for event in oracle_log() if event["event"] != "clock"]
    events = [{key: value for key, value in event.items() if key != "device_ns"} for event in events]
    timeline = _timeline(events)
    assert timeline.clock == "host"
    assert timeline.itl_ms.sum() == pytest.approx((events[-1]["host_ns"] - 2 * MS) / MS)


def test_many_configurations_are_not_all_drawn(tmp_path: Path) -> None:
    sweep(tmp_path, {str(n): [100.0 + (n * 37) % 20] for n in range(1, 21)})
    made = compare.group(rundata.find([tmp_path]))
    chosen = plots.choose(made)
    assert len(chosen) == plots.MAX_DRAWN
    rates = [one.values("throughput/tokens_per_s")[0] for one in made]
    drawn = [one.values("throughput/tokens_per_s")[0] for one in chosen]
    assert chosen[0] is made[0]
    assert (min(rates), max(rates)) == (min(drawn), max(drawn))


def test_an_argument_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(InputError, match="RUN_OR_SWEEP"):
            rundata.find([place])
