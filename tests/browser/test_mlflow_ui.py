"""What users came for: a sweep in the MLflow UI. Its children under their parent, compared in charts; its artifacts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xlpk import record

pytestmark = pytest.mark.heavy
pytest.importorskip("playwright", reason="playwright is not installed: pip install -e '.[browser]'")

from browser import pages  # noqa: E402
from playwright.sync_api import Page, expect  # noqa: E402

if pages.chromium() is None:
    pytest.skip("no Chromium: apt-get install chromium", allow_module_level=True)

BLOCKS = (1, 2, 4)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A sweep of three points with its MLflow store."""
    folder = tmp_path_factory.mktemp("browser") / "outputs"
    folder.mkdir()
    cache.mkdir(parents=True, exist_ok=True)
    (folder / "cache").symlink_to(cache)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    swept = f"spec.block={','.join(map(str, BLOCKS))}"
    command = [sys.executable, "-m", "xlpk.run", "-m", swept, "sampling.max_new_tokens=48", f"run.outputs={folder}"]
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(outputs: Path) -> Iterator[str]:
    with pages.xlpk_ui(outputs) as found:
        yield found


@pytest.fixture
def page() -> Iterator[Page]:
    with pages.browser() as opened:
        yield opened


def point(outputs: Path, block: int) -> Path:
    (folder,) = (
        status.parent
        for status in outputs.glob("sweeps/*/*/*/status.json")
        if f"spec.block={block}" in record.read_json(status)["overrides"]
    )
    return folder


def rate(outputs: Path, block: int) -> float:
    return float(record.read_json(point(outputs, block) / record.METRICS)["throughput/tokens_per_s"])


@pytest.fixture
def expanded(page: Page, address: str) -> Page:
    """The table of runs with the children shown."""
    pages.open_runs(page, address)
    pages.expand_parent(page, "sweep")
    for block in BLOCKS:
        page.get_by_role("link", name=f"spec.block={block}", exact=True).wait_for()
    return page


def test_the_parent_shows_its_children(page: Page, address: str) -> None:
    pages.open_runs(page, address)
    expect(page.get_by_role("link", name="sweep spec.block=1,2,4")).to_have_count(1)
    children = [page.get_by_role("link", name=f"spec.block={block}", exact=True) for block in BLOCKS]
    for child in children:
        expect(child).to_have_count(0)
    pages.expand_parent(page, "sweep")
    for child in children:
        expect(child).to_be_visible()


def test_children_are_compared(expanded: Page, outputs: Path) -> None:
    for block in BLOCKS[1:]:
        pages.select(expanded, f"spec.block={block}")
    pages.compare_selected(expanded)
    expect(expanded.get_by_text("Comparing 2 Runs")).to_be_visible()
    pages.scatter(expanded, "spec.block", "throughput/tokens_per_s")
    expect(expanded.locator(".xtitle")).to_have_text("spec.block")
    expect(expanded.locator(".ytitle")).to_have_text("throughput/tokens_per_s")
    assert pages.plotted(expanded) == {str(block): rate(outputs, block) for block in BLOCKS[1:]}


def test_a_chart_has_a_bar_a_child(expanded: Page, address: str, outputs: Path) -> None:
    pages.open_charts(expanded, address, "throughput/tokens_per_s")
    chart = expanded.locator(".js-plotly-plot").first
    for block in BLOCKS:
        expect(chart).to_contain_text(f"{rate(outputs, block):.2f}")


@pytest.mark.parametrize("name", ["text.txt", "metrics.csv"])
def test_artifacts_open(expanded: Page, outputs: Path, name: str) -> None:
    pages.open_artifact(expanded, "spec.block=4", name)
    text = (point(outputs, 4) / name).read_text()
    if name == "text.txt":
        expect(expanded.get_by_text(text.splitlines()[1]).first).to_be_visible()
    else:
        key, _, value = next(
            line for line in text.splitlines() if line.startswith("throughput/tokens_per_s")
        ).partition(",")
        expect(expanded.get_by_text(key, exact=True).first).to_be_visible()
        expect(expanded.get_by_text(value, exact=True).first).to_be_visible()
