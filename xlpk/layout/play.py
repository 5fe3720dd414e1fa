"""Rules and result of kernels/play.cpp, which plays with the control plane alone and checks it."""

from __future__ import annotations

from xlpk.layout.record import Record

PLAY_REQUEST = Record(
    "PlayRequest",
    "A request of a play, in the order of submission, for who plays its trace again.",
    (
        ("request_id", "u64", ""),
        ("seed", "u64", ""),
        ("deadline_ns", "u64", "as submitted; 0: none"),
        ("prompt_len", "i32", "tokens"),
        ("max_new_tokens", "i32", ""),
        ("priority", "i32", ""),
        ("share", "i32", ""),
        ("pin", "i32", ""),
        ("n_output", "i32", "tokens that it put out"),
        ("n_answers", "i32", "right answers that came with it, the first of what it puts out"),
    ),
)

PLAY_RULES = Record(
    "PlayRules",
    "What kernels/play.cpp plays with the control plane alone; all of it drawn from `seed`.",
    (
        ("seed", "u64", ""),
        ("max_requests", "u64", ""),
        ("max_events", "u64", "events after which it ends"),
        ("mean_prompt", "i32", "tokens, geometric"),
        ("mean_output", "i32", "likewise"),
        ("prefixes", "i32", "half of the prompts begin with one of these"),
        ("prefix_tokens", "i32", ""),
        ("arrivals_per_step", "i32", ""),
        ("cancel_one_in", "i32", "steps between cancellations; 0: none, here and below"),
        ("deadline_one_in", "i32", "requests to one with a deadline"),
        ("private_one_in", "i32", "requests to one that shares nothing"),
        ("away_one_in", "i32", "rounds to one in which the host does not look at the rings"),
        ("priorities", "i32", "levels, uniform"),
        ("pins", "i32", "the first so many requests are pinned"),
        ("arrivals_beside", "i32", "requests that arrive while a step runs"),
        ("prepares", "i32", "1: they are taken beside it, and waiting ones prepared; 0: control does all"),
        ("recount_every", "i32", "events between full recounts; 0: none, and texts are not checked either"),
        ("requests", "PlayRequest*", "null, or what was submitted, [max_requests]"),
        ("texts", "int32_t*", "with it, prompt and output of each, [max_requests, Params.max_len]"),
    ),
)

PLAY_RESULT = Record(
    "PlayResult",
    "What came of it.",
    (
        ("events", "u64", ""),
        ("steps", "u64", ""),
        ("rows", "u64", ""),
        ("requests", "u64", "submitted"),
        ("finished", "u64", "by length"),
        ("cancelled", "u64", ""),
        ("late", "u64", "ended by a deadline"),
        ("preemptions", "u64", ""),
        ("evictions", "u64", ""),
        ("recomputed_rows", "u64", ""),
        ("moves", "u64", "pages copied"),
        ("prompt_tokens", "u64", ""),
        ("cached_tokens", "u64", "of them, found in shared pages"),
        ("drafts", "u64", "verified"),
        ("accepted", "u64", ""),
        ("control_ns", "u64", "time in control"),
        ("fault", "i32", "PlayFault; 0: every check held"),
        ("detail", "i32", ""),
    ),
)
