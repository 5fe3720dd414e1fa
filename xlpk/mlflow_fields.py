"""Params and tags of MLflow's runs, from the files of a run or a sweep."""

from __future__ import annotations

import getpass
import json
import re
from pathlib import Path
from typing import Any

from xlpk import record, sweep_folder
from xlpk.sweep_table import read_point, sweep_table

MAX_NOTE = 7000  # characters; MLflow cuts tags at 8000
MAX_PARAM = 500  # characters; MLflow cuts at 6000, and the config is an artifact


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested config -> MLflow params: dotted keys, lists as JSON, long values cut."""
    out: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            out[f"{prefix}{key}"] = text if len(text) <= MAX_PARAM else text[: MAX_PARAM - 3] + "..."
    return out


def tags_of(folder: Path, status: dict[str, Any]) -> dict[str, str]:
    build = record.read_json(folder / record.BUILD)
    details = build.get("backend", {})
    sweep = sweep_folder.sweep_of(folder)
    about = {} if sweep is None else sweep_folder.read(sweep)
    values = dict(text.partition("=")[::2] for text in status.get("overrides", []))
    tags = {
        "backend": status.get("backend"),
        "orchestration": status.get("orchestration"),
        "mode": status.get("mode"),
        "model": status.get("model"),
        "lossless": str(status["lossless"]).lower() if "lossless" in status else None,
        "synthetic": "true" if status.get("synthetic") else None,
        "git_commit": build.get("git_commit"),
        "machine": f"{build['processor']}, {build['cores']} cores, {build['system']}" if build else None,
        "compiler": details.get("compiler"),
        "threads": details.get("threads"),
        "kind": "run" if sweep is None else "point",
        "sweep_id": status.get("sweep_id"),
        "sweep_uid": about.get("uid"),
        "point": None if sweep is None else folder.name,
        "repetition": status.get("repetition"),
        "run_dir": folder.name,
        "run_folder": str(folder.resolve()).replace("'", ""),
        "overrides": " ".join(status.get("overrides", [])),
        "error": status.get("error"),
        "HANG": status.get("hang"),
    }
    swept = {_key(f"swept.{key}"): values[key] for key in about.get("swept", []) if key in values}
    whole = {**tags, **swept, **_source(build.get("git_commit"))}
    return {key: str(value)[:4000] for key, value in whole.items() if value not in (None, "")}


def tags_of_sweep(sweep: Path, about: dict[str, Any]) -> dict[str, str]:
    tags = {
        "kind": "sweep",
        "sweep_id": about.get("id"),
        "sweep_uid": about.get("uid"),
        "swept": " ".join(about.get("swept", [])),
        "points": about.get("points"),
        "repeat": about.get("repeat"),
        "launcher": about.get("launcher"),
        "overrides": " ".join(about.get("overrides", [])),
        "run_dir": sweep.name,
        "run_folder": str(sweep.resolve()).replace("'", ""),
        **_source(record.git_commit()),
    }
    return {key: str(value)[:4000] for key, value in tags.items() if value not in (None, "")}


def note_of_sweep(sweep: Path) -> str:
    """The parent's description: the comparison, and what did not finish."""
    table = sweep_table([read_point(folder) for folder in sweep_folder.points_of(sweep)])
    return f"```\n{table[:MAX_NOTE]}\n```"


def _source(commit: str | None) -> dict[str, str | None]:
    """What the columns of MLflow's list of runs show."""
    try:
        user: str | None = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = None
    return {
        "mlflow.user": user,
        "mlflow.source.name": "xlpk",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit,
    }


def _key(text: str) -> str:
    """With the characters that MLflow takes in a key."""
    return re.sub(r"[^\w\-. :/]", "_", text)[:250]
