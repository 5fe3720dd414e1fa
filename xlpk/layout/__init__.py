"""Every record and enum that host and device share, declared once.

A record is a numpy dtype (`align=True`) and, rendered by header.py, a C struct in `kernels/generated/layout.h` whose
size and offsets are asserted by each compiler. Pointers are 64-bit addresses in the address space of whoever runs the
kernels. Used as `layout.SUBMISSION`: which module declares a name concerns nobody outside of the package.

A new record goes into the module of its subject, `RECORDS` in header.py, and here; a new enum into enums.py, and here.
Then `python -m xlpk.layout`.
"""

from __future__ import annotations

from xlpk.layout.constants import (
    ATTENTION_SPAN,
    CONSTANTS,
    COST_KNOTS,
    FLIGHT_ENTRIES,
    GPU_LANES,
    GPU_THREADS,
    MAX_BIAS,
    MAX_BLOCK,
    MAX_LOGPROBS,
    MAX_STOP_IDS,
    MAX_TARGET,
    PROTECTED_SHARE,
    TOKENS_PER_LEVEL,
    VERSION,
    VIRTUAL_LANES,
    WATERMARK,
    WEIGHT_TILE_COLUMNS,
    WEIGHT_TILE_ROWS,
)
from xlpk.layout.control import GRID_STATE, LOOP_STATE, MOVE, PAGE, PATCH, QUEUE_ENTRY, ROW, SLOT, STEP
from xlpk.layout.enums import (
    ENUMS,
    AbortReason,
    Acceptance,
    EventKind,
    Eviction,
    FinishReason,
    LeaveReason,
    PlayFault,
    Policy,
    Proposer,
    Router,
    SlotState,
    TraceKind,
    WeightLayout,
    WeightType,
)
from xlpk.layout.model import DIMS, LAYER_WEIGHTS
from xlpk.layout.phases import OPTIONAL, PHASE_NAMES, PHASES, Phase, phase_sequence
from xlpk.layout.play import PLAY_REQUEST, PLAY_RESULT, PLAY_RULES
from xlpk.layout.record import Record
from xlpk.layout.rings import EVENT, LOGPROBS, MAILBOX, STEP_RECORD, SUBMISSION, power_of_two_at_least, ring_capacities
from xlpk.layout.session import PARAMS
from xlpk.layout.simulation import (
    SIMULATE_RESULT,
    SIMULATE_RULES,
    SIMULATED_OUTCOME,
    SIMULATED_REQUEST,
    SIMULATED_TOTALS,
    STEP_COSTS,
)
from xlpk.layout.traces import FLIGHT_ENTRY, SPAN_ENTRY, TRACE_ENTRY

__all__ = [
    "ATTENTION_SPAN",
    "CONSTANTS",
    "COST_KNOTS",
    "DIMS",
    "ENUMS",
    "EVENT",
    "FLIGHT_ENTRIES",
    "FLIGHT_ENTRY",
    "GPU_LANES",
    "GPU_THREADS",
    "GRID_STATE",
    "LAYER_WEIGHTS",
    "LOGPROBS",
    "LOOP_STATE",
    "MAILBOX",
    "MAX_BIAS",
    "MAX_BLOCK",
    "MAX_LOGPROBS",
    "MAX_STOP_IDS",
    "MAX_TARGET",
    "MOVE",
    "OPTIONAL",
    "PAGE",
    "PARAMS",
    "PATCH",
    "PHASES",
    "PHASE_NAMES",
    "PLAY_REQUEST",
    "PLAY_RESULT",
    "PLAY_RULES",
    "PROTECTED_SHARE",
    "QUEUE_ENTRY",
    "ROW",
    "SIMULATED_OUTCOME",
    "SIMULATED_REQUEST",
    "SIMULATED_TOTALS",
    "SIMULATE_RESULT",
    "SIMULATE_RULES",
    "SLOT",
    "SPAN_ENTRY",
    "STEP",
    "STEP_COSTS",
    "STEP_RECORD",
    "SUBMISSION",
    "TOKENS_PER_LEVEL",
    "TRACE_ENTRY",
    "VERSION",
    "VIRTUAL_LANES",
    "WATERMARK",
    "WEIGHT_TILE_COLUMNS",
    "WEIGHT_TILE_ROWS",
    "AbortReason",
    "Acceptance",
    "EventKind",
    "Eviction",
    "FinishReason",
    "LeaveReason",
    "Phase",
    "PlayFault",
    "Policy",
    "Proposer",
    "Record",
    "Router",
    "SlotState",
    "TraceKind",
    "WeightLayout",
    "WeightType",
    "phase_sequence",
    "power_of_two_at_least",
    "ring_capacities",
]
