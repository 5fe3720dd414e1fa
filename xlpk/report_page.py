"""`xlpk report RUN_OR_SWEEP... [-o FOLDER] [--fail-if EXPRESSION]`: one HTML page, one Markdown file with its figures.

FOLDER/report.html     everything, figures inline; nothing is fetched, so it opens from file:// and as an artifact
FOLDER/report.md       the same text and tables
FOLDER/figures/*.svg   its figures
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from xlpk import __version__, compare, record, rundata, thresholds
from xlpk.compare import Configuration
from xlpk.errors import InputError, ToolError, shown
from xlpk.report import columns
from xlpk.thresholds import Outcome, Threshold

HTML, MARKDOWN, FIGURES = "report.html", "report.md", "figures"
SHOWN = ("throughput/tokens_per_s", "latency/ttft_ms.p50", "device_latency/itl_ms.p50")  # in the terminal
MAX_ROWS = 20
FAILED = 1  # exit code when a threshold fails; 2, as everywhere, for bad input


def main(arguments: Sequence[Path], out: Path | None, expressions: Sequence[str], certain: bool) -> int:
    """Prints where the report is and what failed -> exit code: 0, or 1 if a threshold of --fail-if was crossed."""
    asked = [thresholds.parse(text) for text in expressions]
    configurations = compare.group(rundata.find(arguments))
    outcomes = check(configurations, asked, certain)
    folder = out if out is not None else default_folder(arguments)
    path = write(configurations, folder, outcomes)
    if table := comparison(configurations):
        print(table + "\n")
    print(f"report: {os.path.relpath(path)}")
    for outcome in outcomes:
        print(f"{'failed' if outcome.failed else 'passed'}: {outcome.line}")
    return FAILED if any(outcome.failed for outcome in outcomes) else 0


def comparison(configurations: Sequence[Configuration]) -> str:
    """For the terminal: each configuration against the first, in what users ask for first; empty for a single one."""
    able = [one for one in configurations if one.done]
    heads = [head for head in compare.HEADLINES if head.key in SHOWN and able and able[0].values(head.key)]
    rows = [[f"against {able[0].label}", *(head.title for head in heads)]] if able else []
    for one in able[1:]:
        verdicts = (compare.verdict(compare.compare(able[0], one, head.key), head.better) for head in heads)
        rows.append([one.label, *(" ".join(verdict.split()) for verdict in verdicts)])
    if len(rows) > MAX_ROWS:
        rows = [*rows[:MAX_ROWS], [f"and {len(rows) - MAX_ROWS} more", *("" for _ in heads)]]
    return columns(rows, left=True) if len(rows) > 1 else ""


def check(configurations: Sequence[Configuration], asked: Sequence[Threshold], certain: bool) -> list[Outcome]:
    return [outcome for one in asked for outcome in thresholds.check(one, configurations, certain)]


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """The report of runs and sweeps -> the path of its HTML page.

    Raises InputError for what is no run and no sweep, and ToolError without matplotlib or jinja2. Runs that failed,
    were refused or are damaged are shown as such.
    """
    return write(compare.group(rundata.find(folders)), out, [])


def default_folder(arguments: Sequence[Path]) -> Path:
    """Within the run or the sweep; of several, OUTPUTS/reports/DATE-TIME."""
    if len(arguments) == 1:
        return arguments[0] / "report"
    return record.outputs_of(arguments[0]) / "reports" / time.strftime("%Y-%m-%d_%H-%M-%S")


def write(configurations: Sequence[Configuration], out: Path, outcomes: Sequence[Outcome]) -> Path:
    try:
        import jinja2
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ToolError(f"a report needs {error.name}: python -m pip install matplotlib jinja2") from None
    from xlpk import report_sections

    sections = report_sections.build(configurations, outcomes)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"anchor": _anchor, "md": _markdown}
    runs = sum(len(one.runs) for one in configurations)
    n = len(configurations)
    context = {
        "title": _title(configurations),
        "intro": [f"{n} configuration{'s' * (n > 1)}, {runs} run{'s' * (runs > 1)}."],
        "sections": sections,
        "footer": f"xlpk {__version__}, {time.strftime('%Y-%m-%d %H:%M %Z')}, from {_folders(configurations)}",
    }
    try:
        (out / FIGURES).mkdir(parents=True, exist_ok=True)
        for section in sections:
            if section.figure is not None:
                head = '<?xml version="1.0" encoding="utf-8"?>\n'
                _write(out / FIGURES / f"{section.figure.name}.svg", head + section.figure.svg)
        folded = ("All metrics",)  # the page has it, metrics.csv too; a Markdown table of 150 rows helps nobody
        brief = {**context, "sections": [section for section in sections if section.title not in folded]}
        _write(out / MARKDOWN, re.sub(r"\n{3,}", "\n\n", environment.get_template("page.md.j2").render(brief)))
        _write(out / HTML, environment.get_template("page.html.j2").render(context))
    except OSError as error:
        raise InputError("-o", out, f"a folder that can be written ({error.strerror or error})") from None
    return out / HTML


def _template(name: str) -> str:
    return resources.files("xlpk").joinpath(name).read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    """Damaged files may hold half a surrogate pair, which UTF-8 cannot."""
    record.write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _title(configurations: Sequence[Configuration]) -> str:
    """The sweep, or the run's folder, of each argument."""
    names: dict[int, str] = {}
    for one in configurations:
        sweep = one.runs[0].facts.get("sweep_id")
        if isinstance(sweep, str) or one.argument not in names:
            names[one.argument] = sweep if isinstance(sweep, str) else one.runs[0].folder.name
    return shown("xlpk report: " + ", ".join(list(names.values())[:3]) + (", ..." if len(names) > 3 else ""), 200)


def _folders(configurations: Sequence[Configuration]) -> str:
    folders = [str(run.folder.resolve()) for one in configurations for run in one.runs]
    return folders[0] if len(folders) == 1 else os.path.commonpath(folders)


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _markdown(text: str) -> str:
    """Plain text as Markdown: nothing in it is markup, and a cell stays a cell."""
    text = re.sub(r"([\\`*_\[\]|<>~])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;")
