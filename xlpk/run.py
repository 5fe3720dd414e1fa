"""`python -m xlpk.run`: composes the config, serves one workload, writes the run folder, mirrors it, shows a table.

Exit codes: 0 all went well, 2 bad input, 3 a tool is missing, 4 the backend died, 130 interrupted, 1 anything else. In
a sweep the other points go on and the code is that of the first failure.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from xlpk.errors import BackendError, HangError, InputError, ToolError
from xlpk.isolate import leave_if_lost

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from xlpk.engine import MakeBackend
    from xlpk.model import Model
    from xlpk.settings import Settings

INSTALL = "xlpk is not installed: run `make run`, or `python -m pip install -e .` in the checkout"
INTERRUPTED = 130
GPU_BACKENDS = ("persistent", "launched", "graph")
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EIO}
_codes: list[int] = []  # exit codes of this process's points, in order


def exit_code_of(error: BaseException) -> int:
    if isinstance(error, InputError | ToolError | BackendError):
        return error.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def complain(text: str) -> None:
    print(f"xlpk: {text}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    known = isinstance(error, InputError | ToolError | BackendError)
    text = str(error) if known else f"{type(error).__name__}: {error}".removesuffix(": ")
    return " ".join(text.split())


def point(cfg: DictConfig, make: MakeBackend | None = None) -> int:
    """One run, or one point of a sweep, in the folder that Hydra made for it -> its exit code."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    in_sweep = hydra.mode == RunMode.MULTIRUN
    facts: dict[str, Any] = {"overrides": list(hydra.overrides.task)}
    facts["name"] = " ".join(facts["overrides"])
    if in_sweep:
        facts["sweep_id"] = Path(str(hydra.sweep.dir)).name
    if in_sweep and make is None and _takes_a_device(cfg):
        from xlpk.isolate import run_isolated

        code = run_isolated(cfg, folder, facts, cfg.run.deadline_s)
    else:
        code = _point(cfg, folder, facts, in_sweep, make)
    _codes.append(code)
    if code == INTERRUPTED:
        raise KeyboardInterrupt  # ends a sweep too
    return code


def _point(
    cfg: DictConfig, folder: Path, facts: dict[str, Any], in_sweep: bool, make: MakeBackend | None = None
) -> int:
    try:
        return _run(cfg, folder, facts, in_sweep, make)
    except (Exception, KeyboardInterrupt) as raised:
        error = _unwritable(folder, raised) if getattr(raised, "errno", None) in UNWRITABLE else raised
        _refuse(folder, facts, in_sweep, error)
        return exit_code_of(error)


def _takes_a_device(cfg: DictConfig) -> bool:
    name = cfg.backend.get("name")
    return name in GPU_BACKENDS or (name == "auto" and importlib.util.find_spec("pycuda") is not None)


def child_point(cfg: DictConfig, folder: Path, facts: dict[str, Any]) -> None:
    """A point of a sweep as the whole of this process, which ends with its exit code."""
    from xlpk import config

    _take_signals()
    config.register()
    code = _point(cfg, folder, facts, True)
    _signals.held = True
    leave_if_lost(code)
    raise SystemExit(code)


def _refuse(folder: Path, facts: dict[str, Any], in_sweep: bool, error: BaseException) -> None:
    """Nothing stays of a run that never began but, in a sweep, the reason; one that began keeps what it has."""
    from xlpk import record

    if not isinstance(error, KeyboardInterrupt):
        complain(one_line(error))
    if not isinstance(error, InputError | ToolError | BackendError | KeyboardInterrupt):
        traceback.print_exc()
    if (status := record.read_json(folder / record.STATUS)) and (folder / record.EVENTS).exists():
        if status.get("status") == "RUNNING":  # else it had ended, and what failed is MLflow or the terminal
            record.write_status(folder, "FAILED", exit_code_of(error), error=one_line(error))
    elif in_sweep:
        record.clear(folder)
        record.write_status(folder, "REFUSED", exit_code_of(error), error=one_line(error), **facts)
    else:
        record.discard(folder)


def _run(cfg: DictConfig, folder: Path, facts: dict[str, Any], in_sweep: bool, make: MakeBackend | None) -> int:
    from xlpk import config, engine, metrics, record, tracking
    from xlpk.backend import BackendReport
    from xlpk.kv import KVPlan
    from xlpk.model import load_model
    from xlpk.settings import MlflowTracking
    from xlpk.workload import make_requests

    settings = engine.resolve_backend(config.validate(cfg))
    choice = settings.model
    path = Path(choice.path) if choice.path else None
    model = load_model(choice.name, path, choice.seed, choice.dtype, fill=engine.hash_fill(settings))
    if model.path is not None:
        model.weights.check_finite()
    settings = settings.for_model(model.generation)
    plan = KVPlan.make(settings.kv, model.config, model.weights.dtype, _max_len(settings, model))
    requests, notes = make_requests(settings.workload, settings.sampling, model, plan)
    for note in (*settings.notes, *notes):
        complain(note)

    if isinstance(settings.tracking, MlflowTracking):
        tracking.store_uri(settings.tracking, Path(settings.run.outputs))  # refuses what it cannot hold, before the run
    facts |= {
        "mode": settings.mode,
        "backend": settings.backend.name,
        "orchestration": settings.backend.orchestration,
        "model": model.name,
        "lossless": settings.lossless,
        "acceptance": settings.acceptance.name,
        "spec": f"{settings.spec.name} (block {settings.spec.block})",
        "name": _name(settings.mode, facts["overrides"]),
    }
    record.write_config(folder, record.effective_config(settings, model, plan, requests))
    record.write_status(folder, "RUNNING", None, pid=os.getpid(), **facts)
    outcome = engine.Outcome()
    failure: BaseException | None = None
    total = sum(request.max_new_tokens for request in requests)
    try:
        with engine.EventLog(folder / record.EVENTS) as log, _Bar(total) as bar:
            engine.serve(settings, model, plan, requests, make or engine.make_backend, log, outcome, bar.update)
    except BaseException as error:
        failure = error
    if isinstance(failure, InputError) and not outcome.outputs:
        (folder / record.EVENTS).unlink(missing_ok=True)
        raise failure  # the backend refused it before anything was measured
    if isinstance(failure, OSError) and failure.errno in UNWRITABLE:
        raise failure  # the folder cannot be written: no point in more files
    if not folder.is_dir():
        raise failure or FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    measured = metrics.compute(metrics.read_events(folder / record.EVENTS))
    record.write_metrics(folder, measured)
    record.write_texts(folder, model, requests, outcome.outputs, outcome.texts)
    record.write_build(folder, outcome.report or BackendReport())
    code = 0 if failure is None else exit_code_of(failure)
    if failure is None:
        record.write_status(folder, "FINISHED", 0)
    else:
        hang = {"hang": one_line(failure)} if isinstance(failure, HangError) else {}
        record.write_status(folder, "FAILED", code, error=one_line(failure), **hang)
        complain(f"{one_line(failure)} (run folder: {os.path.relpath(folder)})")
        if not isinstance(failure, InputError | ToolError | BackendError | KeyboardInterrupt):
            traceback.print_exception(failure)
    _signals.held = False
    _mirror(folder, settings)
    with _standard_output():
        _show(folder, settings, in_sweep, measured)
    return code


def _unwritable(folder: Path, error: Any) -> InputError:
    """What the system refused while the run's files were written."""
    where = error.filename or os.path.relpath(folder)
    if not folder.is_dir():
        return InputError("run.outputs", os.path.relpath(folder), "a folder that stays: it was removed during the run")
    return InputError("run.outputs", where, f"a folder that can be written ({error.strerror or error})")


def _name(mode: str, overrides: list[str]) -> str:
    """The mode and what else was asked of it, for tables and the list of runs in MLflow."""
    aside = ("mode=", "experiment=", "tracking", "run.", "hydra")
    return " ".join([mode, *(text for text in overrides if not text.startswith(aside))])


def _max_len(settings: Settings, model: Model) -> int:
    positions = model.config.max_position_embeddings
    if settings.model.max_len is None:
        return positions
    if settings.model.max_len > positions and not model.config.stretches:
        raise InputError("model.max_len", settings.model.max_len, f"at most the model's {positions} positions")
    return settings.model.max_len


def _mirror(folder: Path, settings: Settings) -> None:
    from xlpk.settings import MlflowTracking

    if isinstance(settings.tracking, MlflowTracking):
        from xlpk import tracking

        warning = tracking.mirror(folder, settings.tracking, Path(settings.run.outputs))
        if warning:
            complain(warning)


@contextlib.contextmanager
def _standard_output() -> Iterator[None]:
    """Whoever reads it may have gone, or its disk may be full: the run is complete all the same."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (*UNWRITABLE, errno.EPIPE, errno.EBADF):
            raise
        with open(os.devnull, "w") as nowhere:  # else the interpreter tries once more at its end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            complain(f"standard output cannot be written ({error.strerror}); the run is complete")


def _show(folder: Path, settings: Settings, in_sweep: bool, measured: dict[str, Any]) -> None:
    from xlpk import record, report

    if in_sweep:
        status = record.read_json(folder / record.STATUS)
        rate = measured.get("throughput/tokens_per_s")
        speed = f"{rate:.1f} tokens/s" if rate else "-"
        print(f"{folder.name}: {status['name']}: {status['status']}, {speed}", flush=True)
        return
    print(report.run_table(folder))
    _epilogue(folder, settings.run.outputs, folder)
    if settings.run.json:
        print(json.dumps(measured))


def _epilogue(folder: Path, outputs: str, shown: Path) -> None:
    """One completion in words, where everything lies, and the command that opens the MLflow UI on it."""
    from xlpk import record, report

    print(f"\n--- request 0, the model's words after >>>\n{report.completion(folder)}\n---")
    print(f"\nfolder: {os.path.relpath(shown)}")
    config = record.read_config(folder).get("tracking", {})
    if config.get("name") == "mlflow":
        from xlpk import tracking
        from xlpk.settings import MlflowTracking

        store = tracking.store_uri(MlflowTracking(uri=config.get("uri")), Path(outputs))
        print(f"MLflow UI: {report.ui_command(store)}")


def finish_sweep() -> int:
    """The comparison of the sweep that Hydra ran, if it ran one -> exit code of its first failure."""
    from xlpk import record, report

    sweep = report.current_sweep
    if sweep is None:
        return 0
    report.current_sweep = None
    folders = report.points_of(sweep)
    if not folders:
        (sweep / "multirun.yaml").unlink(missing_ok=True)  # Hydra's
        record.discard(sweep)
        return 0
    report.write_sweep_csv(sweep, folders)
    print(f"\n{report.sweep_table(folders)}")
    finished = [f for f in folders if record.read_json(f / record.STATUS).get("status") == "FINISHED"]
    if finished:
        config = record.read_config(finished[-1])
        _epilogue(finished[-1], config.get("run", {}).get("outputs", "outputs"), sweep)
        if config.get("run", {}).get("json"):
            points = [{"point": f.name, "metrics": record.read_json(f / record.METRICS)} for f in folders]
            print(json.dumps({"sweep": sweep.name, "points": points}))
    codes = [record.read_json(f / record.STATUS).get("exit_code") for f in folders]
    return next((code for code in codes if code), 0)


class _Bar:
    """A progress bar over output tokens; on a terminal only."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.shown_s = 0.0
        self.progress: Any = None

    def __enter__(self) -> _Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            text = TextColumn("{task.description}")
            self.progress = Progress(
                text,
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
                auto_refresh=False,
            )
            self.progress.start()
            self.task = self.progress.add_task("tokens", total=self.total)
        return self

    def update(self, n_tokens: int) -> None:
        if self.progress is not None and time.monotonic() - self.shown_s > 0.2:  # seldom: drawing takes the loop's core
            self.shown_s = time.monotonic()
            self.progress.update(self.task, completed=n_tokens, refresh=True)

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()


class _Signals:
    """Ctrl-C and SIGTERM: the first ends the run; a second one waits until the local files are complete."""

    def __init__(self) -> None:
        self.held = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if not self.held:
            self.held = True
            raise KeyboardInterrupt


_signals = _Signals()


def compose_and_run(argv: list[str], task: Callable[[DictConfig], int]) -> int:
    """Hydra on `argv` -> exit code. Hydra's own refusals become one line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and leaving
    import hydra
    import hydra.version

    from xlpk import config

    config.register()
    _codes.clear()
    base = "1.3" if tuple(map(int, hydra.__version__.split(".")[:2])) < (1, 4) else None
    typed, sys.argv = sys.argv, ["xlpk.run", *argv]
    code = 0
    try:
        hydra.main(config_path=f"pkg://{config.PACKAGE}", config_name="config", version_base=base)(task)()
    except KeyboardInterrupt:
        code = INTERRUPTED
        complain("interrupted")
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except OSError as error:
        if isinstance(error, config.COMPOSITION_ERRORS):
            code = _refused(config.explain(error, argv))
        else:
            allowed = f"a folder that can be written ({error.strerror})"
            code = _refused(InputError("run.outputs", error.filename, allowed))
    except (*config.COMPOSITION_ERRORS, ValueError) as error:
        code = _refused(config.explain(error, argv))
    finally:
        sys.argv = typed
    return code or next((one for one in _codes if one), 0)


def _refused(error: InputError) -> int:
    complain(one_line(error))
    return error.exit_code


def main(argv: list[str] | None = None) -> int:
    """The console entry; `argv` without the program's name."""
    if importlib.util.find_spec("hydra") is None or importlib.util.find_spec("xlpk.conf") is None:
        complain(INSTALL)
        return 2
    _take_signals()
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        code = compose_and_run(sys.argv[1:] if argv is None else argv, point)
        if "xlpk.report" in sys.modules:
            failed = 0
            with _standard_output():
                failed = finish_sweep()
            code = code if code == INTERRUPTED else failed or code
    except KeyboardInterrupt:  # while modules are imported, or a second one after the run's files were complete
        code = INTERRUPTED
        complain("interrupted")
    finally:
        _signals.held = True  # the process is leaving: one more must not turn its exit code into a traceback
    leave_if_lost(code)
    return code


def _take_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _signals)
        atexit.register(signal.signal, number, signal.SIG_IGN)  # else the interpreter's own end would be killed by it


if __name__ == "__main__":
    raise SystemExit(main())
