"""What a step costs on a virtual clock, and the workload and outcome of kernels/simulate.cpp."""

from __future__ import annotations

from xlpk.layout.constants import COST_KNOTS
from xlpk.layout.record import Record

STEP_COSTS = Record(
    "StepCosts",
    "What a step costs on a virtual clock, in nanoseconds; xlpk/costs.py has the formula.",
    (
        ("fixed_ns", "f64", "a step"),
        ("row_ns", f"f64[{COST_KNOTS}]", "all rows, at 1, 2, 4, ... rows"),
        ("sample_ns", f"f64[{COST_KNOTS}]", "all sampled rows, likewise"),
        ("filter_ns", f"f64[{COST_KNOTS}]", "all rows that the filter phase takes, likewise"),
        ("context_ns", "f64", "a token of context_tokens"),
        ("attended_ns", "f64", "a token of attended_tokens"),
        ("move_ns", "f64", "a page that is moved"),
        ("control_ns", "f64", "control, a step"),
        ("control_row_ns", "f64", "control, a row"),
        ("publish_ns", "f64", "from the end of a step until the host sees its tokens"),
        ("submit_ns", "f64", "from submission until the loop sees it"),
    ),
)

SIMULATED_REQUEST = Record(
    "SimulatedRequest",
    "A request of kernels/simulate.cpp; they come by arrival.",
    (
        ("arrival_ns", "u64", "virtual time at which the host submits it"),
        ("deadline_ns", "u64", "after its arrival; 0: none"),
        ("tokens_begin", "u64", "its prompt in SimulateRules.tokens, if there are any"),
        ("blocks_begin", "u64", "its first entry in SimulateRules.blocks"),
        ("n_blocks", "i32", "blocks of the prompt, from its beginning, that others may share; the rest is its own"),
        ("prompt_len", "i32", "tokens"),
        ("max_new_tokens", "i32", "it puts out as many"),
        ("priority", "i32", ""),
        ("share", "i32", "1: it may use pages of others and leave its own to them"),
        ("filtered", "i32", "1: its sampled rows take the filter phase"),
    ),
)

SIMULATED_OUTCOME = Record(
    "SimulatedOutcome",
    "What became of a request; times are of the loop's clock, -1: it never came so far.",
    (
        ("seen_ns", "i64", "the loop took it from the ring"),
        ("admitted_ns", "i64", "first admission"),
        ("first_token_ns", "i64", "commit of its first token; the host sees it publish_ns later, likewise below"),
        ("last_token_ns", "i64", ""),
        ("finished_ns", "i64", ""),
        ("instance", "i32", "that served it"),
        ("reason", "i32", "FinishReason"),
        ("n_output", "i32", "tokens"),
        ("n_cached", "i32", "prompt tokens found at its first admission"),
        ("n_preemptions", "i32", ""),
        ("n_drafts", "i32", "verified"),
        ("n_accepted", "i32", "of them"),
    ),
)

SIMULATED_TOTALS = Record(
    "SimulatedTotals",
    "What an instance of a simulated fleet did.",
    (
        ("requests", "u64", "routed to it"),
        ("finished", "u64", "ended, in whatever way"),
        ("steps", "u64", ""),
        ("rows", "u64", ""),
        ("sample_rows", "u64", ""),
        ("tokens", "u64", "put out"),
        ("prompt_tokens", "u64", "of requests that were admitted"),
        ("cached_tokens", "u64", "of them, found in shared pages at the first admission"),
        ("recomputed_rows", "u64", ""),
        ("evictions", "u64", ""),
        ("preemptions", "u64", ""),
        ("moves", "u64", "pages to the swap space and back"),
        ("drafts", "u64", "verified"),
        ("accepted", "u64", ""),
        ("busy_ns", "u64", "a step was in flight"),
        ("idle_ns", "u64", "until the fleet's last event"),
        ("present_ns", "u64", "integral over time of the requests that it had seen and not ended"),
        ("waiting_ns", "u64", "of them, those that were never admitted"),
    ),
)

SIMULATE_RULES = Record(
    "SimulateRules",
    "The workload of kernels/simulate.cpp and how it is served.",
    (
        ("requests", "const SimulatedRequest*", "[n_requests], by arrival"),
        ("outcomes", "SimulatedOutcome*", "[n_requests]"),
        ("totals", "SimulatedTotals*", "[n_instances]"),
        ("tokens", "const int32_t*", "prompts, or null: they are made from blocks and seeds"),
        ("blocks", "const uint64_t*", "what a block of a prompt is; equal numbers are equal tokens"),
        ("n_requests", "u64", ""),
        ("seed", "u64", "of prompts, outputs and the law of acceptance"),
        ("acceptance_rate", "f64", "share of the oracle's drafts that hold, drawn by (request, output index)"),
        ("hit_rate", "f64", "share of verifications for which the oracle has any drafts, likewise"),
        ("prompt_room", "i32", "tokens that the prompt ring holds beside drafts of the law; 0: its capacity"),
        ("block_tokens", "i32", "tokens of a block"),
        ("n_instances", "i32", ""),
        ("router", "i32", "Router"),
        ("affinity_blocks", "i32", "first blocks of a prompt by which PREFIX_AFFINITY routes"),
        ("affinity_percent", "i32", "of the mean load, above which it looks for the next instance"),
    ),
)

SIMULATE_RESULT = Record(
    "SimulateResult",
    "How a simulation ended.",
    (
        ("end_ns", "u64", "virtual time of the last event"),
        ("rounds", "u64", "of control, over all instances"),
        ("instance", "i32", "that stopped it"),
        ("fault", "i32", "AbortReason, or -1: an instance has requests and nothing to do"),
    ),
)
