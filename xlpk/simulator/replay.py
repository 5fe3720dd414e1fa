"""Replays a recorded decision trace: what came from outside is fed to the simulator, what was decided is compared.

From outside come submissions and cancellations as they were taken, the clock, the room in the rings, whether the loop
left, and the tokens that requests put out. Everything else has to come out equal, entry by entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Tokens
from itertools import groupby

from xlpk.backend import Event, StepDone
from xlpk.layout import TraceKind
from xlpk.simulator.control import ControlPlane
from xlpk.simulator.outcomes import Recorded
from xlpk.simulator.rules import Rules, SimRequest
from xlpk.simulator.sequence import Sequence
from xlpk.simulator.trace import Entry, Trace, describe
from xlpk.speculation import Greedy

_CONTEXT = 3  # entries shown before and after a difference


def replay(
    rules: Rules,
    requests: Iterable[SimRequest],
    outputs: Mapping[int, Tokens[int]],
    entries: Iterable[Entry],
    *,
    events: Iterable[Event] | None = None,
    may_leave: bool = True,
) -> list[str]:
    """The first difference between a trace and the simulator, in words; an empty list: there is none.

    Args:
        requests: all that were submitted.
        outputs: the tokens that they put out, by request id.
        entries: the trace from the start of the session, as `array.tolist()` gives TRACE_ENTRY.
        events: what the host saw, to be compared too but for `host_ns` and logprobs: all but the last ones, which it
            may not have taken, or all.
        may_leave: the loop may have left at any round and planned nothing; False: it was never told to.
    """
    by_id = {request.request_id: request for request in requests}
    outcomes = _Traced(rules, outputs)
    trace = Trace()
    control = ControlPlane(rules, outcomes, trace)
    seen = _Seen(events) if events is not None else None
    for number, group in groupby(entries, key=lambda entry: entry[0]):
        expected = list(group)
        control.n_rounds = number
        trace.entries.clear()
        failure = _round(control, by_id, outcomes, expected, may_leave)
        text = _difference(number, expected, trace.entries, failure)
        if text is None and seen is not None:
            text = seen.difference(number, control)
        control.events.clear()
        control.records.clear()
        if text is not None:
            return [text]
    return []


def _round(
    control: ControlPlane,
    requests: Mapping[int, SimRequest],
    outcomes: _Traced,
    expected: list[Entry],
    may_leave: bool,
) -> str:
    """Feeds one round of the trace -> why the simulator could not go through with it, if it could not."""
    inputs = {kind: [entry for entry in expected if entry[2] == kind] for kind in TraceKind}
    if not inputs[TraceKind.ROUND] or not inputs[TraceKind.ROOM]:
        return "the trace has no ROUND and ROOM here: its beginning is lost"
    (now_ns, (free, step_room)) = inputs[TraceKind.ROUND][0][1], inputs[TraceKind.ROOM][0][3:5]
    last_ns = control.now_ns
    outcomes.stored = {entry[1]: entry[5] for entry in inputs[TraceKind.COMMIT]}
    try:
        beside_step = True  # entries in front of ROUND were made while the last step ran
        for _, value, kind, a, b, _ in expected:
            beside_step = beside_step and kind != TraceKind.ROUND
            if kind == TraceKind.SEEN:
                if value not in requests:
                    return f"request {value} is not known"
                if not control.submit(requests[value]):
                    return f"request {value} does not fit into the rings"
                if beside_step:
                    control.prepare(last_ns + a + (b << 31))
        for entry in inputs[TraceKind.CANCEL]:
            control.cancel(entry[1])
        leave = may_leave and not inputs[TraceKind.PLAN]
        control.round(now_ns, free_events=free, step_room=bool(step_room), leave=leave)
    except Exception as error:  # a simulator that is wrong may fail anywhere, and so it shows
        return f"{type(error).__name__}: {error}"
    return ""


def _difference(number: int, expected: list[Entry], got: list[Entry], failure: str) -> str | None:
    at = next((i for i, (one, two) in enumerate(zip(expected, got, strict=False)) if one != two), None)
    if at is None:
        if not failure and len(expected) == len(got):
            return None
        at = min(len(expected), len(got))
    lines = [
        f"round {number}, entry {at}:",
        f"  recorded:  {describe(expected[at]) if at < len(expected) else 'nothing'}",
        f"  simulated: {describe(got[at]) if at < len(got) else failure or 'nothing'}",
    ]
    lines += [f"  before: {describe(entry)}" for entry in expected[max(at - _CONTEXT, 0) : at]]
    lines += [f"  then recorded:  {describe(entry)}" for entry in expected[at + 1 : at + 1 + _CONTEXT]]
    lines += [f"  then simulated: {describe(entry)}" for entry in got[at + 1 : at + 1 + _CONTEXT]]
    return "\n".join(lines)


class _Traced(Recorded):
    """Recorded outputs. Under greedy acceptance they do not say which drafts held; the trace's COMMIT does.

    stored: tokens that each COMMIT of the round leaves stored, by request.
    """

    def __init__(self, rules: Rules, outputs: Mapping[int, Tokens[int]]) -> None:
        super().__init__(outputs, rules.acceptance)
        self._greedy = isinstance(rules.acceptance, Greedy)
        self.stored: dict[int, int] = {}

    def verify(self, sequence: Sequence, drafts: Tokens[int]) -> tuple[list[int], int]:
        if not self._greedy or not drafts:
            return super().verify(sequence, drafts)
        index = sequence.n_output
        n_accepted = min(max(self.stored[sequence.request_id] - len(sequence.tokens), 0), len(drafts))
        own = self.token(sequence, index + n_accepted)
        return [*drafts[:n_accepted], own], n_accepted


class _Seen:
    """The host's events, compared round by round."""

    def __init__(self, events: Iterable[Event]) -> None:
        steps: list[StepDone] = []
        others: list[Event] = []
        for event in events:
            if isinstance(event, StepDone):
                steps.append(event)
            else:
                others.append(event)
        self._events: Iterator[Event] = iter(others)
        self._steps: Iterator[StepDone] = iter(steps)

    def difference(self, number: int, control: ControlPlane) -> str | None:
        for record in control.records:
            step = next(self._steps, None)
            if step is None:
                break
            for name, value in record.items():
                if step.values[name] != value:
                    return f"round {number}, step {record['step']}: {name} is {value}, recorded {step.values[name]}"
        for event in control.events:
            recorded = next(self._events, None)
            if recorded is not None and _without_host(recorded) != _without_host(event):
                return f"round {number}: the host saw {recorded}, simulated {event}"
        return None


def _without_host(event: Event) -> tuple[object, ...]:
    """What both sides know of an event: not when the host saw it, nor its logprobs."""
    fields = {name: value for name, value in event._asdict().items() if "host_ns" not in name and "logprob" not in name}
    return (type(event).__name__, *fields.values())
