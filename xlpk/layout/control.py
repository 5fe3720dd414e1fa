"""The device's own state: the step and its rows, slots, pages, the queue, the loop's scalars, the grid's words."""

from __future__ import annotations

from xlpk.layout.phases import PHASES
from xlpk.layout.record import Record
from xlpk.layout.rings import SAMPLING

STEP = Record(
    "Step",
    "The step descriptor: all that phases read besides weights, activations and pages.",
    (
        ("step", "u64", "its number"),
        ("begin_ns", "u64", "device clock when it was planned"),
        ("n_rows", "i32", "0: nothing to do"),
        ("n_sample_rows", "i32", ""),
        ("n_filter_rows", "i32", "sampled rows of slots that are filtered; 0: the filter phase is left out"),
        ("n_prefill_rows", "i32", ""),
        ("n_decode_rows", "i32", ""),
        ("n_draft_rows", "i32", ""),
        ("n_prefill", "i32", "requests"),
        ("n_decode", "i32", "requests"),
        ("n_moves", "i32", "of Params.moves; 0: the move phase is left out"),
        ("leave", "i32", "LeaveReason; not NONE: the loop leaves instead of running a step"),
        ("n_page_patches", "i32", "launched from the host: changes of the page table, the first of Params.patches"),
        ("n_count_patches", "i32", "launched from the host: changes of Params.counts, behind them"),
    ),
)

ROW = Record(
    "Row",
    "One token of the ragged step.",
    (
        ("slot", "i32", ""),
        ("position", "i32", "0-based position in its sequence"),
        ("token", "i32", "its id"),
        ("sample_row", "i32", "index among the rows that reach the LM head; -1: none"),
    ),
)

SLOT = Record(
    "Slot",
    "The device's state of a request that runs, was preempted, or waits with its tokens here: Params.tokens[slot],"
    " prompt then output.",
    (
        ("request_id", "u64", ""),
        ("seed", "u64", ""),
        ("rank", "i64", "its place among requests: the smallest goes first and is preempted last"),
        ("number", "u64", "running index of its submission; settles equal ranks"),
        ("deadline_ns", "u64", "device clock at which it ends; 0: never"),
        ("content", "u64", "Page.content of the last of its addressable pages; 0: none"),
        ("state", "i32", "SlotState"),
        ("prompt_len", "i32", "tokens"),
        ("length", "i32", "tokens known: prompt and committed output"),
        ("computed", "i32", "tokens whose K and V are stored; length - 1 while decoding"),
        ("max_new_tokens", "i32", ""),
        ("ignore_eos", "i32", ""),
        ("n_stop_ids", "i32", ""),
        *SAMPLING,
        ("adjusted", "i32", "1: its logits get a bias or penalties"),
        ("penalized", "i32", "1: Params.counts[slot] is kept"),
        ("filtered", "i32", "1: its sampled rows go through the filter phase"),
        ("stop_ids", "i32[8]", ""),
        ("oracle_len", "i32", "valid entries of Params.oracle[slot]"),
        ("n_pages", "i32", "entries of Params.page_table[slot]"),
        ("n_addressable", "i32", "its first pages, which others can find"),
        ("n_hashed", "i32", "valid entries of Params.page_hashes[slot]"),
        ("share", "i32", "1: it may use pages of others and leave its own to them"),
        ("pin", "i32", "1: the full pages of its prompt are held for good"),
        ("n_stored", "i32", "tokens that were stored when it was preempted last: rows below are recomputation"),
        ("n_swapped", "i32", "entries of Params.swap_table[slot]"),
        ("swapped_tokens", "i32", "tokens that they hold"),
        ("row_begin", "i32", "its rows in the step"),
        ("row_count", "i32", "0: none in this step"),
        ("n_drafts", "i32", "drafts among them, behind the decode row"),
        ("n_accepted", "i32", "set by verification"),
        ("n_emitted", "i32", "tokens that verification found: accepted drafts and one more"),
        ("drafts", "i32[16]", "proposed tokens"),
        ("emitted", "i32[16]", "token ids"),
    ),
)

PAGE = Record(
    "Page",
    "What the planner knows of a KV page: FREE (on the stack) -> ACTIVE (refs > 0) -> CACHED (refs 0, addressable).",
    (
        ("hash", "u64", "of its tokens and of all before them"),
        ("content", "u64", "number of that sequence of tokens, of no other one; 0: not addressable"),
        ("parent", "u64", "content of the page before it; 0: it is the first"),
        ("refs", "i32", "page tables that hold it"),
        ("bucket_next", "i32", "next page with its bucket; -1: none"),
        ("older", "i32", "neighbour on its eviction list; -1: none"),
        ("newer", "i32", "likewise"),
        ("list", "i32", "eviction list; -1: on none"),
        ("hits", "i32", "times it was found"),
        ("pinned", "i32", "1: one of its references is a pin, which stays"),
    ),
)

QUEUE_ENTRY = Record(
    "QueueEntry",
    "A request that waits to be admitted or resumed, in a binary heap by (rank, number).",
    (
        ("rank", "i64", "as Slot.rank"),
        ("number", "u64", "as Slot.number; its submission lies there in Params.queue"),
        ("slot", "i32", "that holds its tokens; -1: they are in the prompt ring"),
    ),
)

MOVE = Record(
    "Move",
    "A page to copy between the pool and the swap space.",
    (
        ("page", "i32", ""),
        ("swap_page", "i32", ""),
        ("slot", "i32", "whose it is"),
        ("out", "i32", "1: to the swap space; 0: back"),
    ),
)

PATCH = Record(
    "Patch",
    "A word of the page table or of the counts that changed since the device had them.",
    (
        ("index", "i32", "of the word in its array"),
        ("value", "i32", ""),
    ),
)

LOOP_STATE = Record(
    "LoopState",
    "Scalars of the control plane; only the controlling team touches them.",
    (
        ("n_steps", "u64", "steps planned so far"),
        ("prompt_head", "u64", "prompt ring: first token that is still needed"),
        ("submit_head", "u64", "oldest submission whose place in the ring is still needed"),
        ("submit_seen", "u64", "next submission to look at"),
        ("submit_tail", "u64", "submissions written, as this round of control saw it"),
        ("cancel_head", "u64", "next cancellation to look at"),
        ("event_tail", "u64", "events written, published at the end of control"),
        ("step_tail", "u64", "step records written"),
        ("trace_tail", "u64", "entries of the decision trace written"),
        ("trace_limit", "u64", "where they have to stop in this round: the host has not taken the older ones"),
        ("trace_lost", "u64", "entries for which there was no room"),
        ("next_deadline_ns", "u64", "no request ends before by its deadline; 0: none has one"),
        ("n_contents", "u64", "contents that pages have had"),
        ("n_free_pages", "i32", "entries of Params.free_pages; set by the host to all"),
        ("n_cached_pages", "i32", "addressable pages that nobody holds"),
        ("n_active_pages", "i32", "pages that somebody holds"),
        ("n_refs", "i32", "sum of Page.refs"),
        ("n_pinned_pages", "i32", "pages that are held for good"),
        ("oldest", "i32[2]", "of an eviction list: next to go; -1: empty"),
        ("newest", "i32[2]", ""),
        ("n_listed", "i32[2]", "pages on an eviction list"),
        ("n_order", "i32", "running requests: entries of Params.order, by rank"),
        ("n_queued", "i32", "entries of Params.heap"),
        ("n_preempted", "i32", "slots in the state PREEMPTED"),
        ("n_free_slots", "i32", "entries of Params.free_slots; set by the host to all"),
        ("n_free_swap", "i32", "entries of Params.swap_free; set by the host to all"),
        ("n_moves", "i32", "of Params.moves, for the next step"),
        ("n_preemptions", "i32", "since the last record"),
        ("n_evictions", "i32", "since the last record"),
        ("filled_slot", "i32", "slot that the team fills; -1: none"),
        ("draft_rows", "i32", "rows that drafts of the next step may take; -1: no step can be planned now"),
        ("phase_ticks", f"u64[{len(PHASES)}]", "of the step in flight, by clock_ticks of who ran the phase"),
        (
            "span_ns",
            "u64",
            "global time in which the forward phases' clock counted span_ticks",
        ),
        ("span_ticks", "u64", "0: their ticks are nanoseconds"),
        ("n_launches", "u64", "launches of the persistent loop"),
        ("n_check_ins", "u64", "that the planner team owes"),
        ("launched_ns", "u64", "device clock when all teams of this launch were there"),
        ("busy_ns", "u64", "device clock when there was work last"),
        ("beat", "u64", "the host's heartbeat as it was seen last"),
        ("beat_ns", "u64", "device clock when it changed"),
        ("n_rounds", "u64", "rounds of control"),
        ("round_ns", "u64", "device clock at the start of the last of them"),
        ("n_left", "u64", "launches that ended"),
        ("pong", "u64", "ping that was answered last"),
    ),
)

GRID_STATE = Record(
    "GridState",
    "Words that teams share with each other only.",
    (
        ("arrivals", "u64", "at the grid barrier since the start; never reset"),
        ("arrivals_pad", "u8[120]", ""),
        ("abort", "u32", "AbortReason; the first one written stays"),
        ("abort_pad", "u8[124]", ""),
        ("check_ins", "u64", "of the planner team since the start: one a launch, one a round of control; never reset"),
        ("check_ins_pad", "u8[120]", ""),
    ),
)
