"""The console script `xlpk`: runs, reports, the simulator's tools; `xlpk --help` names its commands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from xlpk import __version__
from xlpk.errors import BackendError, InputError, ToolError
from xlpk.isolate import leave_if_lost
from xlpk.process import leave


def _ui(args: argparse.Namespace) -> int:
    """The MLflow UI on a store, until Ctrl-C; a store that is a server already is named."""
    from xlpk import tracking, ui
    from xlpk.settings import MlflowTracking

    uri = ui.checked_store(tracking.store_uri(MlflowTracking(uri=args.store), Path(args.outputs)))
    if uri.startswith(("http:", "https:")):
        print(f"the store is a server already: open {uri}")
        return 0
    port = ui.free_port(args.host, args.port)
    print(f"starting MLflow on {ui.without_password(uri)}", file=sys.stderr, flush=True)
    return ui.serve(uri, args.host, port, args.allowed_hosts)


def _upload(args: argparse.Namespace) -> int:
    """Run and sweep folders -> MLflow; the tracking settings of each one's own config unless options say otherwise."""
    from xlpk import record, sweep_folder, tracking
    from xlpk.settings import MlflowTracking

    for folder in map(Path, args.run_dir):
        is_sweep = sweep_folder.is_sweep(folder)
        if not is_sweep and not (folder / record.STATUS).exists():
            allowed = f"a run folder, with {record.STATUS} in it, or a sweep's, with {sweep_folder.SWEEP}"
            raise InputError("RUN_DIR", folder, allowed)
        config = (sweep_folder.read(folder) if is_sweep else record.read_config(folder)).get("tracking", {})
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


def _report(args: argparse.Namespace) -> int:
    """Runs and sweeps -> a page; with --fail-if a check too."""
    from xlpk import report_page

    out = None if args.output is None else Path(args.output)
    return report_page.main([Path(name) for name in args.run_or_sweep], out, args.fail_if, args.certain)


def _trace(args: argparse.Namespace) -> int:
    """Makes the timeline of traced runs again."""
    from xlpk import trace_file

    for folder in map(Path, args.run_dir):
        for warning in trace_file.write(folder):
            print(f"xlpk: {warning}", file=sys.stderr)
        print(f"{folder / trace_file.TRACE}: open it at {trace_file.VIEWER}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    """What this machine can run."""
    from xlpk import doctor

    return doctor.main(Path(args.outputs).resolve() / "cache", as_json=args.json)


def _completion(args: argparse.Namespace) -> int:
    """The script that a shell reads at its start."""
    from xlpk import completion

    print(completion.script(args.shell), end="")
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    """Measured runs -> a file of costs, and how well it fits."""
    from xlpk import calibrate

    return calibrate.main(args.run, args.output, args.predict, args.outputs)


def _capacity(args: argparse.Namespace) -> int:
    """A workload and its objectives -> the fleet that it takes."""
    from xlpk import capacity

    return capacity.main(args.override, args.fleet, args.router, args.good, args.affinity_blocks)


class _Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="xlpk", description="A laboratory for GPU-resident LLM inference.")
    parser.add_argument("--version", action="version", version=f"xlpk {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("run", help="one run or, with -m, a sweep; `xlpk run --help` shows groups and keys")
    ui = commands.add_parser("ui", help="the MLflow UI on the store of this folder's runs")
    ui.add_argument("--store", help="store, URI or file; else MLFLOW_TRACKING_URI, else OUTPUTS/mlflow.db")
    ui.add_argument("--outputs", default="outputs", help="folder that runs write to (outputs)")
    ui.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1); 0.0.0.0: all of them")
    ui.add_argument("--port", type=int, help="port to listen on; else the first free one from 5000 on")
    ui.add_argument("--allowed-hosts", help="names that browsers may use for this machine; MLflow's option")
    ui.set_defaults(call=_ui)
    upload = commands.add_parser("upload", help="logs runs and sweeps to MLflow, again or later")
    upload.add_argument("run_dir", nargs="+", metavar="FOLDER", help="of a run or of a sweep")
    upload.add_argument("--store", help="store URI; else the run's, MLFLOW_TRACKING_URI, OUTPUTS/mlflow.db")
    upload.add_argument("--experiment", help="MLflow experiment; else the run's")
    upload.set_defaults(call=_upload)
    report = commands.add_parser("report", help="one page on runs and sweeps: tables, figures, comparisons, checks")
    report.add_argument("run_or_sweep", nargs="+", metavar="RUN_OR_SWEEP", help="folder of a run or of a sweep")
    report.add_argument(
        "-o", "--output", metavar="FOLDER", help="else RUN_OR_SWEEP/report; for several OUTPUTS/reports/"
    )
    report.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="'METRIC OP NUMBER[x]'",
        help="exit code 1 if it holds, e.g. 'latency/itl_ms.p50 > 1.05x'; x: times the first argument. May be repeated",
    )
    report.add_argument(
        "--certain", action="store_true", help="--fail-if holds only where the 95 %% interval excludes the number"
    )
    report.set_defaults(call=_report)
    trace = commands.add_parser("trace", help="makes the timeline of a run with run.trace=on again, for Perfetto")
    trace.add_argument("run_dir", nargs="+", metavar="RUN_DIR", help="folder of a run")
    trace.set_defaults(call=_trace)
    fit = commands.add_parser("calibrate", help="the simulator's costs from measured runs, and how well they fit")
    fit.add_argument("run", nargs="+", metavar="RUN", help="folder of a run; all of one machine, model, orchestration")
    fit.add_argument("-o", "--output", default="costs.yaml", metavar="FILE", help="for backend.costs (costs.yaml)")
    fit.add_argument(
        "--predict", nargs="+", default=[], metavar="RUN", help="simulate these runs on the fit; errors, worst first"
    )
    fit.add_argument("--outputs", default="outputs", help="folder that these simulations write to (outputs)")
    fit.set_defaults(call=_calibrate)
    fleet = commands.add_parser("capacity", help="how many instances serve a workload within its objectives, simulated")
    fleet.add_argument("override", nargs="*", metavar="OVERRIDE", help="as of `xlpk run` with backend=simulated")
    fleet.add_argument("--fleet", metavar="SIZES", help="such as 8, 1-16 or 1,2,4-6; else as many as it takes")
    fleet.add_argument(
        "--router",
        default="least_outstanding",
        metavar="ROUTER",
        help="round_robin, least_outstanding or prefix_affinity (least_outstanding)",
    )
    fleet.add_argument(
        "--affinity-blocks", type=int, default=1, metavar="N", help="of a prompt, that prefix_affinity hashes (1)"
    )
    fleet.add_argument(
        "--good", type=float, default=0.99, metavar="SHARE", help="of all requests, to meet each objective (0.99)"
    )
    fleet.set_defaults(call=_capacity)
    check = commands.add_parser("doctor", help="what this machine can run, and what to do where it cannot")
    check.add_argument("--outputs", default="outputs", help="folder that runs write to (outputs)")
    check.add_argument("--json", action="store_true", help="one JSON list instead of lines")
    check.set_defaults(call=_doctor)
    shell = commands.add_parser("completion", help='completion at TAB: eval "$(xlpk completion bash)"')
    shell.add_argument("shell", choices=["bash", "zsh", "fish"])
    shell.set_defaults(call=_completion)
    return parser


def main(argv: list[str] | None = None) -> int:
    """`argv` without the program's name -> exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["run"]:  # Hydra reads the rest
        from xlpk import run

        return run.main(argv[1:])
    if argv[:1] == ["_complete"]:  # what the scripts of `xlpk completion` call
        from xlpk import completion

        return completion.main(argv[1:], _parser())
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "override") and not any(word.startswith("-") for word in rest):
        args.override += rest  # argparse leaves positional arguments behind an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
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


def console() -> NoReturn:
    """The entry of the console script: as `main`, as a whole process."""
    leave(main())


if __name__ == "__main__":
    console()
