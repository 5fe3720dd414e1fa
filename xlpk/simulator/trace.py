"""The decision trace: what the control plane decided, in order, as tuples with the fields of layout.TRACE_ENTRY."""

from __future__ import annotations

from xlpk.layout import FinishReason, TraceKind

Entry = tuple[int, int, int, int, int, int]  # round, value, kind, a, b, c

FIELDS: dict[TraceKind, tuple[str, ...]] = {  # names of value, a, b, c; empty: always 0
    TraceKind.ROUND: ("now_ns", "commits"),
    TraceKind.COMMIT: ("request", "tokens", "accepted", "computed"),
    TraceKind.ROOM: ("", "free_events", "step_room"),
    TraceKind.SEEN: (
        "request",
        "after_ns",
        "after_2_31_ns",
    ),  # since the round before, if beside a step; low bits, high
    TraceKind.CANCEL: ("request",),
    TraceKind.FINISH: ("request", "reason", "tokens"),
    TraceKind.ADMIT: ("request", "resumed", "shared_pages", "swapped_pages"),
    TraceKind.PREEMPT: ("request", "pages", "swapped_pages"),
    TraceKind.ALLOC: ("", "page"),
    TraceKind.EVICT: ("content", "page"),
    TraceKind.HOLD: ("content", "page", "refs"),
    TraceKind.RELEASE: ("", "page", "refs", "becomes"),
    TraceKind.PUBLISH: ("content", "page"),
    TraceKind.DEMOTE: ("", "page"),
    TraceKind.MOVE: ("", "page", "place", "out"),
    TraceKind.PLAN: ("", "draft_rows"),
    TraceKind.ROWS: ("request", "position", "rows", "prefill"),
    TraceKind.STEP: ("step", "rows", "sampled", "moves"),
    TraceKind.PIN: ("content", "page", "refs"),
}
_BECOMES = ("free", "cached", "held")


class Trace:
    """Collects entries. `round`: of those that come next."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.round = 0

    def __call__(self, kind: int, value: int = 0, a: int = 0, b: int = 0, c: int = 0) -> None:
        self.entries.append((self.round, value, kind, a, b, c))


def describe(entry: Entry) -> str:
    """One entry in words, such as `RELEASE page=3 refs=0 becomes=cached`."""
    _, *values = entry[0], entry[1], entry[3], entry[4], entry[5]
    kind = TraceKind(entry[2])
    words = [kind.name]
    for name, value in zip(FIELDS[kind], values, strict=False):
        if name == "reason":
            words.append(f"{name}={FinishReason(value).name.lower()}")
        elif name == "becomes":
            words.append(f"{name}={_BECOMES[value] if 0 <= value < len(_BECOMES) else value}")
        elif name:
            words.append(f"{name}={value}")
    return " ".join(words)
