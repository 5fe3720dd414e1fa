"""What the device writes for who looks at it: decisions of the control plane, phase spans, the flight recorder."""

from __future__ import annotations

from xlpk.layout.record import Record

TRACE_ENTRY = Record(
    "TraceEntry",
    "A decision of the control plane; what the fields say depends on its TraceKind.",
    (
        ("round", "u64", "of control, from 0"),
        ("value", "u64", ""),
        ("kind", "i32", "TraceKind"),
        ("a", "i32", ""),
        ("b", "i32", ""),
        ("c", "i32", ""),
    ),
)

SPAN_ENTRY = Record(
    "SpanEntry",
    "When a team ran its share of a phase, in its ring of phase spans.",
    (
        ("begin_ns", "u64", "device clock, behind the barrier in front of the phase"),
        ("end_ns", "u64", "its share is done; it goes to the barrier behind the phase"),
        ("step", "u32", "lowest bits of its number; control: of the step that it plans, else of the one it commits"),
        ("phase", "u16", "Phase"),
        ("layer", "u16", ""),
    ),
)

FLIGHT_ENTRY = Record(
    "FlightEntry",
    "What a team was about to do, in its ring of kFlightEntries.",
    (
        ("clock_ns", "u64", "device clock; 0: never written"),
        ("step", "u32", "lowest bits of its number"),
        ("phase", "u16", "Phase"),
        ("layer", "u16", ""),
    ),
)
