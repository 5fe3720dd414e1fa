"""`python -m xlpk.run`: Hydra on the command line, one run or a sweep, and the exit code.

Exit codes: 0 all went well, 2 bad input, 3 a tool is missing, 4 the backend died, 130 interrupted, 1 anything else. In
a sweep the other points go on and the code is that of the first failure.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from xlpk.errors import INTERRUPTED, InputError, one_line
from xlpk.interrupts import interrupts
from xlpk.isolate import leave_if_lost
from xlpk.process import leave
from xlpk.terminal import complain, standard_output

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from xlpk.sweep_table import Point

INSTALL = "xlpk is not installed: run `make run`, or `python -m pip install -e .` in the checkout"
REPORT_POINTS, REPORT_BYTES = 100, 1 << 25  # of event logs; a larger sweep is told the command instead


def compose_and_run(argv: list[str], task: Callable[[DictConfig], int]) -> int:
    """Hydra on `argv` -> exit code. Hydra's own refusals become one line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and leaving
    import hydra
    import hydra.version

    from xlpk import config

    if "--help" in argv:
        _list_no_groups()
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
        elif error.errno == errno.EPIPE:  # whoever read the help or the config has gone
            with standard_output():
                raise
        else:
            allowed = f"a folder that can be written ({error.strerror})"
            code = _refused(InputError("run.outputs", error.filename, allowed))
    except (*config.COMPOSITION_ERRORS, ValueError) as error:
        code = _refused(config.explain(error, argv))
    finally:
        sys.argv = typed
    return code


def _list_no_groups() -> None:
    """Hydra lists all groups with all their options for the help, a second's work, and our help has its own list."""
    from hydra._internal import hydra

    if hasattr(hydra.Hydra, "format_config_groups"):
        hydra.Hydra.format_config_groups = lambda *_, **__: ""


def _refused(error: InputError) -> int:
    complain(one_line(error))
    return error.exit_code


def run_or_sweep(argv: list[str]) -> int:
    """One run, or a sweep; a config with repetitions is a sweep without -m too."""
    from xlpk import point

    point.codes.clear()
    code = compose_and_run(argv, point.point)
    if point.codes == [point.AS_SWEEP]:
        point.codes.clear()
        code = compose_and_run(["-m", *argv], point.point)
    return code or next((one for one in point.codes if one), 0)


def finish_sweep(code: int) -> int:
    """The comparison of the sweep that Hydra ran, if it ran one, and left with `code` -> that of its first failure."""
    from xlpk import sweep as sweeps
    from xlpk import sweep_folder

    sweep, sweeps.current = sweeps.current, None
    if sweep is None:
        return code
    points = sweep.close()
    if points:
        sweep_folder.bury(sweep.folder)
        points = sweep.watch.points.read()
        with standard_output():
            _compare(sweep.folder, points, interrupted=code == INTERRUPTED)
    else:
        sweeps.discard(sweep.folder)
    own = [point for point in points if point.status.get("session") == sweep.watch.session]
    missing = max(0, (sweep.watch.total or 0) - len(own))
    if missing and (points or not code):
        complain(f"{missing} of {sweep.watch.total} points never ran; the same command with run.resume=true runs them")
    if code == INTERRUPTED:
        return code
    failed = next((point.status["exit_code"] for point in own if point.status.get("exit_code")), 0)
    return failed or code or (1 if missing else 0)


def _compare(sweep: Path, points: list[Point], interrupted: bool) -> None:
    """The table of the sweep, its report, and where everything lies; the parent run in MLflow gets its end."""
    from xlpk import record, sweep_folder, tracking
    from xlpk.point import epilogue
    from xlpk.sweep_table import sweep_table

    print(f"\n{sweep_table(points)}", flush=True)
    finished = [point for point in points if point.state == "FINISHED"]
    config = record.read_config(finished[-1].folder).get("run", {}) if finished else {}
    report = _report(sweep, points) if config.get("report") and not interrupted else None
    if warning := tracking.finish_sweep(sweep):
        complain(warning)
    if not finished:
        return
    logged = not (sweep / sweep_folder.DOWN).exists()
    epilogue(finished[-1].folder, config.get("outputs", "outputs"), sweep, logged)
    print(f"report: {report or f'{record.program()} report {os.path.relpath(sweep)}'}")
    if config.get("json"):
        values = [{"point": point.folder.name, "metrics": point.metrics} for point in points]
        print(json.dumps({"sweep": sweep.name, "points": values}))


def _report(sweep: Path, points: list[Point]) -> str | None:
    """Where the report of a sweep lies, if it takes seconds to make; one that fails costs a line."""
    from xlpk import record

    logs = [point.folder / record.EVENTS for point in points]
    if len(points) > REPORT_POINTS or sum(log.stat().st_size for log in logs if log.exists()) > REPORT_BYTES:
        return None
    try:
        from xlpk import report_page

        return os.path.relpath(report_page.write_report([sweep], report_page.default_folder([sweep])))
    except Exception as error:
        complain(f"no report: {one_line(error)}")
        return None


def main(argv: list[str] | None = None) -> int:
    """The console entry; `argv` without the program's name."""
    if importlib.util.find_spec("hydra") is None or importlib.util.find_spec("xlpk.conf") is None:
        complain(INSTALL)
        return 2
    interrupts.take()
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        code = run_or_sweep(sys.argv[1:] if argv is None else argv)
        if "xlpk.sweep" in sys.modules:
            code = finish_sweep(code)
    except KeyboardInterrupt:  # while modules are imported, or a second one after the run's files were complete
        code = INTERRUPTED
        complain("interrupted")
    finally:
        interrupts.held = True  # the process is leaving: one more must not turn its exit code into a traceback
    leave_if_lost(code)
    return code


if __name__ == "__main__":
    leave(main())
