"""The protocol between the engine and whatever runs the loop, and the events it yields.

The persistent loop owns control, so the protocol sits above it: submit, cancel, poll. Nothing here imports a backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from xlpk.kv import KVPlan
    from xlpk.model import Model
    from xlpk.workload import Request


class Admitted(NamedTuple):
    """The scheduler gave the request a slot and pages."""

    request_id: int
    step: int  # the step that was being planned
    device_ns: int
    host_ns: int  # host clock when the host saw it
    n_cached: int = 0  # tokens of its prompt whose K and V it found in pages of others


class Preempted(NamedTuple):
    """The request lost its pages to others of smaller rank; it waits, with what it has put out."""

    request_id: int
    step: int
    device_ns: int
    host_ns: int


class Resumed(NamedTuple):
    """A preempted request runs again."""

    request_id: int
    step: int
    device_ns: int
    host_ns: int
    n_cached: int = 0  # of its tokens, as of Admitted: its own pages among them, if nobody needed them


class Token(NamedTuple):
    """One output token became visible to the host."""

    request_id: int
    step: int
    device_ns: int
    host_ns: int
    token: int
    output_index: int  # 0 for the first output token
    n_drafts: int  # first token of a verification: drafts verified (0: none); else -1
    n_accepted: int  # likewise, accepted
    logprob: float | None = None  # of the token, where logprobs are asked for: by the model's own logits
    top_logprobs: tuple[tuple[int, float], ...] | None = None  # (token id, logprob), most likely first


class Finished(NamedTuple):
    """The request ended, in exactly one way."""

    request_id: int
    step: int
    device_ns: int
    host_ns: int
    reason: str  # eos stop target length deadline cancelled error
    n_output: int


class StepDone(NamedTuple):
    """A committed step: the fields of layout.STEP_RECORD as a dict, with `phase_ns` as a dict by phase name."""

    step: int
    host_ns: int
    values: dict[str, int]
    phase_ns: dict[str, int]


Event = Admitted | Preempted | Resumed | Token | Finished | StepDone


@dataclass
class BackendReport:
    """What a session cost the host, counted where the calls are made, and how it was built."""

    launches: int = 0
    syncs: int = 0
    h2d_copies: int = 0
    d2h_copies: int = 0
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    counted: bool = True  # False: a library makes the calls and nobody counts them; the six figures say nothing
    clock_error_ns: int = 0  # half the narrowest bracket of a device clock reading between two host readings
    details: dict[str, str] = field(default_factory=dict)  # threads, compiler, flags, library, ...


class Backend(Protocol):
    """A running loop. Calls are made from one thread; `close` may follow any of them."""

    name: str

    def open(self, model: Model, plan: KVPlan) -> None:
        """Builds, uploads, starts the loop. Raises ToolError or InputError; afterwards the loop waits for requests."""

    def submit(self, request: Request) -> bool:
        """Puts a request into the ring. False: the ring is full, try later. InputError: it can never run."""

    def cancel(self, request_id: int) -> None:
        """Asks that the request end; a Finished event follows, unless it has finished already."""

    def poll(self) -> list[Event]:
        """Events since the last call, oldest first, never blocking long. BackendError if the loop died."""

    def close(self) -> BackendReport:
        """Stops and joins the loop, frees what it had. Idempotent."""
