"""`xlpk capacity`, and the committed results of its experiment."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from xlpk import capacity, cli
from xlpk.backends import simulate as sim
from xlpk.errors import InputError
from xlpk.fleet import MAX_FLEET, Point, columns, search

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "capacity"
SMALL = (
    "model=tiny",
    "hardware=cpu",
    "workload=poisson",
    "workload.requests=60",
    "workload.rate_per_s=400",
    "workload.text=heldout",
    "slo.ttft_ms=40",
    "slo.tpot_ms=2",
)


def point(fleet: int, enough: bool, met: float, busy: float = 0.9) -> Point:
    values: dict[str, Any] = dict.fromkeys(Point.__dataclass_fields__, 0)
    return Point(**{**values, "fleet": fleet, "enough": enough, "met_share": met, "busy_share": busy})


@pytest.mark.parametrize("takes", [1, 2, 3, 7, 8, 100, MAX_FLEET])
def test_the_search_ends_at_the_smallest_fleet(takes: int) -> None:
    tried = list(search(lambda fleet: point(fleet, fleet >= takes, fleet / takes), None))
    assert min(one.fleet for one in tried if one.enough) == takes
    assert takes == 1 or any(one.fleet == takes - 1 for one in tried)
    assert len(tried) == len({one.fleet for one in tried}) <= 21


def test_the_search_gives_up_where_more_only_idle() -> None:
    tried = list(search(lambda fleet: point(fleet, False, 0.4, 1 / fleet), None))
    assert [one.fleet for one in tried] == [1, 2, 4, 8, 16, 32]
    assert [one.fleet for one in search(lambda fleet: point(fleet, False, 0), [3, 5])] == [3, 5]


def test_sizes_are_read_and_refused() -> None:
    assert capacity.fleets("1,2,4-6,5") == [1, 2, 4, 5, 6]
    assert capacity.fleets(None) is None
    for text in ("0", "", "4-2", "1-2000", "a", "1,,2", "-3"):
        with pytest.raises(InputError, match="--fleet="):
            capacity.fleets(text)


def answered(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> tuple[int, dict[str, Any], Path]:
    code = cli.main(["capacity", *SMALL, f"run.outputs={tmp_path}", *words])
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    return code, last, Path(last["folder"])


def test_a_fleet_is_found_and_the_folder_says_of_what(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").symlink_to(ROOT / "outputs" / "cache")
    code, last, folder = answered(capsys, tmp_path)
    assert (code, last["smallest"]) == (0, json.loads((folder / "capacity.json").read_text())["smallest"])
    rows = list(csv.DictReader((folder / "capacity.csv").open()))
    assert {int(row["fleet"]): row["enough"] == "True" for row in rows}[last["smallest"]]
    assert int(rows[0]["requests"]) == 60
    assert OmegaConf.load(folder / "config.yaml").backend.name == "simulated"
    assert "uncalibrated costs of hardware=cpu" in json.loads((folder / "capacity.json").read_text())["verdict"]
    # Options between overrides; nothing meets a microsecond.
    code, last, _ = answered(capsys, tmp_path, "--fleet", "1,3", "slo.ttft_ms=0.001")
    assert (code, last["smallest"]) == (1, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["backend=cpu"], "backend=cpu: simulated"),
        pytest.param(*(["slo.ttft_ms=null", "slo.tpot_ms=null"], "slo=null: at least one of"), marks=pytest.mark.heavy),
        pytest.param(*(["--good", "1.5"], "--good=1.5: above 0, at most 1"), marks=pytest.mark.heavy),
        pytest.param(*(["--router", "random"], "--router=random: one of round_robin"), marks=pytest.mark.heavy),
        (["--affinity-blocks", "0"], "--affinity-blocks=0: 1 to"),
        pytest.param(*(["--fleet", "none"], "--fleet=none: sizes"), marks=pytest.mark.heavy),
        pytest.param(
            *(["backend.prefill_workers=1", "backend.decode_workers=1"], "backend.prefill_workers=1: 0 with"),
            marks=pytest.mark.heavy,
        ),
        pytest.param(*(["kv.pressure=0.5"], "kv.pressure=0.5: null with"), marks=pytest.mark.heavy),
        pytest.param(*(["mode=mega_kernel_sim"], "mode=mega_kernel_sim: another one"), marks=pytest.mark.heavy),
        pytest.param(*(["workload.rate=3"], "workload.rate=3"), marks=pytest.mark.heavy),
        (["--typo", "x=y"], "unrecognized arguments: --typo"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["capacity", *SMALL, f"run.outputs={tmp_path}", *words])
    except SystemExit as leaving:  # argparse
        code = int(str(leaving.code))
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err


def test_a_trace_keeps_lengths_times_and_shared_blocks(tmp_path: Path) -> None:
    """Made prompts share what the trace's reader makes them share, token for token as far as equality goes."""
    from types import SimpleNamespace

    from xlpk.kv import KVPlan
    from xlpk.workload.trace import Trace

    lines = [
        {"timestamp": 500, "input_length": 40, "output_length": 4, "hash_ids": [7, 8, 9]},
        {"timestamp": 0, "input_length": 48, "output_length": 900, "hash_ids": [7, 8, 5]},
        {"timestamp": 800, "input_length": 20, "output_length": 4, "priority": 2},
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    workload, plan = Trace(file=str(file), block_size=16, scale=2.0), KVPlan(64, 16, 1, "bf16", 512)
    made, notes = columns(SimpleNamespace(workload=workload), None, plan)  # type: ignore[arg-type]
    assert made.arrival_ns.tolist() == [0, 1_000_000_000, 1_600_000_000]
    assert made.table["prompt_len"].tolist() == [48, 40, 20]
    assert made.table["max_new_tokens"].tolist() == [464, 4, 4]
    assert made.table["priority"].tolist() == [0, 0, 2]
    assert "capped for 1 of 3" in notes[0]
    stream = workload.stream(SimpleNamespace(config=SimpleNamespace(vocab_size=5000)), plan)  # type: ignore[arg-type]
    assert [len(prompt) for prompt in stream.prompts] == made.table["prompt_len"].tolist()
    shared = [next(i for i, (a, b) in enumerate(zip(*stream.prompts[:2], strict=False)) if a != b)]
    assert shared == [32]  # so the second finds two pages of 16
    from kinds import CACHE

    from xlpk.backends.memory import Limits
    from xlpk.costs import StepCosts

    done = sim.simulate(CACHE, made, StepCosts(fixed_ns=1000.0).record(), plan, Limits(4, 64, 64))
    assert done.outcomes["n_cached"].tolist() == [0, 32, 0]


# ------------------------------------------------------------------------------------------ the committed results


@pytest.fixture(scope="module")
def figure() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("capacity_figure", FOLDER / "figure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_page_shows_the_results(figure: ModuleType) -> None:
    rows = figure.read()
    page = (FOLDER / "README.md").read_text()
    assert figure.table(rows) in page
    assert set(rows) == set(figure.STYLES)
    config = OmegaConf.load(ROOT / "conf" / "experiment" / "capacity.yaml")
    assert (config.slo.ttft_ms, config.slo.tpot_ms) == (figure.TTFT_MS, figure.TPOT_MS)
    found = figure.smallest(rows)
    assert found["prefix_affinity, 6 blocks"] < found["least_outstanding"] < found["round_robin"]
    for each in rows.values():
        assert [int(row["fleet"]) for row in each] == list(range(1, 17))
        for row in each:
            share = float(row["met_share"])
            assert share == pytest.approx(
                float(row["goodput_per_s"]) * float(row["span_s"]) / int(row["requests"]), 1e-4
            )
            both = [float(row[f"{name}_met_share"]) for name in ("ttft", "tpot")]
            assert sum(both) - 1 - 1e-5 <= share <= min(both) + 1e-5
            assert (row["enough"] == "True") == (min(both) >= 0.99)
            assert (row["enough"] == "True") == (
                float(row["ttft_ms_p99"]) <= figure.TTFT_MS and float(row["tpot_ms_p99"]) <= figure.TPOT_MS
            )
    assert (FOLDER / "results" / "capacity.png").stat().st_size < 200_000


def test_the_trace_is_what_its_page_says(figure: ModuleType) -> None:
    rows = [json.loads(line) for line in (FOLDER / "results" / "trace.jsonl").read_text().splitlines()]
    assert len(rows) == 5000
    assert round(np.mean([row["input_length"] for row in rows])) == 4927
    assert round(np.mean([row["output_length"] for row in rows])) == 302
    seen: set[int] = set()
    again = total = 0
    for row in rows:
        again += sum(number in seen for number in row["hash_ids"])
        total += len(row["hash_ids"])
        seen.update(row["hash_ids"])
    assert round(again / total, 2) == 0.68
    config = OmegaConf.load(ROOT / "conf" / "experiment" / "capacity.yaml")
    span_s = rows[-1]["timestamp"] / 1e3 * config.workload.scale
    assert round(len(rows) / span_s, 1) == figure.ARRIVALS_PER_S
