"""How far a sweep is, while it runs: a live table on a terminal, else a line a point; sweep.csv as points finish.

It reads the points' folders and nothing else, so it serves every launcher. Where points run in this very process
(`Watch.step`), nothing is read or drawn between the start and the end of a measurement but the bar over tokens.
Where they run in others, a thread looks once a second.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlpk import sweep_folder
from xlpk.sweep_table import Point, Points, write_sweep_csv
from xlpk.terminal import DRAW_S, complain

LOOK_S = 1.0
CSV_SHARE = 0.05  # of the time at most goes into rewriting sweep.csv
SHOWN = (("tokens/s", "throughput/tokens_per_s", "{:.1f}"), ("ttft p50 ms", "latency/ttft_ms.p50", "{:.2f}"))


class Watch:
    """The progress of one sweep in this process.

    Args:
        sweep: its folder.
        total: how many points the grid has; None if only the sweeper knows.
        apart: whether points run in other processes.
        session: how often the sweep was started.
        silent: whether what points write to their own streams is not seen here, so that their errors must be told.
    """

    def __init__(self, sweep: Path, total: int | None, apart: bool, session: int, silent: bool) -> None:
        self.sweep, self.total, self.apart = sweep, total, apart
        self.session, self.silent = session, silent
        self.points = Points(sweep)
        self.began_s = time.monotonic()
        self.told: set[Path] = set()
        self.csv_s = (0.0, 0.0)  # when it was last written, and how long that took
        self.tokens: tuple[int, int] | None = None  # of the point that runs in this process
        self.drawn_s = 0.0
        self.lock = threading.Lock()
        self.live: Any = None
        self.stopping = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(
                console=Console(stderr=True),
                auto_refresh=False,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self.live.start()
        if self.apart:
            self.thread = threading.Thread(target=self._look, name="sweep", daemon=True)
            self.thread.start()

    def stop(self) -> list[Point]:
        """Ends it -> the points; sweep.csv is complete."""
        self.stopping.set()
        if self.thread is not None:
            self.thread.join()
        points = self.step(last=True)
        if self.live is not None:
            self.live.stop()
        return points

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """For a point in a process of its own, which this one only waits for: the picture goes on meanwhile."""
        if self.live is None or self.thread is not None:
            yield
            return
        thread = threading.Thread(target=self._look, name="sweep", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.stopping.set()
            thread.join()
            self.stopping.clear()

    def _look(self) -> None:
        while not self.stopping.wait(LOOK_S):
            self.step()

    def step(self, last: bool = False) -> list[Point]:
        """Looks at the folders, tells what is new, rewrites sweep.csv, draws."""
        with self.lock:
            points = self.points.read()
            ended = [point for point in points if self._ended(point)]
            fresh = [point for point in ended if point.folder not in self.told]
            for point in fresh:
                self.told.add(point.folder)
                self._tell(point, points)
            written_s, took_s = self.csv_s
            if points and (last or (fresh and time.monotonic() - written_s >= took_s / CSV_SHARE)):
                begin_s = time.monotonic()
                write_sweep_csv(self.sweep, points)
                self.csv_s = (time.monotonic(), time.monotonic() - begin_s)
            self._draw(points)
            return points

    def update(self, n_tokens: int) -> None:
        """Output tokens of the point in this process so far; seldom drawn, from what is known already."""
        if self.live is not None and self.tokens is not None and time.monotonic() - self.drawn_s > DRAW_S:
            self.tokens = (n_tokens, self.tokens[1])
            self.drawn_s = time.monotonic()
            self._draw(self.points.known())

    def bar(self, total: int) -> PointBar:
        return PointBar(self, total)

    def _ended(self, point: Point) -> bool:
        """In this session, by whatever clock; a resumed sweep stamps the finished points that it passes."""
        return point.state in sweep_folder.ENDED and point.status.get("session", 0) == self.session

    def _tell(self, point: Point, points: list[Point]) -> None:
        error = point.status.get("error")
        if self.live is None:
            if point.status.get("skipped"):
                how = "finished before, skipped"
            elif point.state == "FINISHED":
                how = f"FINISHED, {_cell(point, SHOWN[0][1], '{:.1f} tokens/s')}"
            else:
                how = point.state
            eta_s = self.eta_s(points)
            rest = f" (ETA {clock(eta_s)})" if eta_s else ""
            print(f"[{self._count()}] {point.folder.name}: {point.name}: {how}{rest}", flush=True)
        if self.silent and error and point.state != "FINISHED":
            complain(f"{point.name}: {error} (folder: {point.folder.name})")
            if trace := point.status.get("traceback"):
                print(trace, file=sys.stderr, flush=True)

    def _count(self) -> str:
        return f"{len(self.told)}/{self.total or '?'}"

    def eta_s(self, points: list[Point]) -> float | None:
        """Seconds to the end, from the pace of the points that ran in this session; None before the first."""
        ran = sum(self._ended(point) and not point.status.get("skipped") for point in points)
        if not ran or self.total is None:
            return None
        return (time.monotonic() - self.began_s) / ran * max(0, self.total - len(self.told))

    def _draw(self, points: list[Point]) -> None:
        if self.live is None:
            return
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        room = max(3, self.live.console.height - 7)
        running = [point for point in points if point.state == "RUNNING"]
        ended = [point for point in points if point.folder in self.told]
        shown = [*ended[-max(1, room - len(running)) :], *running][:room] if running else ended[-room:]
        table = Table(box=None, pad_edge=False)
        table.add_column("point", no_wrap=True, overflow="ellipsis")
        table.add_column("status", no_wrap=True)
        for title, _, _ in SHOWN:
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("s", justify="right", no_wrap=True)
        for point in shown:
            style = {"FINISHED": "", "RUNNING": "cyan"}.get(point.state, "red")
            cells = [_cell(point, key, form) for _, key, form in SHOWN]
            table.add_row(f"{point.folder.name}: {point.name}", point.state, *cells, _seconds(point), style=style)
        failed = sum(point.state not in ("FINISHED", "RUNNING") for point in ended)
        eta_s = self.eta_s(points)
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self.total or max(1, len(points)), completed=len(self.told), width=30)
        line.add_row(
            bar,
            f"{self._count()} points" + (f", {failed} failed" if failed else ""),
            f"{len(running)} running" if self.apart else self._tokens_text(),
            f"{clock(time.monotonic() - self.began_s)} passed",
            f"ETA {clock(eta_s) if eta_s is not None else '-'}",
        )
        self.live.update(Group(table, line), refresh=True)

    def _tokens_text(self) -> str:
        return f"{self.tokens[0]}/{self.tokens[1]} tokens" if self.tokens else ""


class PointBar:
    """The tokens of a point that runs in the sweep's own process, in the sweep's picture."""

    def __init__(self, watch: Watch, total: int) -> None:
        self.watch, self.total = watch, total

    def __enter__(self) -> PointBar:
        self.watch.tokens = (0, self.total)
        if self.watch.live is not None:
            self.watch.step()
        return self

    def update(self, n_tokens: int) -> None:
        self.watch.update(n_tokens)

    def __exit__(self, *_: object) -> None:
        self.watch.tokens = None


def _cell(point: Point, key: str, form: str) -> str:
    value = point.metrics.get(key)
    return "-" if value is None else form.format(value)


def _seconds(point: Point) -> str:
    began, ended = point.status.get("started_unix_s"), point.status.get("ended_unix_s", time.time())
    return f"{ended - began:.1f}" if began else "-"


def clock(seconds: float) -> str:
    """Seconds as M:SS or H:MM:SS."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
