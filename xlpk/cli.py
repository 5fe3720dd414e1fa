"""`xlpk run OVERRIDES | ui | upload RUN_DIR... | doctor`: the console script."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from xlpk.errors import BackendError, InputError, ToolError
from xlpk.isolate import leave_if_lost

SERVER = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}  # 2 processes, not 10


def _ui(args: argparse.Namespace) -> int:
    """Becomes the MLflow server on a store."""
    from xlpk import tracking
    from xlpk.settings import MlflowTracking

    outputs = Path(args.outputs)
    uri = tracking.store_uri(MlflowTracking(uri=args.store), outputs)
    if uri.startswith(("http:", "https:")):
        print(f"the store is a server already: open {uri}")
        return 0
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:") and not file.exists():
        raise InputError("--store", uri, "a store that a run has made: run `python -m xlpk.run` first, or name another")
    print(f"MLflow UI on {uri}: open http://127.0.0.1:{args.port} (Ctrl-C ends it)", flush=True)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        uri,
        "--host",
        "127.0.0.1",
        "--port",
        str(args.port),
        "--workers",
        "1",
    ]
    os.execve(sys.executable, command, {**os.environ, **SERVER})


def _upload(args: argparse.Namespace) -> int:
    """Run folders -> MLflow; the tracking settings of each run's own config unless options say otherwise."""
    from xlpk import record, tracking
    from xlpk.settings import MlflowTracking

    for folder in map(Path, args.run_dir):
        if not (folder / record.STATUS).exists():
            raise InputError("RUN_DIR", folder, f"a run folder, with {record.STATUS} in it")
        config = record.read_config(folder).get("tracking", {})
        choice = MlflowTracking(
            uri=args.store or config.get("uri"), experiment=args.experiment or config.get("experiment", "xlpk")
        )
        outputs = record.outputs_of(folder)
        try:
            run_id = tracking.upload(folder, choice, outputs)
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise ToolError(f"{tracking.store_uri(choice, outputs)}: {lines[0][:200]}") from None
        print(f"{folder}: run {run_id} at {tracking.store_uri(choice, outputs)}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    """What this machine can run."""
    from xlpk import doctor

    return doctor.main(Path(args.outputs).resolve() / "cache", as_json=args.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xlpk", description="A laboratory for GPU-resident LLM inference.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="one run or, with -m, a sweep; `xlpk run --help` shows groups and keys")
    ui = commands.add_parser("ui", help="the MLflow UI on the store of this folder's runs")
    ui.add_argument("--store", help="store URI; else MLFLOW_TRACKING_URI, else OUTPUTS/mlflow.db")
    ui.add_argument("--outputs", default="outputs", help="folder that runs write to (outputs)")
    ui.add_argument("--port", type=int, default=5000)
    ui.set_defaults(call=_ui)
    upload = commands.add_parser("upload", help="logs run folders to MLflow, again or later")
    upload.add_argument("run_dir", nargs="+", metavar="RUN_DIR")
    upload.add_argument("--store", help="store URI; else the run's, MLFLOW_TRACKING_URI, OUTPUTS/mlflow.db")
    upload.add_argument("--experiment", help="MLflow experiment; else the run's")
    upload.set_defaults(call=_upload)
    check = commands.add_parser("doctor", help="what this machine can run, and what to do where it cannot")
    check.add_argument("--outputs", default="outputs", help="folder that runs write to (outputs)")
    check.add_argument("--json", action="store_true", help="one JSON list instead of lines")
    check.set_defaults(call=_doctor)
    return parser


def main(argv: list[str] | None = None) -> int:
    """`argv` without the program's name -> exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["run"]:  # Hydra reads the rest
        from xlpk import run

        return run.main(argv[1:])
    args = _parser().parse_args(argv)
    try:
        code = int(args.call(args))
    except (InputError, ToolError, BackendError) as error:
        print(f"xlpk: {' '.join(str(error).split())}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("xlpk: interrupted", file=sys.stderr)
        code = 130
    leave_if_lost(code)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
