"""The commands of the README, run as a user runs them: real model, real loop, real files, from another folder."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import kinds
import pytest
from checkpoints import make_case
from drive import CACHE

from xlpk.speculation import Oracle


def xlpk(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`python -m xlpk.run` in `folder`, with the builds of other tests at hand."""
    if not (folder / "outputs" / "cache").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        (folder / "outputs").mkdir(exist_ok=True)
        (folder / "outputs" / "cache").symlink_to(CACHE)
    done = subprocess.run(
        [sys.executable, "-m", "xlpk.run", *arguments, *backend_of_kind(arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=kinds.environment(),
    )
    assert done.returncode == code, done.stderr
    return done


def backend_of_kind(arguments: Iterable[str]) -> tuple[str, ...]:
    """The override that asks for the current kind of backend, unless there is one; the CPU's is the default."""
    named = any(argument.startswith("backend=") for argument in arguments)
    return () if named or kinds.current == "cpu" else (f"backend={kinds.current}",)


def only_run(folder: Path) -> Path:
    (found,) = (folder / "outputs" / "runs").glob("*/*")
    return found


def events(run: Path, kind: str) -> list[dict]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind and not event.get("warmup")]


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize(
    "stops",
    [
        pytest.param((), id="length", marks=pytest.mark.heavy),
        pytest.param(("sampling.stop_token_ids=[291,14]",), id="stop ids"),
    ],
)
def test_forced_rejection_meets_its_formula(tmp_path: Path, stops: tuple[str, ...]) -> None:
    xlpk(tmp_path, "mode=forced_rejection", "spec.block=8", "tracking=none", *stops)
    run = only_run(tmp_path)
    assert {event["reason"] for event in events(run, "finished")} & {"stop"} == ({"stop"} if stops else set())
    metrics = json.loads((run / "metrics.json").read_text())
    expected = [Oracle(block=8, mismatch_stride=4).expected(event["n_output"]) for event in events(run, "finished")]
    assert metrics["spec/verifications"] == sum(v for v, _, _ in expected)
    assert metrics["spec/proposed"] == sum(p for _, p, _ in expected)
    assert metrics["spec/accepted"] == sum(a for _, _, a in expected)
    assert 0 < metrics["spec/accepted"] < metrics["spec/proposed"]
    assert metrics["spec/acceptance_at.4"] == 0.0, "no verification gets beyond the mismatch"


@pytest.mark.usefixtures("kind")
def test_the_modes_agree_in_text(tmp_path: Path) -> None:
    done = xlpk(
        tmp_path,
        "-m",
        "mode=serial_decode,speculative_decode,forced_rejection",
        "tracking=none",
        "sampling.temperature=0.6",
        "run.report=false",
    )
    (sweep,) = (tmp_path / "outputs" / "sweeps").glob("*/*")
    texts = [(sweep / str(n) / "text.txt").read_text() for n in range(3)]
    assert texts[0] == texts[1] == texts[2]
    assert "def " in texts[0]
    metrics = [json.loads((sweep / str(n) / "metrics.json").read_text()) for n in range(3)]
    assert "spec/accepted" not in metrics[0]
    assert all(0 < one["spec/accepted"] < one["spec/proposed"] for one in metrics[1:])
    assert metrics[1]["loop/steps"] < metrics[0]["loop/steps"]
    with (sweep / "sweep.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    assert "mode=forced_rejection" in done.stdout


def test_serial_decode_answers_a_block_by_one(tmp_path: Path) -> None:
    done = xlpk(tmp_path, "mode=serial_decode", "spec.block=8", "tracking=none")
    assert "spec.block=8" in done.stderr
    config = (only_run(tmp_path) / "config.yaml").read_text()
    assert "effective_block: 1" in config
    assert "block: 8" in config


def test_json_is_the_last_line(tmp_path: Path) -> None:
    done = xlpk(tmp_path, "run.json=true", "tracking=none", "backend.orchestration=launched")
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics["throughput/tokens_per_s"] > 0
    assert metrics["host/launches"] > metrics["loop/steps"]
    assert metrics == json.loads((only_run(tmp_path) / "metrics.json").read_text())


@pytest.mark.heavy
def test_one_mlflow_run(tmp_path: Path) -> None:
    done = xlpk(tmp_path)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("xlpk").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["mode"] == "speculative_decode"
    assert run.data.tags["lossless"] == "true"
    assert "g++" in run.data.tags["compiler"] or "clang" in run.data.tags["compiler"]
    assert run.data.params["spec.effective_block"] == "4"
    assert run.data.metrics["spec/accepted"] > 0
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "events.jsonl", "text.txt", "build.json"} <= names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outputs"]
    assert "MLflow UI" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["spec.block=0"], "spec.block=0: 1 to 16", marks=pytest.mark.heavy),
        pytest.param(["spec.block=17"], "spec.block=17: 1 to 16", marks=pytest.mark.heavy),
        pytest.param(["kv.budget=-1MiB"], "kv.budget=-1MiB: ", marks=pytest.mark.heavy),
        (
            ["kv.budget=1pages", "workload.prompt='def f(a, b, c, d, e, g, h): return a + b + c + d'"],
            "workload.prompt=",
        ),
        pytest.param(["workload.prompt=''"], "workload.prompt=''", marks=pytest.mark.heavy),
        (["model=hf", "model.path=nowhere"], "nowhere"),
        pytest.param(["run.outputs=/proc/xlpk"], "run.outputs=", marks=pytest.mark.heavy),
        pytest.param(["mode=forced_rejection", "spec=ngram"], "spec=ngram", marks=pytest.mark.heavy),
        (["spec.blok=4"], "spec.blok=4: "),
        pytest.param(["mode=serial"], "serial_decode", marks=pytest.mark.heavy),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = xlpk(tmp_path, *arguments, "tracking=none", code=2)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "outputs" / "runs").exists() or not list((tmp_path / "outputs" / "runs").rglob("*.json"))


def damage(folder: Path, kind: str) -> None:
    """Breaks a good checkpoint."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    values = json.loads(config.read_text())
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "missing file":
        weights.unlink()
    elif kind == "missing tensor":
        config.write_text(json.dumps({**values, "num_hidden_layers": values["num_hidden_layers"] + 1}))
    elif kind == "wrong shape":
        config.write_text(json.dumps({**values, "vocab_size": values["vocab_size"] + 1}))
    elif kind == "unknown architecture":
        config.write_text(json.dumps({**values, "architectures": ["MambaForCausalLM"], "model_type": "mamba"}))


DAMAGES = {
    "truncated": "truncated",
    "missing file": "model.safetensors",
    "missing tensor": "model.layers.2",
    "wrong shape": "expected",
    "unknown architecture": "LlamaForCausalLM",
}


OF_A_FOLDER = ("model=hf", "model.path=model", "workload=synthetic", "tracking=none", "sampling.max_new_tokens=2")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that runs."""
    folder = tmp_path_factory.mktemp("good")
    make_case(folder / "model", "gqa")
    xlpk(folder, *OF_A_FOLDER)
    assert only_run(folder)
    return folder / "model"


QUICK_DAMAGES = ("truncated", "unknown architecture")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK_DAMAGES else pytest.mark.heavy) for kind in DAMAGES]
)
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, good: Path, kind: str) -> None:
    shutil.copytree(good, tmp_path / "model")
    damage(tmp_path / "model", kind)
    done = xlpk(tmp_path, *OF_A_FOLDER, code=2)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert DAMAGES[kind] in lines[0]
    assert not (tmp_path / "outputs" / "runs").exists()


def test_a_prompt_beyond_the_positions_is_one_line(tmp_path: Path) -> None:
    done = xlpk(tmp_path, "workload=synthetic", "workload.prompt_len=1024", "tracking=none", code=2)
    assert "1024 positions" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = xlpk(tmp_path, "tracking=none", code=3)
    assert "CXX=no-such-compiler was not found: install one" in done.stderr


def test_hash_weights_need_no_checkpoint(tmp_path: Path) -> None:
    """Any number of layers of a big shape would do; the smallest one keeps the test short."""
    done = xlpk(
        tmp_path,
        "model=llama_160m_shape",
        "workload=synthetic",
        "workload.requests=2",
        "workload.prompt_len=8",
        "workload.output_len=4",
        "model.max_len=64",
        "tracking=none",
        "run.warmup_steps=0",
        "run.json=true",
    )
    assert json.loads(done.stdout.splitlines()[-1])["requests/output_tokens"] == 8
