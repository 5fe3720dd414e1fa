"""A process of its own that sees a loop hang, whatever the run's own process is busy with.

It maps the region that host and device share. Work is pending and nothing moves, neither rounds of control nor the
flight recorder, for `HANG_S`: it writes the flight recorder into the run's folder, tells the run by a word of the
mailbox, and kills it if it has not ended `GRACE_S` later. It ends itself when the run does, however that ends: its
input closes.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from xlpk import layout

HANG_S = 3.0
GRACE_S = 6.0
LOOK_S = 0.1
FLIGHT_FILE = "flight.json"
STATUS_FILE = "status.json"  # as xlpk/record.py calls it


class Watchdog:
    """The run's end of it: starts the process, ends it."""

    def __init__(self, fd: int, offsets: dict[str, int], teams: int, folder: Path | None) -> None:
        """`fd`: of the shared region. `offsets`: of the mailbox and the flight recorder in it. `folder`: of the run."""
        job = {
            "fd": fd,
            "mailbox": offsets["mailbox"],
            "flight": offsets["flight"],
            "teams": teams,
            "pid": os.getpid(),
            "folder": str(folder.resolve()) if folder else "",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(fd,),
            start_new_session=True,  # Ctrl-C is for the run, which ends this
        )

    def ended(self) -> int | None:
        """The exit code of a process that is no longer there."""
        return self._process.poll()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def flight_records(flight: np.ndarray[Any, Any], last: int | None = None) -> list[dict[str, Any]]:
    """What each team did, oldest first: clock, step, phase and layer; of `flight` [teams, kFlightEntries]."""
    out = []
    for team, ring in enumerate(flight):
        written = ring[ring["clock_ns"] > 0]
        written = written[np.argsort(written["clock_ns"], kind="stable")]
        entries = [
            [
                int(e["clock_ns"]),
                int(e["step"]),
                layout.PHASE_NAMES[min(e["phase"], len(layout.PHASES) - 1)],
                int(e["layer"]),
            ]
            for e in (written if last is None else written[-last:])
        ]
        out.append({"team": team, "entries": entries})
    return out


def where(flight: np.ndarray[Any, Any]) -> str:
    """The last thing that was begun, in words."""
    last = [(record["entries"][-1], record["team"]) for record in flight_records(flight, 1) if record["entries"]]
    if not last:
        return "no team has begun anything"
    (_, step, phase, layer), team = max(last)
    behind = sum(entry[1:] != [step, phase, layer] for entry, _ in last)
    return f"team {team} last began phase {phase} of layer {layer} in step {step}; {behind} teams are elsewhere"


class _Watch:
    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        region = np.frombuffer(mmap.mmap(job["fd"], 0), np.uint8)
        size = layout.MAILBOX.dtype.itemsize
        self.mailbox = region[job["mailbox"] : job["mailbox"] + size].view(layout.MAILBOX.dtype)
        shape = (job["teams"], layout.FLIGHT_ENTRIES)
        nbytes = shape[0] * shape[1] * layout.FLIGHT_ENTRY.dtype.itemsize
        self.flight = region[job["flight"] : job["flight"] + nbytes].view(layout.FLIGHT_ENTRY.dtype).reshape(shape)

    def pending(self) -> bool:
        """A launch is on the device, and it has something to do: start, work, or leave."""
        box = self.mailbox[0]
        if box["launches"] <= box["n_left"] or box["abort"]:
            return False
        work = box["running"] or box["submit_tail"] != box["submit_head"] or box["cancel_tail"] != box["cancel_head"]
        return bool(work or box["stop"] or not box["progress"])

    def signs(self) -> tuple[int, int, int]:
        """What changes while the loop lives."""
        box = self.mailbox[0]
        return int(box["progress"]), int(box["n_left"]), zlib.crc32(self.flight.tobytes())

    def run(self) -> None:
        signs, since = self.signs(), time.monotonic()
        while not self.over(LOOK_S):
            seen = self.signs()
            if seen != signs or not self.pending():
                signs, since = seen, time.monotonic()
            elif time.monotonic() - since > HANG_S:
                return self.end()

    def over(self, within_s: float) -> bool:
        """Whether the run ended or closed this: its end of the pipe is gone."""
        return bool(select.select([sys.stdin], [], [], within_s)[0])

    def end(self) -> None:
        """Tells the run; without an answer, ends it and says so in its folder."""
        text = f"HANG: nothing moved on the device for {HANG_S:g} s; {where(self.flight)}"
        folder = Path(self.job["folder"]) if self.job["folder"] else None
        if folder is not None:
            with contextlib.suppress(OSError):
                (folder / FLIGHT_FILE).write_text(json.dumps({"reason": text, "teams": flight_records(self.flight)}))
        self.mailbox["hang"] = 1
        if self.over(GRACE_S):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.job["pid"], signal.SIGKILL)
        self.over(GRACE_S)
        if folder is not None:
            with contextlib.suppress(OSError, ValueError):
                status = json.loads((folder / STATUS_FILE).read_text())
                if status.get("status") == "RUNNING":
                    status |= {"status": "FAILED", "exit_code": 4, "error": f"{text}; killed", "hang": text}
                    (folder / STATUS_FILE).write_text(json.dumps(status, indent=1) + "\n")


if __name__ == "__main__":
    _Watch(json.loads(sys.argv[1])).run()
