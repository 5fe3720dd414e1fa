"""One run, or one point of a sweep, in the folder that Hydra made for it.

Composed config -> a workload served, the run folder complete, its mirror in MLflow, a table. Importing this module
registers the schema: a process that a launcher starts knows of xlpk what it unpickles, which is `point`.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import socket
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlpk import config, sweep_folder
from xlpk.errors import INTERRUPTED, HangError, InputError, exit_code_of, is_foreseen, one_line
from xlpk.hardware import Hardware
from xlpk.interrupts import interrupts
from xlpk.isolate import leave_if_lost
from xlpk.terminal import UNWRITABLE, Bar, TokenBar, complain, standard_output

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from xlpk.engine import MakeBackend
    from xlpk.model import Model
    from xlpk.progress import Watch
    from xlpk.settings import Settings

GPU_BACKENDS = ("persistent", "launched", "graph")
AS_SWEEP = -1  # instead of an exit code: the config asks for repetitions, so it is a sweep
codes: list[int] = []  # exit codes of this process's points, in order

config.register()


def point(cfg: DictConfig, make: MakeBackend | None = None) -> int:
    """Hydra's task -> the exit code."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    typed = [str(text) for text in hydra.overrides.task]
    if hydra.mode == RunMode.MULTIRUN:
        code = _point_of_sweep(cfg, folder, Path(str(hydra.sweep.dir)), typed, make)
    else:
        code = _single(cfg, folder, {"overrides": sweep_folder.asked(typed), "repetition": 0}, make)
    codes.append(code)
    if code == INTERRUPTED:
        raise KeyboardInterrupt  # ends a sweep too
    return code


def _single(cfg: DictConfig, folder: Path, facts: dict[str, Any], make: MakeBackend | None) -> int:
    """A run that is no point of a sweep, unless it is to be repeated."""
    run = cfg.run
    try:
        if run.repeat != 1:
            config.validate(cfg)  # once, not as often as it would be repeated
            sweep_folder.check_repeat(run.repeat)
        elif run.repetition:
            raise InputError("run.repetition", run.repetition, "set by run.repeat=N alone")
        elif run.resume or run.sweep is not None:
            field, value = ("run.resume", "true") if run.resume else ("run.sweep", run.sweep)
            raise InputError(field, value, "a sweep: -m in front, or run.repeat=N")
    except InputError as error:
        _refuse(folder, facts, error)
        return error.exit_code
    if run.repeat == 1:
        return _point(cfg, folder, facts, None, make)
    from xlpk import record

    record.discard(folder)
    return AS_SWEEP


def _point_of_sweep(cfg: DictConfig, folder: Path, sweep: Path, typed: list[str], make: MakeBackend | None) -> int:
    from xlpk import record

    about = sweep_folder.read(sweep)
    if (cwd := about.get("cwd")) and os.getcwd() != cwd and Path(cwd).is_dir():
        os.chdir(cwd)  # a worker's own folder: relative paths of the config mean the launching process's
    watch = _watch()
    facts = _facts_of_point(cfg, about, typed)
    if cfg.run.resume and (key := facts.get("config_key")):
        folder, earlier = sweep_folder.claim(sweep, folder, key)
        if earlier.get("status") == "FINISHED":
            record.write_json(folder / record.STATUS, {**earlier, "session": facts["session"], "skipped": True})
            if watch is not None:
                watch.step()
            return 0
        if sweep_folder.is_alive(folder, earlier):
            complain(f"{facts['name']}: still running, process {earlier.get('pid')} on {earlier.get('host')}")
            return 0
        record.clear(folder)
    facts["point"] = folder.name
    if make is None and _takes_a_device(cfg):
        from xlpk.isolate import run_isolated

        with watch.looking() if watch is not None else contextlib.nullcontext():
            code = run_isolated(cfg, folder, facts, cfg.run.deadline_s)
    else:
        code = _point(cfg, folder, facts, watch, make)
    if watch is not None:
        watch.step()
    return code


def _facts_of_point(cfg: DictConfig, about: dict[str, Any], typed: list[str]) -> dict[str, Any]:
    """What the point's status says of its place in the sweep."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides = sweep_folder.asked(typed)
    values = dict(text.partition("=")[::2] for text in overrides)
    swept = [f"{key}={values[key]}" for key in about.get("swept", []) if key in values]
    repetition = int(cfg.run.repetition)
    facts: dict[str, Any] = {
        "overrides": overrides,
        "repetition": repetition,
        "sweep_id": about.get("id"),
        "session": about.get("session", 1),
        "host": socket.gethostname(),
    }
    if swept:
        facts["name"] = _numbered(" ".join(swept), repetition, about.get("repeat", 1))
    elif about.get("repeat", 1) > 1:
        facts["name"] = _numbered(_name(str(cfg.mode.name), overrides), repetition, about["repeat"])
    try:
        resolved = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:
        return facts  # refused by name when it is validated
    assert isinstance(resolved, dict)
    return {**facts, "config_key": sweep_folder.config_key({str(key): value for key, value in resolved.items()})}


def _numbered(name: str, repetition: int, repeat: int) -> str:
    return f"{name} #{repetition}" if repeat > 1 else name


def _watch() -> Watch | None:
    """The progress of the sweep, in the process that launched it."""
    from xlpk import sweep

    return None if sweep.current is None or sweep.current.watch.apart else sweep.current.watch


def _point(
    cfg: DictConfig, folder: Path, facts: dict[str, Any], watch: Watch | None, make: MakeBackend | None = None
) -> int:
    try:
        return _run(cfg, folder, facts, watch, make)
    except (Exception, KeyboardInterrupt) as raised:
        error = _unwritable(folder, raised) if getattr(raised, "errno", None) in UNWRITABLE else raised
        _refuse(folder, facts, error)
        return exit_code_of(error)


def _takes_a_device(cfg: DictConfig) -> bool:
    name = cfg.backend.get("name")
    if name == "hf":
        return cfg.backend.get("device") != "cpu" and os.path.exists("/dev/nvidiactl")
    return name in GPU_BACKENDS or (name == "auto" and importlib.util.find_spec("pycuda") is not None)


def child_point(cfg: DictConfig, folder: Path, facts: dict[str, Any]) -> None:
    """A point of a sweep as the whole of this process, which ends with its exit code."""
    interrupts.take()
    code = _point(cfg, folder, facts, None)
    interrupts.held = True
    leave_if_lost(code)
    raise SystemExit(code)


def _refuse(folder: Path, facts: dict[str, Any], error: BaseException) -> None:
    """Nothing stays of a run that never began but, in a sweep, the reason; one that began keeps what it has."""
    from xlpk import record

    if not isinstance(error, KeyboardInterrupt):
        complain(one_line(error))
    if not is_foreseen(error):
        traceback.print_exception(error)
    why = _why(error)
    if (status := record.read_json(folder / record.STATUS)) and (folder / record.EVENTS).exists():
        if status.get("status") == "RUNNING":  # else it had ended, and what failed is MLflow or the terminal
            record.write_status(folder, "FAILED", exit_code_of(error), **why)
    elif "sweep_id" in facts:
        record.clear(folder)
        values = {"name": " ".join(facts["overrides"]), **facts, **why}
        record.write_status(folder, "REFUSED", exit_code_of(error), **values)
    else:
        record.discard(folder)


def _why(error: BaseException) -> dict[str, str]:
    """What a status says of the error that ended its run."""
    why = {"error": one_line(error)}
    if isinstance(error, HangError):
        why["hang"] = why["error"]
    if not is_foreseen(error):
        why["traceback"] = "".join(traceback.format_exception(error))
    return why


def _names_hardware(overrides: list[str], chosen: str) -> bool:
    """Whether the machine's bandwidth was said: by its group, by the number, or by an overlay that left the default."""
    keys = [text.partition("=")[0].lstrip("+~") for text in overrides]
    return chosen != Hardware.name or any(key in ("hardware", "hardware.memory_gb_per_s") for key in keys)


def _run(cfg: DictConfig, folder: Path, facts: dict[str, Any], watch: Watch | None, make: MakeBackend | None) -> int:
    from xlpk import engine, metrics, prediction, record, side_by_side, trace_file, tracking
    from xlpk.backend import BackendReport
    from xlpk.event_writer import EventLog
    from xlpk.kv import KVPlan
    from xlpk.model import load_model
    from xlpk.settings import MlflowTracking, SimulatedBackend
    from xlpk.workload import make_requests, pinned_requests

    settings = engine.resolve_backend(config.validate(cfg))
    settings = replace(settings, hardware_named=_names_hardware(facts["overrides"], settings.hardware.name))
    choice = settings.model
    path = Path(choice.path) if choice.path else None
    model = load_model(choice.name, path, choice.seed, choice.dtype, fill=engine.hash_fill(settings))
    if model.path is not None:
        model.weights.check_finite()
    settings = settings.for_model(model.generation)
    dtype, max_len = settings.stored_dtype(model.weights.dtype), max_len_of(settings, model)
    plan = KVPlan.make(settings.kv, model.config, dtype, max_len, lambda: engine.free_bytes(settings, model))
    pinned, plan = pinned_requests(settings.kv.pinned_texts(), model, plan)
    requests, notes = make_requests(settings.workload, settings.sampling, model, plan)
    if settings.kv.pressure is not None:
        lengths = [len(request.prompt) + request.max_new_tokens for request in requests]
        plan = plan.under_pressure(lengths, settings.scheduler.max_num_seqs, settings.kv.pressure)
    if isinstance(settings.backend, SimulatedBackend):
        from xlpk.backends.simulated import cost_notes

        notes += cost_notes(settings.backend, settings.sampling)
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
        "name": facts.get("name") or _name(settings.mode, facts["overrides"]),
    }
    if isinstance(settings.backend, SimulatedBackend):
        facts |= {"synthetic": True, "answers": settings.backend.answers}
    record.write_config(folder, record.effective_config(settings, model, plan, requests))
    record.write_status(folder, "RUNNING", None, pid=os.getpid(), **facts)
    outcome = engine.Outcome()
    failure: BaseException | None = None
    total = sum(request.max_new_tokens for request in requests)
    bar_of_tokens: Bar = watch.bar(total) if watch else TokenBar(total, alone="sweep_id" not in facts)
    try:
        with EventLog(folder / record.EVENTS) as log, bar_of_tokens as bar:
            engine.serve(settings, model, plan, requests, make or engine.make_backend, log, outcome, bar.update, pinned)
        if settings.mode == side_by_side.MODE:
            side_by_side.run_others(settings, model, plan, requests, folder)
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
    if settings.mode == side_by_side.MODE:
        measured |= side_by_side.compared(folder)
        side_by_side.write_figure(folder, measured)
    if isinstance(settings.backend, SimulatedBackend) and settings.backend.outcomes is not None:
        measured |= prediction.against(Path(settings.backend.outcomes), measured)
    record.write_metrics(folder, measured)
    record.write_texts(folder, model, requests, outcome.outputs, outcome.texts, facts.get("answers"))
    record.write_build(folder, outcome.report or BackendReport())
    if (folder / trace_file.DECISIONS).exists():
        for warning in trace_file.write(folder):
            complain(warning)
    code = 0 if failure is None else exit_code_of(failure)
    if failure is None:
        record.write_status(folder, "FINISHED", 0)
    else:
        record.write_status(folder, "FAILED", code, **_why(failure))
        complain(f"{one_line(failure)} (run folder: {os.path.relpath(folder)})")
        if not is_foreseen(failure):
            traceback.print_exception(failure)
    interrupts.held = False
    _mirror(folder, settings)
    if "sweep_id" not in facts:
        with standard_output():
            _show(folder, settings, measured)
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


def max_len_of(settings: Settings, model: Model) -> int:
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


def _show(folder: Path, settings: Settings, measured: dict[str, Any]) -> None:
    from xlpk import report

    print(report.run_table(folder))
    epilogue(folder, settings.run.outputs, folder)
    if settings.run.json:
        print(json.dumps(measured))


def epilogue(folder: Path, outputs: str, shown: Path, logged: bool = True) -> None:
    """One completion in words, where everything lies, and the command that opens the MLflow UI on it."""
    from xlpk import record, report, trace_file

    print(f"\n--- request 0, the model's words after >>>\n{report.completion(folder)}\n---")
    print(f"\nfolder: {os.path.relpath(shown)}")
    if (shown / trace_file.TRACE).exists():
        print(f"trace: open {os.path.relpath(shown / trace_file.TRACE)} at {trace_file.VIEWER}")
    config = record.read_config(folder).get("tracking", {})
    if config.get("name") == "mlflow" and not logged:
        from xlpk import tracking

        print(f"MLflow has not got all of it: {tracking.upload_command(shown)}")
    elif config.get("name") == "mlflow":
        from xlpk import tracking
        from xlpk.settings import MlflowTracking

        store = tracking.store_uri(MlflowTracking(uri=config.get("uri")), Path(outputs))
        print(f"MLflow UI: {report.ui_command(store)}")
