"""The GPU suite's own machinery: time that is shared out, jobs that are cut off, jobs that lost the device."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from checkpoints import make_case

from xlpk.model import load_model
from xlpk.reference import forward, greedy

SUITE = Path(__file__).parents[2] / "experiments" / "gpu_suite" / "run.py"
ABOUT = {"device": "a device", "uuid": "GPU-1", "commit": "c", "driver": "580.1", "driver_cuda": [13, 0], "date": "d"}


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


@pytest.mark.heavy
def test_time_that_is_left_is_a_jobs_deadline(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was cut off is run again by the next call, what has ended is not, what got no time is begun."""
    out = tmp_path / "out"
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    jobs = [job(suite, "quick", count), job(suite, "slow", "import time; time.sleep(100)"), job(suite, "late", "")]
    found = run(suite, monkeypatch, out, jobs, "--seconds", "8")
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


@pytest.mark.heavy
def test_results_are_carried(suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To a fresh folder of a fresh machine, which is another device: nothing that was cut off is gone on from there."""
    first, second = tmp_path / "first", tmp_path / "second"
    tell = "import sys; print(sys.argv[1:])"
    done = job(suite, "done", tell)
    run(suite, monkeypatch, first, [done, job(suite, "cut", "import time; time.sleep(100)")], "--seconds", "6")
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


def test_what_cannot_run_is_named_and_tried_again(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reason = ["no torch here"]
    peer = suite.Job("peer", [sys.executable, "-c", "print('ran')"], 30.0, suite.lines, skip=lambda: reason[0])
    found = run(suite, monkeypatch, tmp_path / "out", [peer])
    assert found["peer"] == {"exit_code": None, "seconds": 0.0, "skipped": "no torch here", "uuid": "GPU-1"}
    assert "not run: no torch here" in (tmp_path / "out" / "suite.md").read_text()
    reason[0] = ""
    assert run(suite, monkeypatch, tmp_path / "out", [peer])["peer"]["result"] == ["ran"]
    monkeypatch.setattr(suite.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho False\n")
    (tmp_path / "python").chmod(0o755)
    assert suite.no_transformers() == "this torch sees no GPU"
    (tmp_path / "python").write_text("#!/bin/sh\necho 'No module named torch' >&2\nexit 1\n")
    assert suite.no_transformers() == "torch and transformers: No module named torch"
    (tmp_path / "python").write_text("#!/bin/sh\necho True\n")
    assert suite.no_transformers() == ""


def test_the_page_compares_bytes_with_what_the_device_reads(suite: ModuleType) -> None:
    point = {
        "overrides": ["backend=hf_static", "model=llama_1b_shape"],
        "metrics": {"device_latency/itl_ms.p50": 2.0},
        "bytes_per_token": 2_000_000_000,
        "error": None,
    }
    beside = {
        "kl_nats.mean": 1.5e-4,
        "kl_nats.max": 2e-3,
        "nll_ratio": 1.0,
        "top1_agreement": 0.99,
        "status": "FINISHED",
    }
    agreement = {
        "backends": {"cpu": beside, "graph": {"status": "FAILED", "error": "lost"}},
        "skipped": {"hf": "no torch"},
    }
    jobs = {
        "microbench": {"result": ["a table", '{"read_gb_per_s": 4000.0}']},
        "llama_1b_shape": {"result": [point, {"overrides": ["backend=graph"], "metrics": {}, "error": "hung"}]},
        "agreement": {"result": agreement},
    }
    page = suite.markdown({"machine": ABOUT, "jobs": {n: {"exit_code": 0, "seconds": 1, **j} for n, j in jobs.items()}})
    assert "| hf_static | 2 | - | - | - | - | - | 1000 | 25.0% |" in page
    assert "| graph | hung |" in page
    assert "| cpu | 0.00015 | 0.002 | 1 | 0.99 | - | - | - | - | - |" in page
    assert "| graph | lost |" in page
    assert "- not run: hf: no torch" in page


def test_the_page_shows_what_was_measured_without_its_samples(suite: ModuleType) -> None:
    variant = {
        "flight": True,
        "weight_layout": "rows",
        "planner": "team",
        "itl_us.p50": 900.0,
        "itl_us.p99": 950.0,
        "gaps_us": [987.5],
    }
    rates = {"weights_gb_per_s": 2700.0, "upload_gb_per_s": 44.0}
    speed = {"model": "m", "prompt_len": 8, "output_len": 2, "runs": [{**variant, **rates}]}
    link = {"state": "ok", "name": "device 0: link", "value": "55.0 GB/s from page-locked host memory"}
    hazards = {"stop": 0.5, "device memory beside the loop: free, s": None, "samples": {"stop": [987.5]}}
    jobs = {"doctor": [link], "speed": speed, "hazards": hazards}
    page = suite.markdown(
        {"machine": ABOUT, "jobs": {n: {"exit_code": 0, "seconds": 1, "result": found} for n, found in jobs.items()}}
    )
    assert "driver 580.1 (CUDA 13.0)" in page
    assert "| on | rows | team | 900.0 | 950.0 | 2700.0 | 44.0 | 80% |" in page
    assert "- device memory beside the loop: free, s: not in time" in page
    assert "987.5" not in page


@pytest.mark.parametrize(
    ("line", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Tue Sep 23 2025\nGCC version: 12.3.0 \n",
            "580.159.03",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82  Release Build", "580.82"),
        (None, None),
    ],
)
def test_the_drivers_version(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str | None, version: str | None
) -> None:
    monkeypatch.setattr(suite, "KERNEL_MODULE", tmp_path / "version")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    if line is not None:
        (tmp_path / "version").write_text(line)
    assert suite.nvidia_driver() == version


@pytest.mark.parametrize("out", [["--out", "experiments/somewhere"], []], ids=["given", "default"])
def test_the_standin_writes_nothing_under_experiments(
    suite: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    out: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "machine", lambda: {**ABOUT, "device": "xlpk stand-in driver (no GPU)"})
    monkeypatch.setattr(suite, "jobs", lambda _: [])
    monkeypatch.setattr(sys, "argv", ["run.py", *out])
    assert suite.main() == 2
    assert "may not write results under" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_agreement_is_judged_by_the_oracles_margin(tmp_path: Path) -> None:
    """The oracle's own tokens are right; one far below its best is outside the bound, of either arithmetic."""
    spec = importlib.util.spec_from_file_location("gpu_suite_agreement", SUITE.with_name("agreement.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_suite_agreement"] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    model = load_model("gqa", make_case(tmp_path, "gqa"))
    prompt = (5, 6, 7)
    tokens, _ = greedy(model.config, model.weights, prompt, 6, kv_dtype="bf16")
    right = tokens.tolist()
    logits = forward(model.config, model.weights, (*prompt, *right))[len(prompt) - 1]
    wrong = [int(logits.argmin()), *right[1:]]
    for torch_bf16 in (False, True):
        found = module.agreement(model, [prompt], [right], torch_bf16)
        assert (found.tokens, found.outside) == (6, 0)
        assert found.largest_regret <= found.limit
        assert module.agreement(model, [prompt], [wrong], torch_bf16).outside >= 1
    ours, theirs = (module.agreement(model, [prompt], [right], kind).limit for kind in (False, True))
    assert 0 < ours < theirs


def test_the_order_and_the_files_that_exist(suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "ROOT", SUITE.parents[2])
    names = [found.name for found in suite.jobs(tmp_path)]
    assert names[:3] == ["doctor", "microbench", "speed"]
    assert (
        names.index("numerics") < names.index("agreement") < names.index("hazards") < names.index("contract contract")
    )
    for found in suite.jobs(tmp_path):
        for argument in found.command:
            assert not argument.endswith(".py") or Path(argument).exists()
