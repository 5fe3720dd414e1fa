"""The documentation names files that exist, and the metrics that a run makes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
PATTERN = re.compile(r"`((?:xlpk|kernels|tests|conf|docs|experiments|outputs)/[A-Za-z0-9_./-]*)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    named = set(PATTERN.findall(page.read_text()))
    missing = {name for name in named if not (ROOT / name).exists() and not name.startswith("outputs/")}
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_every_kernel_and_module_stands_in_the_table() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text()
    folders = (".", "backends", "config", "layout")
    modules = [path for folder in folders for path in (ROOT / "xlpk" / folder).glob("*.py")]
    kernels = [path for path in (ROOT / "kernels").rglob("*") if path.suffix in {".h", ".cu", ".cpp"}]
    names = [str(path.relative_to(ROOT)) for path in (*modules, *kernels) if path.name != "__init__.py"]
    covered = ("kernels/phases/", "kernels/generated/")
    helpers = ("kernels/platform/platform.h", "kernels/platform/cpu_words.h", "kernels/platform/chunk.h")
    absent = [name for name in names if name not in table and not name.startswith(covered) and name not in helpers]
    assert not absent


def rows() -> list[list[str]]:
    """The cells of the components' table."""
    table = (ROOT / "docs" / "architecture.md").read_text().partition("| component, mode, feature |")[2]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:] if line]


def test_every_component_has_a_file_a_test_and_a_status() -> None:
    assert len(rows()) > 80
    for row in rows():
        assert len(row) == 4, row
        component, files, tests, status = row
        assert component
        assert PATTERN.findall(files), row
        assert [name for name in PATTERN.findall(tests) if name.startswith("tests/")], row
        assert re.match(r"runs|compiles", status), row


def test_every_test_stands_in_the_table() -> None:
    named = {name for row in rows() for name in PATTERN.findall(row[2])}
    folders = tuple(name for name in named if name.endswith("/"))
    found = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")]
    assert not [name for name in found if name not in named and not name.startswith(folders)]


def test_every_option_and_command_stands_in_the_table() -> None:
    from xlpk import cli, completion, config_reference

    words = set(re.findall(r"[\w]+", " ".join(row[0] for row in rows())))
    asked = {option.name for found in config_reference.options().values() for option in found}
    asked |= set(completion.subcommands(cli._parser()))
    assert not sorted(asked - words)


def test_every_metric_is_defined() -> None:
    from test_metrics import LOG

    from xlpk import metrics

    page = (ROOT / "docs" / "metrics.md").read_text()
    made = {key.partition(".")[0] for key in metrics.compute(LOG)}
    generic = {re.sub(r"^phase/[a-z_]+?_(ms|share|bytes|gb_per_s|mbu)$", r"phase/PHASE_\1", key) for key in made}
    generic = {re.sub(r"^requests/finished_\w+$", "requests/finished_REASON", key) for key in generic}
    generic = {key.replace("device_latency/", "latency/") if key.endswith("_ms") else key for key in generic}
    assert len(generic) > 30
    assert not [key for key in sorted(generic) if f"`{key}`" not in page]
