"""A sweep, from the moment that Hydra starts one to the comparison at its end, in the process that launches it.

Hydra hands the composed config to `SweepCallback` before its sweeper and launcher see it. There the sweep gets its
folder (`run.sweep`, `run.resume`) and its repetitions: `run.repeat=N` becomes the slowest-varying key of the grid, so
that the repeats of compared points are interleaved (A B A B).
"""

from __future__ import annotations

import atexit
import math
import os
import secrets
import sys
import time
from pathlib import Path
from typing import IO, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from xlpk import launchers, record, sweep_folder
from xlpk.errors import InputError, one_line
from xlpk.progress import Watch
from xlpk.sweep_table import Point
from xlpk.terminal import complain

BASIC = "BasicLauncher"
SHARED_OUTPUT = ("BasicLauncher", "JoblibLauncher")  # launchers whose points write to this process's own streams


class Sweep:
    """One sweep as its launching process holds it."""

    def __init__(self, folder: Path, lock: IO[str], watch: Watch) -> None:
        self.folder, self.lock, self.watch = folder, lock, watch

    def close(self) -> list[Point]:
        """Hydra has left, failed or not -> the points."""
        points = self.watch.stop()
        self.lock.close()
        return points


current: Sweep | None = None  # set when Hydra starts one, taken by run.main when Hydra has left


class SweepCallback(Callback):  # type: ignore[misc,unused-ignore]
    """Not on_multirun_end: Hydra 1.3 skips that one when a job has failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global current
        try:
            current = begin(config)
        except InputError as error:  # Hydra turns a callback's exceptions into warnings
            complain(one_line(error))
            raise SystemExit(error.exit_code) from None
        except OSError as error:
            refused = InputError("run.outputs", error.filename, f"a folder that can be written ({error.strerror})")
            complain(one_line(refused))
            raise SystemExit(refused.exit_code) from None


def begin(config: DictConfig) -> Sweep:
    """Prepares the folder and the config of a sweep; what it changes in `config` holds for every point."""
    typed = [str(text) for text in config.hydra.overrides.task]
    launchers.check(str(config.hydra.launcher._target_))
    grid = _grid(config, typed)
    folder = _folder(config, typed)
    folder.mkdir(parents=True, exist_ok=True)
    lock = sweep_folder.hold(folder)
    known = sweep_folder.read(folder)
    session = int(known.get("session", 0)) + 1
    if session > 1:
        sweep_folder.bury(folder)
        (folder / sweep_folder.DOWN).unlink(missing_ok=True)
    # Absolute, and among Hydra's own overrides: points may run in other folders and on other machines.
    quoted = str(folder).replace("'", "\\'")
    with read_write(config), open_dict(config):
        config.hydra.sweep.dir = str(folder)
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")
        if config.run.repeat > 1:
            params = OmegaConf.to_container(config.hydra.sweeper.params) if config.hydra.sweeper.get("params") else {}
            assert isinstance(params, dict)
            config.hydra.sweeper.params = {sweep_folder.REPETITION: f"range({config.run.repeat})", **params}
    known_grid = str(config.hydra.sweeper._target_).endswith(".BasicSweeper")  # others choose points as they go
    total = math.prod(map(len, grid.values())) * config.run.repeat if known_grid else None
    facts = {
        "uid": known.get("uid") or secrets.token_hex(8),
        "id": str(folder.relative_to(root) if folder.is_relative_to(root := _root(config)) else folder.name),
        "started_unix_s": known.get("started_unix_s") or time.time(),
        "session": session,
        "overrides": sweep_folder.asked(typed),
        "swept": [key for key, values in grid.items() if len(values) > 1],
        "points": total,
        "repeat": config.run.repeat,
        "launcher": str(config.hydra.launcher._target_).rpartition(".")[2],
        "tracking": OmegaConf.to_container(config.tracking, resolve=True),
        "cwd": os.getcwd(),
        "argv": sys.argv[1:],
    }
    record.write_json(folder / sweep_folder.SWEEP, facts)
    launcher = facts["launcher"]
    watch = Watch(
        folder,
        total,
        apart=launcher != BASIC,
        session=session,
        silent=launcher not in SHARED_OUTPUT,
    )
    if launcher == "JoblibLauncher" and (note := _crowded(config, facts["swept"], total)):
        complain(note)
    if session > 1:
        found = sweep_folder.points_of(folder)
        done = sum(record.read_json(point / record.STATUS).get("status") == "FINISHED" for point in found)
        of = f" of {total}" if total else ""
        complain(f"run.resume: {os.path.relpath(folder)} has {done} finished points{of}; the others run")
    watch.start()
    return Sweep(folder, lock, watch)


def _root(config: DictConfig) -> Path:
    return Path(str(config.run.outputs)).resolve() / "sweeps"


def _folder(config: DictConfig, typed: list[str]) -> Path:
    """Where the sweep lies; refuses to write into one that is not to be resumed."""
    outputs, name, resume = Path(str(config.run.outputs)), config.run.sweep, config.run.resume
    own = any(str(text).startswith("hydra.sweep.dir=") for text in config.hydra.overrides.hydra)
    if name and own:
        raise InputError("run.sweep", name, "a sweep without hydra.sweep.dir, which says the same")
    if name:
        folder = sweep_folder.named(outputs, name)
    elif own or not resume:
        folder = Path(str(config.hydra.sweep.dir)).resolve()
    else:
        folder = sweep_folder.newest_like(outputs, typed)
    if not resume and sweep_folder.points_of(folder):
        field, value = ("run.sweep", name) if name else ("hydra.sweep.dir", os.path.relpath(folder))
        raise InputError(field, value, "a new sweep, or run.resume=true to finish the one that lies there")
    return folder


def _grid(config: DictConfig, typed: list[str]) -> dict[str, list[str]]:
    """Key -> the values that it takes, as Hydra's basic sweeper expands the sweeper's params and the command line."""
    sweep_folder.check_repeat(config.run.repeat)
    params = config.hydra.sweeper.get("params") or {}
    grid: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides([*(f"{k}={v}" for k, v in params.items()), *typed]):
        key = override.get_key_element()
        if not override.is_sweep_override():
            grid[key] = [override.get_value_element_as_str()]
        elif override.is_discrete_sweep():
            grid[key] = list(override.sweep_string_iterator())
        else:
            grid[key] = [str(override.value())]  # refused by the basic sweeper; other sweepers know what it means
    for key in (*sweep_folder.ASIDE, "run.repeat"):
        if key == sweep_folder.REPETITION and key in grid:
            raise InputError(key, ",".join(grid[key]), "set by run.repeat=N alone")
        if len(grid.get(key, ())) > 1:
            raise InputError(key, ",".join(grid[key]), "one value a sweep")
    return grid


def _crowded(config: DictConfig, swept: list[str], total: int | None) -> str | None:
    """Where points on cores would share them, or need not wait for each other. Points on a GPU take turns anyway."""
    if "threads" not in config.backend or {"backend", "backend.threads"} & set(swept):
        return None
    typed, threads = int(config.hydra.launcher.n_jobs), int(config.backend.threads)
    cores, each = launchers.cores(), launchers.threads_of(threads)
    jobs = typed if typed > 0 else cores
    jobs = min(jobs, total) if total else jobs
    if jobs * each > cores:
        what = f"{jobs} points of {each} threads at once disturb each other's measurements on {cores} cores"
        return f"hydra.launcher.n_jobs={typed}: {what}; hydra/launcher=joblib_cores runs as many as fit"
    if jobs == 1 < cores and total != 1:
        taken = f"backend.threads={threads} gives a point all {cores} cores; backend.threads=1 runs {cores} at once"
        return f"hydra.launcher.n_jobs=1: {taken}"
    return None


def discard(folder: Path) -> None:
    """Nothing stays of a sweep that never began."""
    for name in (*sweep_folder.FILES, *sweep_folder.LOCKS):
        (folder / name).unlink(missing_ok=True)
    record.discard(folder)


def abandon() -> None:
    """The last resort of a process that ends without having come to `run.finish_sweep`."""
    global current
    if current is not None:
        sweep, current = current, None
        sweep.close()


atexit.register(abandon)
