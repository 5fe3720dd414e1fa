"""What the Chrome trace format asks of a file, and what its viewers cannot show otherwise."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]
NEEDED = {  # phase of an event -> its keys, beside ph, name, pid and tid
    "X": {"cat", "ts", "dur", "args"},
    "i": {"cat", "ts", "s", "args"},
    "C": {"ts", "args"},
    "M": {"args"},
}


def read(path: Path) -> list[Event]:
    """The events of a compressed trace, checked."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        document = json.load(file)
    assert set(document) == {"displayTimeUnit", "otherData", "traceEvents"}
    assert document["displayTimeUnit"] in ("ns", "ms")
    return checked(document["traceEvents"])


def checked(events: list[Event]) -> list[Event]:
    """Keys and types; rows in order of time; slices of a row nest; every row has a name."""
    rows: dict[tuple[int, int], list[Event]] = defaultdict(list)
    names: dict[tuple[int, int], str] = {}
    for event in events:
        assert set(event) == {"ph", "name", "pid", "tid", *NEEDED[event["ph"]]}, event
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["args"], dict)
        if event["ph"] == "M":
            if event["name"] == "thread_name":
                assert (event["pid"], event["tid"]) not in names, "a row is named once"
                names[event["pid"], event["tid"]] = event["args"]["name"]
            continue
        assert event["ts"] >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
        else:
            rows[event["pid"], event["tid"]].append(event)
    assert set(rows) <= set(names), "a row without a name"
    for row in rows.values():
        assert [event["ts"] for event in row] == sorted(event["ts"] for event in row)
        assert_nested([event for event in row if event["ph"] == "X"])
    for name in {event["name"] for event in events if event["ph"] == "C"}:
        times = [event["ts"] for event in events if event["ph"] == "C" and event["name"] == name]
        assert times == sorted(times)
    return events


def assert_nested(slices: list[Event]) -> None:
    """In the order of a row each slice lies within those that are open, or behind them."""
    ends: list[int] = []
    for event in slices:
        begin, end = ns(event["ts"]), ns(event["ts"]) + ns(event["dur"])
        assert end >= begin
        while ends and ends[-1] <= begin:
            ends.pop()
        assert not ends or end <= ends[-1], f"{event} runs over the end of the slice around it"
        ends.append(end)


def ns(microseconds: float) -> int:
    return round(microseconds * 1000)


def row(events: list[Event], pid: int, name: str) -> list[Event]:
    """The events of the row of that name."""
    (tid,) = (
        e["tid"] for e in events if e["ph"] == "M" and e["pid"] == pid and e["args"].get("name") == name and e["tid"]
    )
    return [event for event in events if event["ph"] in "Xi" and (event["pid"], event["tid"]) == (pid, tid)]
