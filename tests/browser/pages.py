"""The MLflow UI as a user drives it: headless Chromium over the server that `xlpk ui` starts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have little of it
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SIZE = {"width": 1280, "height": 720}
# MLflow's assistant opens over the page at a first visit.
NO_ASSISTANT = """
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
"""
PATIENCE_MS = 180_000
ROW = ".ag-row"


def chromium() -> str | None:
    """The browser's executable, if the machine has one."""
    return next((found for name in CHROMIUM if (found := shutil.which(name))), None)


@contextlib.contextmanager
def xlpk_ui(outputs: Path) -> Iterator[str]:
    """The address that `xlpk ui` prints, on the store of `outputs`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    command = [sys.executable, "-m", "xlpk.cli", "ui", "--outputs", str(outputs)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[2]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 0


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """An empty page in a browser with a profile of its own."""
    with sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS), headless=True)
        page = window.new_page(viewport=SIZE)
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        page.add_init_script(NO_ASSISTANT)
        try:
            yield page
        finally:
            window.close()


def open_runs(page: Page, address: str) -> None:
    """The table of runs, in which a parent hides its children."""
    page.goto(address)
    page.get_by_text("matching runs").wait_for()


def expand_parent(page: Page, name: str) -> None:
    """Shows the children of the run whose name begins with `name`."""
    page.locator(ROW, has_text=name).get_by_role("button").first.click()


def select(page: Page, name: str) -> None:
    page.locator(ROW, has_text=name).locator("input.ag-checkbox-input").check(force=True)


def compare_selected(page: Page) -> None:
    """The page that compares the selected runs."""
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Run details").wait_for()


def scatter(page: Page, x: str, y: str) -> None:
    """A scatter plot of the compared runs: a param or metric against another."""
    page.get_by_role("tab", name="Scatter Plot").click()
    for axis, key in (("x", x), ("y", y)):
        page.locator(f"#{axis}-axis-selector").click()
        page.get_by_role("option", name=key, exact=True).click()


def plotted(page: Page) -> dict[str, float]:
    """x -> y of the points of the page's plot, as Plotly holds them."""
    trace = page.locator(".js-plotly-plot").first.evaluate("plot => ({x: plot.data[0].x, y: plot.data[0].y})")
    return dict(zip(trace["x"], trace["y"], strict=True))


def open_charts(page: Page, address: str, search: str) -> None:
    """The charts of the runs that are shown, but only those whose metric matches `search`."""
    page.goto(f"{address}?compareRunsMode=CHART")
    page.get_by_placeholder("Search metric charts").fill(search)


def open_artifact(page: Page, run: str, name: str) -> None:
    """From the table of runs: the run's page, its artifacts, one of them."""
    page.get_by_role("link", name=run, exact=True).click()
    page.get_by_role("tab", name="Artifacts").or_(page.get_by_role("link", name="Artifacts")).first.click()
    page.get_by_text(name, exact=True).first.click()
