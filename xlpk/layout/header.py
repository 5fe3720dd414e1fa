"""`kernels/generated/layout.h` as text: constants, enums, phases, records; each size and offset is asserted."""

from __future__ import annotations

from xlpk.layout.constants import CONSTANTS
from xlpk.layout.control import GRID_STATE, LOOP_STATE, MOVE, PAGE, PATCH, QUEUE_ENTRY, ROW, SLOT, STEP
from xlpk.layout.enums import ENUMS
from xlpk.layout.model import DIMS, LAYER_WEIGHTS
from xlpk.layout.phases import FIRST_LAYER_PHASE, LAST_LAYER_PHASE, PHASES
from xlpk.layout.play import PLAY_REQUEST, PLAY_RESULT, PLAY_RULES
from xlpk.layout.record import SCALARS, Record
from xlpk.layout.rings import EVENT, LOGPROBS, MAILBOX, STEP_RECORD, SUBMISSION
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

# In the order of the header.
RECORDS: tuple[Record, ...] = (
    DIMS,
    LAYER_WEIGHTS,
    SUBMISSION,
    EVENT,
    LOGPROBS,
    STEP_RECORD,
    ROW,
    STEP,
    SLOT,
    PAGE,
    QUEUE_ENTRY,
    MOVE,
    TRACE_ENTRY,
    STEP_COSTS,
    LOOP_STATE,
    PATCH,
    FLIGHT_ENTRY,
    SPAN_ENTRY,
    MAILBOX,
    GRID_STATE,
    PARAMS,
    PLAY_REQUEST,
    PLAY_RULES,
    PLAY_RESULT,
    SIMULATED_REQUEST,
    SIMULATED_OUTCOME,
    SIMULATED_TOTALS,
    SIMULATE_RULES,
    SIMULATE_RESULT,
)


def render() -> str:
    """The text of `kernels/generated/layout.h`."""
    out = [
        "// Rendered by `python -m xlpk.layout`; edit xlpk/layout/ instead.",
        "#pragma once",
        "#include <cstddef>",
        "#include <cstdint>",
        "",
        "namespace xl {",
        "",
        "// Storage of a bf16 number: the upper half of a float.",
        "struct bf16 {",
        "  uint16_t bits;",
        "};",
        "",
        "// Storage of an IEEE half.",
        "struct f16 {",
        "  uint16_t bits;",
        "};",
        "",
    ]
    for name, (value, doc) in CONSTANTS.items():
        out.append(f"constexpr int {name} = {value};  // {doc}")
    out.append("")
    for enumeration in ENUMS:
        members = ", ".join(f"{_camel(member.name)} = {member.value}" for member in enumeration)
        out.append(f"enum class {enumeration.__name__} : int32_t {{ {members} }};")
    out += ["", "enum class Phase : int32_t {"]
    out += [f"  {_camel(phase.name)} = {index},  // {phase.doc}" for index, phase in enumerate(PHASES)]
    out += ["};", f"constexpr int kPhases = {len(PHASES)};"]
    forward = ", ".join(f"X({phase.name}, {_camel(phase.name)})" for phase in PHASES[:-1])
    out.append(f"#define XL_FORWARD_PHASES(X) {forward.replace(', X', ' X')}")
    out += [
        f"constexpr int kFirstLayerPhase = {FIRST_LAYER_PHASE};",
        f"constexpr int kLastLayerPhase = {LAST_LAYER_PHASE};",
        "",
    ]
    for record in RECORDS:
        out.append(f"// {record.doc}")
        out.append(f"struct {record.name} {{")
        out += [f"  {_c_field(name, kind)}" + (f"  // {doc}" if doc else "") for name, kind, doc in record.fields]
        out.append("};")
        dtype = record.dtype
        out.append(f'static_assert(sizeof({record.name}) == {dtype.itemsize}, "{record.name}");')
        assert dtype.fields is not None
        out += [
            f'static_assert(offsetof({record.name}, {name}) == {dtype.fields[name][1]}, "{record.name}.{name}");'
            for name, _, _ in record.fields
        ]
        out.append("")
    out += [
        "#if defined(XL_VOCAB_SIZE)",
        "// The model's dimensions as compile-time constants, from -D definitions (see toolchain.dims_defines).",
        "struct ModelDims {",
        "  using Weight = XL_WEIGHT_TYPE;",
        "  using Cache = XL_CACHE_TYPE;",
        "  static constexpr WeightLayout weight_layout = WeightLayout(XL_WEIGHT_LAYOUT);",
    ]
    for name, kind, _ in DIMS.fields:
        out.append(f"  static constexpr {SCALARS[kind][1]} {name} = XL_{name.upper()};")
    out += ["};", "#endif", "", "}  // namespace xl"]
    return "\n".join(out) + "\n"


def _c_field(name: str, kind: str) -> str:
    if kind.endswith("*"):
        return f"{kind} {name};"
    if kind.endswith("]"):
        base, count = kind[:-1].split("[")
        return f"{SCALARS[base][1]} {name}[{count}];"
    return f"{SCALARS[kind][1]} {name};"


def _camel(name: str) -> str:
    return "k" + "".join(part.capitalize() for part in name.split("_"))
