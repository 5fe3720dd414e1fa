"""The GPU suite's own machinery: time that is shared out, jobs that are cut off, jobs that lost the device."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SUITE = Path(__file__).parents[2] / "experiments" / "gpu_suite" / "run.py"
ABOUT = {"device": "a device", "uuid": "GPU-1", "commit": "c", "driver_cuda": [13, 0], "date": "d"}


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_suite_run", SUITE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_suite_run", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "LEAST_S", 0.2)
    monkeypatch.setattr(module, "machine", lambda: dict(ABOUT))
    return module


def job(suite: ModuleType, name: str, code: str, deadline_s: float = 30.0, resume: str = "") -> Any:
    return suite.Job(name, [sys.executable, "-c", code], deadline_s, suite.lines, resume)


def run(suite: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, jobs: list[Any], *arguments: str) -> Any:
    """The jobs of suite.json after one call."""
    monkeypatch.setattr(suite, "jobs", lambda _: jobs)
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(out), *arguments])
    suite.main()
    return json.loads((out / "suite.json").read_text())["jobs"]


def test_time_that_is_left_is_a_jobs_deadline(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was cut off is run again by the next call, what has ended is not, what got no time is begun."""
    out = tmp_path / "out"
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    jobs = [job(suite, "quick", count), job(suite, "slow", "import time; time.sleep(100)"), job(suite, "late", "")]
    found = run(suite, monkeypatch, out, jobs, "--seconds", "4")
    assert found["quick"]["exit_code"] == 0
    assert found["slow"]["exit_code"] == -9
    assert found["slow"]["cut"]
    assert found["slow"]["seconds"] < 30
    assert "late" not in found
    jobs[1] = job(suite, "slow", "print('done')")
    found = run(suite, monkeypatch, out, jobs)
    assert (tmp_path / "count").read_text() == "x"
    assert found["slow"]["result"] == ["done"]
    assert "cut" not in found["slow"]
    assert found["late"]["exit_code"] == 0


def test_its_own_deadline_is_a_result(suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs = [job(suite, "slow", "import time; time.sleep(100)", deadline_s=0.5)]
    found = run(suite, monkeypatch, tmp_path / "out", jobs)
    assert found["slow"]["exit_code"] == -9
    assert "cut" not in found["slow"]
    assert any("killed after" in line for line in found["slow"]["said"])


LOSES_TWICE = """
import sys
from pathlib import Path
file = Path({file!r})
tries = [*(file.read_text().split() if file.exists() else []), str(sys.argv[1:])]
file.write_text(" ".join(tries))
sys.exit(4 if len(tries) < 3 else 0)
"""


@pytest.mark.parametrize(("resume", "tries"), [("--resume", ["[]", "['--resume']", "['--resume']"]), ("", ["[]"])])
def test_a_job_that_lost_the_device_goes_on(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resume: str, tries: list[str]
) -> None:
    code = LOSES_TWICE.format(file=str(tmp_path / "tries"))
    found = run(suite, monkeypatch, tmp_path / "out", [job(suite, "loses", code, resume=resume)])
    assert (tmp_path / "tries").read_text().split() == tries
    assert found["loses"]["exit_code"] == (0 if resume else 4)


def test_results_are_carried(suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To a fresh folder of a fresh machine, which is another device: nothing that was cut off is gone on from there."""
    first, second = tmp_path / "first", tmp_path / "second"
    tell = "import sys; print(sys.argv[1:])"
    done = job(suite, "done", tell)
    run(suite, monkeypatch, first, [done, job(suite, "cut", "import time; time.sleep(100)")], "--seconds", "3")
    (first / "microbench.json").write_text("{}")
    monkeypatch.setattr(suite, "machine", lambda: {**ABOUT, "uuid": "GPU-2"})
    cut = job(suite, "cut", tell, resume="--resume")
    found = run(suite, monkeypatch, second, [done, cut], "--from", str(first))
    assert found["done"]["uuid"] == "GPU-1"
    assert found["cut"]["uuid"] == "GPU-2"
    assert found["cut"]["result"] == ["[]"]
    assert {file.name for file in second.iterdir()} == {"suite.json", "suite.md", "microbench.json"}
    again = run(suite, monkeypatch, second, [done, cut], "--again")
    assert again["cut"]["result"] == ["[]"]


def test_the_order_and_the_files_that_exist(suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "ROOT", SUITE.parents[2])
    names = [found.name for found in suite.jobs(tmp_path)]
    assert names[:3] == ["doctor", "microbench", "speed"]
    assert names.index("numerics") < names.index("hazards") < names.index("contract contract")
    for found in suite.jobs(tmp_path):
        for argument in found.command:
            assert not argument.endswith(".py") or Path(argument).exists()
