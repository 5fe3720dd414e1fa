"""The command line in processes of its own: exit codes, files, what is imported, and nothing outside outputs/."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xlpk import record, run

FAKE = Path(__file__).parents[1] / "fake_run.py"
SHORT = ("tracking=none", "sampling.max_new_tokens=12", "run.report=false")
HEAVY = pytest.mark.heavy


def call(cwd: Path, *arguments: str, script: Path = FAKE) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "HYDRA"))}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def only_run(cwd: Path) -> Path:
    (folder,) = (cwd / "outputs" / "runs").glob("*/*")
    return folder


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_help_is_light(tmp_path: Path) -> None:
    code = (
        "import sys; from xlpk import run; run.main(['--help']);"
        "print(sorted({'mlflow', 'torch', 'transformers', 'tokenizers', 'pandas', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n"), done.stdout
    modes = next(line for line in done.stdout.splitlines() if line.startswith("mode:"))
    assert {"forced_rejection", "serial_decode", "speculative_decode"} <= set(modes.replace(",", "").split())
    assert list(tmp_path.iterdir()) == []


def test_cfg_shows_the_job(tmp_path: Path) -> None:
    done = call(tmp_path, "--cfg", "job", "mode=forced_rejection", "spec.block=8")
    assert done.returncode == 0
    assert "mismatch_stride: 4" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_its_record_and_nothing_else(tmp_path: Path) -> None:
    done = call(tmp_path, *SHORT, "run.json=true")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [place.name for place in tmp_path.iterdir()] == ["outputs"]
    assert [place.name for place in (tmp_path / "outputs").iterdir()] == ["runs"]
    folder = only_run(tmp_path)
    assert sorted(place.name for place in folder.iterdir()) == sorted(record.FILES)
    measured = json.loads((folder / "metrics.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == measured
    assert measured["requests/output_tokens"] == 48
    rows = dict(csv.reader((folder / "metrics.csv").open()))
    assert float(rows["throughput/tokens_per_s"]) == measured["throughput/tokens_per_s"]
    assert rows["latency/ttft_ms.p99"] == record.TOO_FEW
    status = record.read_json(folder / "status.json")
    assert (status["status"], status["exit_code"], status["mode"]) == ("FINISHED", 0, "speculative_decode")
    config = record.read_config(folder)
    assert config["spec"] == {
        "name": "ngram",
        "block": 4,
        "min_n": 1,
        "max_n": 4,
        "effective_block": 4,
        "num_speculative_tokens": 3,
    }
    assert "=== request 3: completion" in (folder / "text.txt").read_text()
    for text in ("time to first token", "tokens/s", "def read_file(path):", "folder: outputs/runs/"):
        assert text in done.stdout


def test_serial_decode_is_logged_as_what_it_was(tmp_path: Path) -> None:
    done = call(tmp_path, *SHORT, "mode=serial_decode", "spec.block=8")
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 1
    spec = record.read_config(only_run(tmp_path))["spec"]
    assert (spec["block"], spec["effective_block"]) == (8, 1)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        pytest.param(["spec.block=0"], ["spec.block=0", "1 to 16"], marks=HEAVY),
        pytest.param(["spec.blok=8"], ["spec.blok=8", "did you mean block?"], marks=HEAVY),
        pytest.param(["workload.prompt=''"], ["workload.prompt", "at least one character"], marks=HEAVY),
        pytest.param(["kv.budget=-1"], ["kv.budget=-1", "64MiB"], marks=HEAVY),
        pytest.param(["kv.budget=1pages"], ["workload.prompt", "KV pages"], marks=HEAVY),
        pytest.param(["model.max_len=9999"], ["model.max_len=9999", "512"], marks=HEAVY),
        (["run.resume=true"], ["run.resume=true", "-m"]),
        (["run.repeat=3", "spec.block=0"], ["spec.block=0", "1 to 16"]),
        (["sampling.stop_token_ids=[300]"], ["sampling.stop_token_ids=300", "0 to 255"]),
    ],
)
def test_refused_input_leaves_nothing(tmp_path: Path, overrides: list[str], names: list[str]) -> None:
    line = refused(call(tmp_path, *SHORT, *overrides))
    assert all(name in line for name in names), line
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_that_does_not_compose_leaves_nothing(tmp_path: Path) -> None:
    assert "spec.blok" in refused(call(tmp_path, "-m", *SHORT, "spec.blok=1,2"))
    assert list(tmp_path.iterdir()) == []


def test_unwritable_outputs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "run.outputs=" in refused(call(tmp_path, *SHORT, "run.outputs=file"))


def test_a_backend_that_dies(tmp_path: Path) -> None:
    done = call(tmp_path, "--die", "12", *SHORT)
    assert done.returncode == 4
    assert done.stderr.startswith("xlpk: scripted death")
    assert len(done.stderr.splitlines()) == 1
    status = record.read_json(only_run(tmp_path) / "status.json")
    assert (status["status"], status["exit_code"]) == ("FAILED", 4)
    assert "scripted death" in status["error"]
    assert record.read_json(only_run(tmp_path) / "metrics.json")["requests/unfinished"] == 4


def test_an_interrupted_run(tmp_path: Path) -> None:
    done = call(tmp_path, "--interrupt", "12", *SHORT)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert record.read_json(only_run(tmp_path) / "status.json")["status"] == "FAILED"


def test_a_sweep_compares_its_points(tmp_path: Path) -> None:
    done = call(tmp_path, "-m", *SHORT, "mode=serial_decode,forced_rejection", "spec.block=1,4", "run.json=true")
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "outputs" / "sweeps").glob("*/*")
    rows = list(csv.DictReader((sweep / "sweep.csv").open()))
    assert [(row["point"], row["mode"], row["spec.block"]) for row in rows] == [
        ("0", "serial_decode", "1"),
        ("1", "serial_decode", "4"),
        ("2", "forced_rejection", "1"),
        ("3", "forced_rejection", "4"),
    ]
    assert float(rows[3]["spec/accepted"]) > 0
    table = done.stdout.split("\n\n")[1].splitlines()
    assert table[0].split()[-2:] == ["same", "text"]
    assert [line.split()[-1] for line in table[1:]] == ["-", "yes", "yes", "yes"]
    assert [point["point"] for point in json.loads(done.stdout.splitlines()[-1])["points"]] == ["0", "1", "2", "3"]
    shown = {place.name for place in sweep.iterdir() if not place.name.startswith(".")}
    assert shown == {"0", "1", "2", "3", "multirun.yaml", "sweep.csv", "sweep.json"}


@pytest.mark.heavy
def test_failing_points_do_not_stop_a_sweep(tmp_path: Path) -> None:
    done = call(tmp_path, "-m", *SHORT, "spec.block=0,2")
    assert done.returncode == 2
    assert "REFUSED" in done.stdout
    (sweep,) = (tmp_path / "outputs" / "sweeps").glob("*/*")
    assert [place.name for place in (sweep / "0").iterdir()] == ["status.json"]
    assert record.read_json(sweep / "1" / "status.json")["status"] == "FINISHED"
    rows = list(csv.DictReader((sweep / "sweep.csv").open()))
    assert [(row["status"], row["exit_code"]) for row in rows] == [("REFUSED", "2"), ("FINISHED", "0")]


@pytest.mark.heavy
def test_nothing_of_mlflow_before_the_end_of_the_measurement(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(FAKE.parent)!r}); import fake_run, fake_backend\n"
        "close = fake_backend.FakeBackend.close\n"
        "def checked(self): print('MLFLOW' if 'mlflow' in sys.modules else 'NO MLFLOW'); return close(self)\n"
        "fake_backend.FakeBackend.close = checked\n"
        "sys.argv = ['x', 'sampling.max_new_tokens=4', 'workload.requests=1', 'tracking.uri=http://127.0.0.1:9']\n"
        "code = fake_run.main(); print('then', 'mlflow' in sys.modules, code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("NO MLFLOW\n")
    assert done.stdout.endswith("then True 0\n")
    assert done.stderr.startswith("xlpk: not logged to MLflow at http://127.0.0.1:9")
    assert len(done.stderr.splitlines()) == 1
    assert [place.name for place in tmp_path.iterdir()] == ["outputs"]


def test_not_installed_says_how_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xlpk.conf" else found(name))
    assert run.main([]) == 2
    assert "pip install -e ." in capsys.readouterr().err
