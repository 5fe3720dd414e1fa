"""What host and device say to each other: the mailbox, the rings, and how much a session's rings hold."""

from __future__ import annotations

from xlpk.layout.constants import MAX_BIAS
from xlpk.layout.phases import PHASES
from xlpk.layout.record import Record

# How a request wants its tokens: the same in its submission and in its slot.
SAMPLING = (
    ("temperature", "f32", "0: greedy"),
    ("top_k", "i32", "0: off"),
    ("top_p", "f32", "1: off"),
    ("min_p", "f32", "0: off"),
    ("repetition_penalty", "f32", "1: off"),
    ("presence_penalty", "f32", "0: off"),
    ("frequency_penalty", "f32", "0: off"),
    ("n_logprobs", "i32", "0..kMaxLogprobs most likely tokens to publish beside each token; -1: none"),
    ("n_bias", "i32", "logit biases"),
    ("n_target", "i32", "0..kMaxTarget; 0: none"),
    ("target", "i32[16]", "token ids; the request ends when its output ends with them"),
)

SUBMISSION = Record(
    "Submission",
    "A request as the host writes it into the submission ring; its tokens lie in the prompt ring.",
    (
        ("request_id", "u64", "unique within a session"),
        ("prompt_begin", "u64", "running index of its first token in the prompt ring"),
        ("seed", "u64", "key of its sampling noise"),
        ("prompt_len", "i32", "tokens, >= 1"),
        (
            "oracle_len",
            "i32",
            "right answers behind the prompt in the prompt ring; n_bias pairs (id, float) follow",
        ),
        ("max_new_tokens", "i32", ">= 1; prompt_len + max_new_tokens <= Params.max_len"),
        ("ignore_eos", "i32", "0 or 1; end-of-sequence ids are not stop ids, they are Params.eos_ids"),
        ("n_stop_ids", "i32", "0..kMaxStopIds"),
        *SAMPLING,
        ("stop_ids", "i32[8]", "token ids that end the output; the token itself is part of it"),
        ("deadline_ns", "u64", "time it has from when the loop sees it; 0: for ever"),
        ("priority", "i32", "lower goes first, under Policy.PRIORITY"),
        ("share", "i32", "1: it may use pages of others and leave its own to them"),
        ("pin", "i32", "1: the full pages of its prompt are held for good; needs `share`"),
    ),
)

EVENT = Record(
    "Event",
    "What the device publishes about a request, in order, in the event ring.",
    (
        ("request_id", "u64", ""),
        ("step", "u64", "the step that produced it"),
        ("device_ns", "u64", "device clock when it was published"),
        ("kind", "i32", "EventKind"),
        ("token", "i32", "TOKEN: its id"),
        ("output_index", "i32", "TOKEN: 0 for the first output token; FINISHED: number of output tokens"),
        ("reason", "i32", "FINISHED: FinishReason"),
        ("n_drafts", "i32", "first TOKEN of a verification: drafts verified; else -1"),
        ("n_accepted", "i32", "likewise, accepted; the last token of an output is not counted"),
        ("n_logprobs", "i32", "TOKEN: -1, or Params.logprobs has an entry at the same place of the ring"),
        ("n_cached", "i32", "ADMITTED, RESUMED: tokens whose K and V were found in shared pages"),
    ),
)

LOGPROBS = Record(
    "Logprobs",
    "Log-probabilities of the model's own logits at one position, before bias, penalties and temperature.",
    (
        ("n", "i32", "valid entries of ids and values; -1: none were asked for"),
        ("token", "f32", "of the token that was emitted"),
        ("log_sum", "f32", "log of the sum of exp(logit)"),
        ("keyed", "f32", "logit of the keyed sample"),
        ("greedy", "f32", "logit of the argmax after bias and penalties"),
        ("ids", "i32[20]", "most likely first; ties by id"),
        ("values", "f32[20]", ""),
    ),
)

STEP_RECORD = Record(
    "StepRecord",
    "What a step did and the state it left, published in the step ring when it was committed.",
    (
        ("step", "u64", "1 for the first step of the session"),
        ("begin_ns", "u64", "device clock when the step was planned"),
        ("end_ns", "u64", "device clock when it was committed"),
        ("n_rows", "i32", "rows of the step"),
        ("n_prefill_rows", "i32", ""),
        ("n_decode_rows", "i32", ""),
        ("n_draft_rows", "i32", ""),
        ("n_sample_rows", "i32", "rows that reached the LM head"),
        ("n_accepted", "i32", "drafts accepted"),
        ("n_tokens", "i32", "tokens emitted"),
        ("n_waiting", "i32", "requests that were never admitted, in the rings or with a slot"),
        ("n_preempted", "i32", "requests that had run and wait for pages"),
        ("n_prefill", "i32", "requests that had prefill rows in the step"),
        ("n_decode", "i32", "requests that had a decode row in the step"),
        ("n_finished", "i32", "requests that the step finished"),
        ("n_recomputed_rows", "i32", "prefill rows at positions that were stored before a preemption"),
        ("n_preemptions", "i32", "while it was planned"),
        ("n_moves", "i32", "pages copied to the swap space or back"),
        ("n_evictions", "i32", "cached pages that were given new owners while it was planned"),
        ("pages_total", "i32", "conservation: free + cached + active + draft = total"),
        ("pages_free", "i32", "while the step ran"),
        ("pages_cached", "i32", "held by nobody, kept for their content"),
        ("pages_active", "i32", "hold or will hold committed tokens"),
        ("pages_draft", "i32", "hold unverified tokens only"),
        ("pages_pinned", "i32", "part of active: held for good"),
        ("pages_locked", "i32", "part of active without the pages that only requests with no row in the step hold"),
        ("context_tokens", "i32", "tokens whose K and V the step had to read, once a request, its own rows included"),
        ("attended_tokens", "i64", "tokens that its rows attend to, summed over rows"),
        (
            "live_tokens",
            "i32",
            "committed tokens of running requests whose K and V are stored, after the step; shared ones once",
        ),
        ("live_pages", "i32", "pages that hold them, after the step; shared ones once"),
        ("phase_ns", f"u64[{len(PHASES)}]", "device time a phase took, barrier included, summed over layers"),
    ),
)

MAILBOX = Record(
    "Mailbox",
    "Words that host and device write for each other; each writer's words share no line with another's.",
    (
        ("submit_tail", "u64", "host: submissions written"),
        ("cancel_tail", "u64", "host: cancellations written"),
        ("event_head", "u64", "host: events taken"),
        ("step_head", "u64", "host: step records taken"),
        ("prompt_tail", "u64", "host: prompt tokens written"),
        ("heartbeat", "u64", "host: changes while the host is alive"),
        ("ping", "u64", "host: asks an idle loop for its clock"),
        ("stop", "u64", "host: 1 asks the loop to leave"),
        ("launches", "u32", "host: launches of the loop"),
        ("hang", "u32", "watchdog: 1 says that nothing moves"),
        ("trace_head", "u64", "host: entries of the decision trace taken; read only where there is one"),
        ("host_pad", "u8[48]", ""),
        ("submit_head", "u64", "device: submissions taken"),
        ("cancel_head", "u64", "device: cancellations taken"),
        ("event_tail", "u64", "device: events published; on 16 bytes with the next: one store"),
        ("step_tail", "u64", "device: step records published"),
        ("prompt_head", "u64", "device: prompt tokens taken"),
        ("abort", "u32", "device: AbortReason, copied from GridState for the host"),
        ("abort_team", "u32", "device: the team that gave up first"),
        ("progress", "u64", "device: rounds of control so far"),
        ("n_left", "u64", "device: launches that ended with their state kept"),
        ("pong_ns", "u64", "device: its clock, answering `ping`"),
        ("pong", "u64", "device: the `ping` that was answered"),
        ("leave", "u32", "device: LeaveReason of the launch that ended last"),
        ("running", "u32", "device: requests that it has seen and not ended"),
        ("trace_tail", "u64", "device: entries of the decision trace written"),
        ("trace_lost", "u64", "device: those for which there was no room"),
        ("device_pad", "u8[24]", ""),
    ),
)


def power_of_two_at_least(count: int) -> int:
    return 1 << (count - 1).bit_length()


def ring_capacities(max_waiting: int, max_len: int) -> tuple[int, int]:
    """(submissions, prompt tokens) that the rings of a session hold."""
    submissions = power_of_two_at_least(max_waiting)
    return submissions, power_of_two_at_least(max(4 * max_len + 4 * MAX_BIAS, 64 * submissions))
