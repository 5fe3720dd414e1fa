"""A run folder: config.yaml, events.jsonl, metrics.json and .csv, text.txt, build.json, status.json.

The folder is the record of a run; tracking and reports read nothing else. Files appear whole: each is written beside
its place and renamed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from xlpk import __version__, side_by_side, trace_file
from xlpk.backend import BackendReport
from xlpk.kv import KVPlan
from xlpk.metrics import Metrics
from xlpk.model import Model
from xlpk.settings import Settings
from xlpk.text import decode as decode_text
from xlpk.workload import Request

CONFIG, EVENTS, METRICS, METRICS_CSV = "config.yaml", "events.jsonl", "metrics.json", "metrics.csv"
TEXT, BUILD, STATUS = "text.txt", "build.json", "status.json"
FILES = (CONFIG, EVENTS, METRICS, METRICS_CSV, TEXT, BUILD, STATUS)
TRACES = (trace_file.TRACE, trace_file.DECISIONS, trace_file.SPANS)  # with run.trace=on
COMPARED = (*side_by_side.LOGS, side_by_side.FIGURE)  # of mode=mega_kernel_sim
MORE_FILES = (*TRACES, *COMPARED)
TOO_FEW = "n too small"


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """An empty dict if the file is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of JSON or of UTF-8
        return {}
    return value if isinstance(value, dict) else {}


def read_config(folder: Path) -> dict[str, Any]:
    try:
        value = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
    except (OSError, OmegaConfBaseException):
        return {}
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def effective_config(settings: Settings, model: Model, plan: KVPlan, requests: Sequence[Request]) -> dict[str, Any]:
    """The config as typed and resolved, and beside it what it came to."""
    config: dict[str, Any] = {key: dict(value) for key, value in settings.resolved.items()}
    config["spec"]["effective_block"] = settings.spec.block
    config["spec"]["num_speculative_tokens"] = settings.spec.block - 1  # vLLM's name
    config["acceptance"]["lossless"] = settings.lossless
    config["kv"] |= {
        "effective_dtype": plan.dtype,
        "pages": plan.pages,
        "page_bytes": plan.page_bytes,
        "total_bytes": plan.total_bytes,
    }
    config["model"] |= {
        "effective_dtype": model.weights.dtype,
        "effective_max_len": plan.max_len,
        "parameters": model.config.parameters,
        "fingerprint": model.fingerprint,
    }
    config["workload"]["effective_requests"] = len(requests)
    config["sampling"] |= {f"effective_{key}": value for key, value in asdict(settings.sampling.values()).items()}
    config["sampling"]["effective_max_new_tokens"] = max(request.max_new_tokens for request in requests)
    return config


def write_config(folder: Path, config: dict[str, Any]) -> None:
    write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(config)))


def write_metrics(folder: Path, metrics: Metrics) -> None:
    write_json(folder / METRICS, metrics)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("metric", "value"))
    writer.writerows((key, TOO_FEW if value is None else value) for key, value in metrics.items())
    write_text(folder / METRICS_CSV, buffer.getvalue())


def write_texts(
    folder: Path,
    model: Model,
    requests: Sequence[Request],
    outputs: dict[int, list[int]],
    texts: dict[int, str],
    synthetic: str | None = None,
) -> None:
    """Prompt and completion of each request, cut in `texts` where a stop string ended it; ids without a tokenizer.

    `synthetic`: what the answers of a simulated run are, for the first line.
    """
    parts = [] if synthetic is None else [f"SYNTHETIC: nothing was computed, answers are {synthetic}"]
    for request in requests:
        output = texts.get(request.request_id, decode(model, outputs.get(request.request_id, [])))
        for title, text in (("prompt", decode(model, request.prompt)), ("completion", output)):
            parts.append(f"=== request {request.request_id}: {title}\n{text}")
    write_text(folder / TEXT, "\n".join(parts) + "\n")


def decode(model: Model, tokens: Sequence[int]) -> str:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return " ".join(map(str, tokens))
    return decode_text(tokenizer, tokens)


def write_build(folder: Path, report: BackendReport) -> None:
    write_json(folder / BUILD, {"backend": report.details, **machine()})


def machine() -> dict[str, Any]:
    """What ran the run: versions, processor, the commit of the sources if they are a checkout."""
    return {
        "xlpk": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "git_commit": git_commit(),
        "argv": sys.argv[1:],
    }


@cache
def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def git_commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "--verify", "-q", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def write_status(folder: Path, status: str, exit_code: int | None, **values: Any) -> None:
    """RUNNING, FINISHED or FAILED; keeps what an earlier call wrote."""
    known = read_json(folder / STATUS)
    known.setdefault("started_unix_s", time.time())
    if status != "RUNNING":
        known["ended_unix_s"] = time.time()
    value = {**known, "status": status, "exit_code": exit_code, **values}
    try:
        write_json(folder / STATUS, value)
    except OSError:  # a full disk: the file that is there has room
        (folder / (STATUS + ".part")).unlink(missing_ok=True)
        with (folder / STATUS).open("r+", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
            file.truncate()


def program() -> str:
    """How to call the command line from here: `xlpk`, or this interpreter where its scripts are not on the PATH."""
    script = shutil.which("xlpk")
    if script and Path(script).parent == Path(sys.executable).parent:
        return "xlpk"
    near = Path(sys.executable).is_relative_to(Path.cwd())
    return f"{os.path.relpath(sys.executable) if near else sys.executable} -m xlpk.cli"


def clear(folder: Path) -> None:
    """Our files of a run that was refused before it ran."""
    for name in (*FILES, *MORE_FILES):
        (folder / name).unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """The same, and the folders that this leaves empty, up to OUTPUTS."""
    clear(folder)
    outputs = outputs_of(folder)
    for place in (folder.resolve(), *folder.resolve().parents):
        try:
            place.rmdir()
        except OSError:
            return
        if place == outputs:
            return


def outputs_of(folder: Path) -> Path:
    """OUTPUTS of OUTPUTS/runs/... or OUTPUTS/sweeps/...; else the folder's parent."""
    for place in folder.resolve().parents:
        if place.name in ("runs", "sweeps"):
            return place.parent
    return folder.resolve().parent
