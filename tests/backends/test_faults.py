"""What the world does to a run: one clear line, the right exit code, a FAILED run with its log, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kinds
import numpy as np
import pytest
from backends.test_modes import backend_of_kind, only_run, xlpk
from checkpoints import make_checkpoint
from drive import CACHE
from safetensors.numpy import load_file, save_file

from xlpk import record
from xlpk.metrics import compute, read_events

# Some seconds of the tiny model, and an event log of megabytes.
LONG = ("workload=synthetic", "workload.requests=400", "workload.output_len=900", "workload.prompt_len=8")
QUIET = ("tracking=none", "run.warmup_steps=0")


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    (line,) = done.stderr.splitlines()
    assert line.startswith("xlpk: ")
    return line


def failed(run: Path, code: int) -> dict[str, object]:
    """The status of a run that began and did not end well; it has its log."""
    status = record.read_json(run / record.STATUS)
    assert (status["status"], status["exit_code"]) == ("FAILED", code)
    assert read_events(run / record.EVENTS)[0]["event"] == "header"
    return status


@contextlib.contextmanager
def running(folder: Path, *arguments: str, kept: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A long run in a process group of its own, entered once tokens are in its log; ended here if the test does not."""
    outputs = kept or folder / "outputs"
    outputs.mkdir(parents=True, exist_ok=True)
    if not (outputs / "cache").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        (outputs / "cache").symlink_to(CACHE)
    process = subprocess.Popen(
        [sys.executable, "-m", "xlpk.run", *LONG, *arguments, *backend_of_kind(arguments)],
        cwd=folder,
        env=kinds.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait(lambda: any(b'"token"' in path.read_bytes() for path in outputs.glob("runs/*/*/events.jsonl")), process)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < give_up
        time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Its end, with nothing of its group left; what its children need to notice it is theirs."""
    out, err = process.communicate(timeout=300)
    give_up = time.monotonic() + 60
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < give_up:
            os.killpg(process.pid, 0)
            time.sleep(0.01)
        raise AssertionError("something of its group is left")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be written; root, whom modes do not stop, needs an immutable one."""
    folder = tmp_path / "frozen"
    folder.mkdir()
    if os.geteuid() == 0:
        if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
            pytest.skip("root writes everywhere, and nothing can be made immutable here")
        yield folder
        subprocess.run(["chattr", "-i", folder], check=True)
    else:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


def test_a_read_only_folder(tmp_path: Path, frozen: Path) -> None:
    line = one_line(xlpk(tmp_path, *QUIET, f"run.outputs={frozen}", code=2))
    assert "run.outputs=" in line
    assert "can be written" in line
    assert list(frozen.iterdir()) == []


def test_a_read_only_cache(tmp_path: Path, frozen: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "cache").symlink_to(frozen)
    done = xlpk(tmp_path, *QUIET, code=2)
    assert "cache" in one_line(done)
    assert failed(only_run(tmp_path), 2)


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "outputs"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("no disk can be mounted here")
    try:
        (disk / "cache").symlink_to(CACHE)
        done = xlpk(tmp_path, *LONG, *QUIET, code=2)
        assert "No space left on device" in one_line(done)
        status = failed(only_run(tmp_path), 2)
        assert "No space left" in str(status["error"])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.heavy
def test_the_run_folder_removed_while_running(tmp_path: Path) -> None:
    with running(tmp_path, *QUIET, "workload.requests=40") as process:
        shutil.rmtree(only_run(tmp_path))
        done = ended(process)
    assert done.returncode == 2
    assert "removed during the run" in one_line(done)
    assert done.stdout == ""


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize(
    "signals",
    [pytest.param([signal.SIGINT], marks=pytest.mark.heavy), [signal.SIGINT, signal.SIGINT], [signal.SIGTERM]],
)
def test_interrupted(tmp_path: Path, signals: list[signal.Signals]) -> None:
    with running(tmp_path, *QUIET) as process:
        for number in signals:
            os.killpg(process.pid, number)
            time.sleep(0.05)
        done = ended(process)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert "KeyboardInterrupt" in lines[0]
    assert lines[1:] in ([], ["xlpk: interrupted"])
    run = only_run(tmp_path)
    failed(run, 130)
    assert read_events(run / record.EVENTS)[-1]["event"] == "end"
    assert json.loads((run / record.METRICS).read_text())["requests/output_tokens"] > 0


def killed(folder: Path) -> Path:
    """The folder of a run that was."""
    with running(folder, "run.warmup_steps=0") as process:
        process.kill()
        assert ended(process).returncode == -signal.SIGKILL
    run = only_run(folder)
    assert record.read_json(run / record.STATUS)["status"] == "RUNNING"
    return run


@pytest.mark.usefixtures("kind")
def test_killed(tmp_path: Path) -> None:
    """Nothing of it is left, and what it had written can be read."""
    assert compute(read_events(killed(tmp_path) / record.EVENTS))["requests/output_tokens"] > 0


@pytest.mark.heavy
@pytest.mark.usefixtures("kind")
def test_what_a_killed_run_left_can_be_uploaded(tmp_path: Path) -> None:
    run = killed(tmp_path)
    command = [sys.executable, "-m", "xlpk.cli", "upload", str(run)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}")
    (uploaded,) = client.search_runs([client.get_experiment_by_name("xlpk").experiment_id])
    assert uploaded.info.status == "FAILED"
    assert uploaded.data.metrics["requests/output_tokens"] > 0


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    arguments = ("sampling.max_new_tokens=4", "run.warmup_steps=0", "tracking.uri=sqlite:////proc/xlpk/mlflow.db")
    line = one_line(xlpk(tmp_path, *arguments))
    assert "not logged to MLflow" in line
    assert "upload" in line
    assert record.read_json(only_run(tmp_path) / record.STATUS)["status"] == "FINISHED"


@pytest.mark.parametrize(
    ("where", "said"),
    [
        pytest.param(">&-", "", marks=pytest.mark.heavy),
        ("> /dev/full", "No space left"),
        pytest.param("| head -c 1", "", marks=pytest.mark.heavy),
    ],
)
def test_standard_output_that_nobody_reads(tmp_path: Path, where: str, said: str) -> None:
    """The run and its files are complete all the same."""
    arguments = [*QUIET, "sampling.max_new_tokens=4", *backend_of_kind(QUIET)]
    command = f"{shlex.join([sys.executable, '-m', 'xlpk.run', *arguments])} {where}"
    link = tmp_path / "outputs" / "cache"
    link.parent.mkdir()
    link.symlink_to(CACHE)
    command = f"set -o pipefail; {command}"
    env = kinds.environment()
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    assert said in one_line(done) if said else done.stderr == ""
    assert record.read_json(only_run(tmp_path) / record.STATUS)["status"] == "FINISHED"


@pytest.mark.parametrize(
    ("value", "line"), [(np.nan, "=nan"), pytest.param(-np.inf, "=-inf", marks=pytest.mark.heavy), (3e38, "")]
)
def test_weights_without_a_result(tmp_path: Path, value: float, line: str) -> None:
    """What is no number is refused by name; numbers that overflow until nothing is left end the run."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32) | {"vocab_size": 17, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    folder = make_checkpoint(tmp_path / "model", seed=1, dtype="float32", **sizes, **heads)
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        tensors[name][7:] = value
    save_file(tensors, folder / "model.safetensors")
    arguments = ("model=hf", "model.path=model", "workload=synthetic", "workload.requests=2", "workload.prompt_len=4")
    done = xlpk(tmp_path, *QUIET, *arguments, code=2 if line else 4)
    if line:
        assert one_line(done).startswith(f"xlpk: model.layers.0.input_layernorm.weight[7]{line}: a finite number")
        assert not (tmp_path / "outputs" / "runs").exists()
        return
    assert "every logit was NaN (2 of 2 requests" in one_line(done)
    run = only_run(tmp_path)
    failed(run, 4)
    reasons = [event["reason"] for event in read_events(run / record.EVENTS) if event["event"] == "finished"]
    assert reasons == ["error", "error"]
