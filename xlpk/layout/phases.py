"""The phases of a step in their order, which yields the device enum, the launched kernels and the names in tables."""

from __future__ import annotations

from typing import NamedTuple


class Phase(NamedTuple):
    """The work between two grid barriers. `per` says how often a step runs it: `step` or `layer`."""

    name: str
    per: str
    doc: str
    when: str = ""  # the field of Step that must not be 0; empty: always


PHASES: tuple[Phase, ...] = (
    Phase("move", "step", "pages to the swap space and back", "n_moves"),
    Phase("embed", "step", "token embedding; RoPE angles; clears the samplers' maxima"),
    Phase("qkv", "layer", "norm, Q K V projections, RoPE, K and V written to their pages"),
    Phase("attend", "layer", "attention partials, one a (row, KV head, span of 256 keys)"),
    Phase("output", "layer", "merge of the partials, O projection, residual"),
    Phase("gate_up", "layer", "norm, gate and up projections, SiLU"),
    Phase("down", "layer", "down projection, residual"),
    Phase("lm_head", "step", "final norm, logits, keyed sampling as a running maximum"),
    Phase(
        "filter",
        "step",
        "rows with top-k, top-p, min-p or logprobs only: threshold, keyed maximum of what is kept",
        "n_filter_rows",
    ),
    Phase("control", "step", "one team: verify, commit, publish, admit, draft, plan the next step"),
)
OPTIONAL: dict[int, str] = {index: phase.when for index, phase in enumerate(PHASES) if phase.when}
PHASE_NAMES: tuple[str, ...] = tuple(phase.name for phase in PHASES)

FIRST_LAYER_PHASE = next(index for index, phase in enumerate(PHASES) if phase.per == "layer")
LAST_LAYER_PHASE = max(index for index, phase in enumerate(PHASES) if phase.per == "layer")


def phase_sequence(num_hidden_layers: int) -> list[tuple[int, int]]:
    """(phase, layer) in the order in which one step's forward pass runs them; control is not part of it."""
    first, last = FIRST_LAYER_PHASE, LAST_LAYER_PHASE
    before = [(index, 0) for index in range(first)]
    layers = [(index, layer) for layer in range(num_hidden_layers) for index in range(first, last + 1)]
    return before + layers + [(index, 0) for index in range(last + 1, len(PHASES) - 1)]
