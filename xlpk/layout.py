"""Every record and enum that host and device share, declared once.

A record is a numpy dtype (`align=True`) and, rendered by `render()`, a C struct in `kernels/generated/layout.h` whose
size and offsets are asserted by each compiler. Pointers are 64-bit addresses in the address space of whoever runs the
kernels. The order of phases lives here too: it yields the device enum, the launched kernels and the names in tables.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VERSION = 3

CONSTANTS: dict[str, tuple[int, str]] = {
    "kLayoutVersion": (VERSION, "checked when a session opens"),
    "kVirtualLanes": (32, "every reduction runs over this many lanes and one fixed tree, whatever the team"),
    "kAttentionSpan": (256, "keys an attention partial covers; absolute positions; the page size divides it"),
    "kMaxBlock": (16, "most tokens one verify step may emit: 15 drafts and the bonus token"),
    "kMaxStopIds": (8, "stop token ids a request may carry"),
    "kMaxLogprobs": (20, "most likely tokens that are published beside a token, at most"),
    "kMaxTarget": (16, "token ids of a target at most"),
    "kMaxBias": (1024, "logit biases of a request at most"),
    "kLine": (128, "bytes between words that different agents write"),
    "kGpuThreads": (256, "threads of a team on a GPU"),
    "kGpuLanes": (32, "threads of a warp there"),
    "kFlightEntries": (1024, "last phases that the flight recorder keeps for a team; a power of two"),
    "kWeightTileRows": (8, "rows of a tile of weights"),
    "kWeightTileColumns": (256, "columns of a tile of weights"),
    "kWatermark": (100, "beside others a request is admitted only if one page in this many stays (vLLM's watermark)"),
    "kTokensPerLevel": (16, "prompt tokens that count as one level under Policy.SHORTEST_PROMPT"),
    "kProtectedShare": (5, "eviction list 1 of SLRU holds at most all pages but one in this many"),
    "kCostKnots": (12, "rows of a step for which a simulated cost is given: 1, 2, 4, ..."),
}
VIRTUAL_LANES = CONSTANTS["kVirtualLanes"][0]
ATTENTION_SPAN = CONSTANTS["kAttentionSpan"][0]
MAX_BLOCK = CONSTANTS["kMaxBlock"][0]
MAX_STOP_IDS = CONSTANTS["kMaxStopIds"][0]
MAX_LOGPROBS = CONSTANTS["kMaxLogprobs"][0]
MAX_TARGET = CONSTANTS["kMaxTarget"][0]
MAX_BIAS = CONSTANTS["kMaxBias"][0]
GPU_THREADS = CONSTANTS["kGpuThreads"][0]
GPU_LANES = CONSTANTS["kGpuLanes"][0]
FLIGHT_ENTRIES = CONSTANTS["kFlightEntries"][0]
WEIGHT_TILE_ROWS = CONSTANTS["kWeightTileRows"][0]
WEIGHT_TILE_COLUMNS = CONSTANTS["kWeightTileColumns"][0]
WATERMARK = CONSTANTS["kWatermark"][0]
TOKENS_PER_LEVEL = CONSTANTS["kTokensPerLevel"][0]
PROTECTED_SHARE = CONSTANTS["kProtectedShare"][0]
COST_KNOTS = CONSTANTS["kCostKnots"][0]


@dataclass(frozen=True)
class Phase:
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


class WeightType(enum.IntEnum):
    """Storage type of matrices, and of KV pages (never FP16)."""

    BF16 = 0
    FP32 = 1
    FP16 = 2


class WeightLayout(enum.IntEnum):
    """How matrices lie in the memory of a GPU: as in the checkpoint, or in tiles (kernels/platform/weight_row.h)."""

    ROWS = 0
    TILES = 1


class SlotState(enum.IntEnum):
    """What a slot (the device's place for one running request) is doing."""

    FREE = 0
    PREFILL = 1
    DECODE = 2
    WAITING = 3  # its tokens are here, it was never admitted
    PREEMPTED = 4  # it ran; its pages were taken


class EventKind(enum.IntEnum):
    ADMITTED = 0
    TOKEN = 1
    FINISHED = 2
    PREEMPTED = 3
    RESUMED = 4


class FinishReason(enum.IntEnum):
    NONE = 0
    EOS = 1
    STOP = 2
    LENGTH = 3
    CANCELLED = 4
    ERROR = 5
    TARGET = 6
    DEADLINE = 7


class Proposer(enum.IntEnum):
    NONE = 0
    NGRAM = 1
    ORACLE = 2


class Acceptance(enum.IntEnum):
    KEYED = 0
    GREEDY = 1
    FORCED = 2


class Policy(enum.IntEnum):
    """Who is admitted first; see stages/queue.h."""

    FCFS = 0
    PRIORITY = 1
    SHORTEST_PROMPT = 2


class Eviction(enum.IntEnum):
    """Which cached page goes first; see stages/pages.h."""

    LRU = 0
    FIFO = 1
    SLRU = 2


class AbortReason(enum.IntEnum):
    """Why the loop left before it was told to; the first reason written stays."""

    NONE = 0
    HOST = 1
    BARRIER_TIMEOUT = 2
    PAGE_DOUBLE_ALLOCATION = 3
    PAGE_DOUBLE_FREE = 4
    PAGE_CONSERVATION = 5
    NO_FREE_PAGE = 6
    CENSUS_TIMEOUT = 7
    HANG = 8


class PlayFault(enum.IntEnum):
    """Which check of kernels/play.cpp failed first."""

    NONE = 0
    TEXT = 1
    PAGE_CONTENT = 2
    TWO_ENDS = 3
    NEVER_ENDED = 4
    REFS = 5
    FREE_PAGE = 6
    CACHED_PAGE = 7
    COUNTS = 8
    LISTS = 9
    BUCKETS = 10
    ORDER = 11
    ABORTED = 12
    LEFT_OVER = 13
    ADMISSION = 14
    CACHED_HIT = 15
    STUCK = 16
    SWAP = 17


class Router(enum.IntEnum):
    """Which instance of a simulated fleet serves a request."""

    ROUND_ROBIN = 0
    LEAST_OUTSTANDING = 1  # fewest requests that the host has not seen end; ties to the first
    PREFIX_AFFINITY = 2  # a hash of the prompt's beginning names it, unless it has too much to do


class LeaveReason(enum.IntEnum):
    """Why a launch of the persistent loop ended with all of its state kept."""

    NONE = 0
    STOP = 1
    LEASE = 2
    IDLE = 3
    HEARTBEAT = 4


class TraceKind(enum.IntEnum):
    """Decisions of the control plane, in the order in which it takes them; fields as of TraceEntry: value; a, b, c."""

    ROUND = 0  # device clock; 1: a step is committed in it. Rounds in which there is nothing to do leave none
    COMMIT = 1  # request; tokens it emits, drafts accepted, tokens that are stored afterwards
    ROOM = 2  # 0; free entries of the event ring, 1: the ring of step records has room
    SEEN = 3  # request
    CANCEL = 4  # request, which may have ended
    FINISH = 5  # request; FinishReason, output tokens
    ADMIT = 6  # request; 1: it is resumed, pages it shares, pages that come back from the swap space
    PREEMPT = 7  # request; pages it held, pages that go to the swap space
    ALLOC = 8  # 0; page
    EVICT = 9  # content; page, which is allocated next
    HOLD = 10  # content; page, references to it
    RELEASE = 11  # 0; page, references left, 0: free now, 1: cached now, 2: still held
    PUBLISH = 12  # content; page that becomes addressable
    DEMOTE = 13  # 0; page that goes to the list of those that were not found
    MOVE = 14  # 0; page, place in the swap space, 1: out, 0: back
    PLAN = 15  # 0; rows that drafts may take
    ROWS = 16  # request; position of the first, how many, 0: decode row and drafts, 1: prompt chunk
    STEP = 17  # number of the step; rows, sampled rows, moves
    PIN = 18  # content; page that is held for good, references to it


ENUMS: tuple[type[enum.IntEnum], ...] = (
    WeightType,
    WeightLayout,
    SlotState,
    EventKind,
    FinishReason,
    Proposer,
    Acceptance,
    Policy,
    Eviction,
    AbortReason,
    LeaveReason,
    Router,
    TraceKind,
    PlayFault,
)


@dataclass(frozen=True)
class Record:
    """A C struct: fields are (name, type, doc); type is a scalar, `scalar[n]`, a record's name, or `ctype*`."""

    name: str
    doc: str
    fields: tuple[tuple[str, str, str], ...]

    @property
    def dtype(self) -> np.dtype[np.void]:
        return np.dtype([_numpy_field(name, kind) for name, kind, _ in self.fields], align=True)


_SCALARS: dict[str, tuple[type[np.generic], str]] = {
    "i32": (np.int32, "int32_t"),
    "u32": (np.uint32, "uint32_t"),
    "i64": (np.int64, "int64_t"),
    "u64": (np.uint64, "uint64_t"),
    "f32": (np.float32, "float"),
    "f64": (np.float64, "double"),
    "u8": (np.uint8, "uint8_t"),
    "u16": (np.uint16, "uint16_t"),
}


def _numpy_field(name: str, kind: str) -> tuple[object, ...]:
    if kind.endswith("*"):
        return (name, np.uint64)
    if kind.endswith("]"):
        base, count = kind[:-1].split("[")
        return (name, _SCALARS[base][0], (int(count),))
    return (name, _SCALARS[kind][0])


def _c_field(name: str, kind: str) -> str:
    if kind.endswith("*"):
        return f"{kind} {name};"
    if kind.endswith("]"):
        base, count = kind[:-1].split("[")
        return f"{_SCALARS[base][1]} {name}[{count}];"
    return f"{_SCALARS[kind][1]} {name};"


DIMS = Record(
    "Dims",
    "The model's dimensions, under their Hugging Face names; on the GPU, compile-time constants of the same names.",
    (
        ("vocab_size", "i32", "tokens"),
        ("hidden_size", "i32", "multiple of 32"),
        ("intermediate_size", "i32", "multiple of 32"),
        ("num_hidden_layers", "i32", "layers"),
        ("num_attention_heads", "i32", "query heads"),
        ("num_key_value_heads", "i32", "divides num_attention_heads"),
        ("head_dim", "i32", "multiple of 16"),
        ("head_stride", "i32", "head_dim up to a multiple of 32: how q, pages and partials hold a head"),
        ("page_size", "i32", "tokens a KV page holds; divides 256"),
        ("rms_norm_eps", "f32", ""),
    ),
)

LAYER_WEIGHTS = Record(
    "LayerWeights",
    "One layer. Matrices are row-major [out, in] in the storage type of the model; norm vectors and biases are float.",
    (
        ("input_layernorm", "const float*", "[hidden_size]"),
        ("q_proj", "const void*", "[num_attention_heads * head_dim, hidden_size]"),
        ("k_proj", "const void*", "[num_key_value_heads * head_dim, hidden_size]"),
        ("v_proj", "const void*", "[num_key_value_heads * head_dim, hidden_size]"),
        ("o_proj", "const void*", "[hidden_size, num_attention_heads * head_dim]"),
        ("post_attention_layernorm", "const float*", "[hidden_size]"),
        ("gate_proj", "const void*", "[intermediate_size, hidden_size]"),
        ("up_proj", "const void*", "[intermediate_size, hidden_size]"),
        ("down_proj", "const void*", "[hidden_size, intermediate_size]"),
        ("q_bias", "const float*", "[num_attention_heads * head_dim]; null: none"),
        ("k_bias", "const float*", "[num_key_value_heads * head_dim]; null: none"),
        ("v_bias", "const float*", "[num_key_value_heads * head_dim]; null: none"),
        ("o_bias", "const float*", "[hidden_size]; null: none"),
        ("gate_bias", "const float*", "[intermediate_size]; null: none"),
        ("up_bias", "const float*", "[intermediate_size]; null: none"),
        ("down_bias", "const float*", "[hidden_size]; null: none"),
    ),
)

# How a request wants its tokens: the same in its submission and in its slot.
_SAMPLING = (
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
        *_SAMPLING,
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
        *_SAMPLING,
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

STEP_COSTS = Record(
    "StepCosts",
    "What a step costs on a virtual clock, in nanoseconds; xlpk/costs.py has the formula.",
    (
        ("fixed_ns", "f64", "a step"),
        ("row_ns", f"f64[{COST_KNOTS}]", "all rows, at 1, 2, 4, ... rows"),
        ("sample_ns", f"f64[{COST_KNOTS}]", "all sampled rows, likewise"),
        ("context_ns", "f64", "a token of context_tokens"),
        ("attended_ns", "f64", "a token of attended_tokens"),
        ("move_ns", "f64", "a page that is moved"),
        ("control_ns", "f64", "control, a step"),
        ("control_row_ns", "f64", "control, a row"),
        ("publish_ns", "f64", "from the end of a step until the host sees its tokens"),
        ("submit_ns", "f64", "from submission until the loop sees it"),
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
        ("launched_ns", "u64", "device clock when this launch began"),
        ("busy_ns", "u64", "device clock when there was work last"),
        ("beat", "u64", "the host's heartbeat as it was seen last"),
        ("beat_ns", "u64", "device clock when it changed"),
        ("n_rounds", "u64", "rounds of control"),
        ("round_ns", "u64", "device clock at the start of the last of them"),
        ("n_left", "u64", "launches that ended"),
        ("pong", "u64", "ping that was answered last"),
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

PARAMS = Record(
    "Params",
    "All addresses and policies of a session, passed to every kernel.",
    (
        ("embed_tokens", "const void*", "[vocab_size, hidden_size]"),
        ("lm_head", "const void*", "[vocab_size, hidden_size]; embed_tokens when tied"),
        ("norm", "const float*", "[hidden_size]"),
        ("layers", "const LayerWeights*", "[num_hidden_layers]"),
        ("inv_freq", "const double*", "RoPE frequencies, [head_dim / 2]"),
        ("eos_ids", "const int32_t*", "[n_eos_ids]"),
        ("kv", "void*", "[layers, pages, 2 (K, V), num_key_value_heads, page_size, head_stride]"),
        ("x", "float*", "residual stream, [max_rows, hidden_size]"),
        ("q", "float*", "rotated queries, [max_rows, num_attention_heads, head_stride]"),
        ("span_max", "float*", "largest score, [max_rows, num_attention_heads, max_spans]"),
        ("span_sum", "float*", "sum of exp(score - max), the same shape"),
        ("span_acc", "float*", "weighted V, [max_rows, num_attention_heads, max_spans, head_stride]"),
        ("act", "void*", "SiLU(gate) * up, [max_rows, intermediate_size]; bf16 where weights are, else float"),
        ("rope", "float*", "cosines then sines, [max_rows, 2, head_dim / 2]"),
        ("best", "uint64_t*", "packed (value, ~token) maxima: keyed sample, argmax; [max_rows, 2]"),
        ("logits", "float*", "null, or [max_len, vocab_size] by position, of slot 0 (tests)"),
        (
            "processed",
            "float*",
            "logits after bias and penalties of filtered rows, [max_rows, vocab_size] by sampled row",
        ),
        ("raw", "float*", "the model's own logits, where logprobs are asked for; the same shape"),
        ("row_logprobs", "Logprobs*", "by sampled row, [max_rows]"),
        ("counts", "int32_t*", "of output tokens, kSeenInPrompt added for the prompt's; [max_slots, vocab_size]"),
        ("bias", "float*", "[max_slots, vocab_size]"),
        ("scratch", "float*", "CPU only: [teams, scratch_floats]; the GPU has shared memory"),
        ("mailbox", "Mailbox*", ""),
        ("grid", "GridState*", ""),
        ("submissions", "Submission*", "[submission_capacity]"),
        ("prompts", "int32_t*", "[prompt_capacity]"),
        ("cancels", "uint64_t*", "request ids, [submission_capacity]"),
        ("queue", "Submission*", "the device's copy of what it has seen, [submission_capacity]"),
        ("gone", "uint8_t*", "1: nothing of the submission in the rings is needed any more; [submission_capacity]"),
        ("heap", "QueueEntry*", "requests that wait, [submission_capacity + max_slots]"),
        ("events", "Event*", "[event_capacity]"),
        ("logprobs", "Logprobs*", "beside `events`, of TOKEN events whose request asks for them; [event_capacity]"),
        ("step_records", "StepRecord*", "[step_capacity]"),
        ("state", "LoopState*", ""),
        ("step", "Step*", ""),
        ("record", "StepRecord*", "of the step in flight"),
        ("rows", "Row*", "[max_rows]"),
        ("sample_rows", "int32_t*", "row of each sampled row, [max_rows]"),
        ("slots", "Slot*", "[max_slots]"),
        ("order", "int32_t*", "running slots by rank, [max_running]"),
        ("tokens", "int32_t*", "[max_slots, max_len]"),
        ("oracle", "int32_t*", "right output tokens, [max_slots, max_len]"),
        ("page_table", "int32_t*", "[max_slots, max_slot_pages]"),
        ("free_slots", "int32_t*", "a stack, [max_slots]"),
        ("page_hashes", "uint64_t*", "Page.hash of a slot's full pages, [max_slots, max_slot_pages]"),
        ("free_pages", "int32_t*", "a stack, [n_pages]"),
        ("pages", "Page*", "[n_pages]"),
        ("page_tokens", "int32_t*", "tokens of addressable pages, [n_pages, page_size]"),
        (
            "swap",
            "void*",
            "in the host's memory, [n_swap_pages, layers, 2, num_key_value_heads, page_size, head_stride]",
        ),
        ("swap_free", "int32_t*", "a stack, [n_swap_pages]"),
        ("swap_table", "int32_t*", "[max_slots, max_slot_pages]; null: there is no swap space"),
        ("moves", "Move*", "[n_pages + n_swap_pages]; null: likewise"),
        ("buckets", "int32_t*", "first page of a bucket, -1: none; [n_buckets]"),
        ("trace", "TraceEntry*", "null, or the decision trace, [trace_capacity]"),
        (
            "spans",
            "SpanEntry*",
            "null, or phase spans, [1 + teams, span_capacity]: of control, then of each team; rings that overwrite"
            " their oldest",
        ),
        ("span_counts", "uint64_t*", "spans that a ring was given, each on a line of its own, [1 + teams, kLine / 8]"),
        ("flight", "FlightEntry*", "null, or the flight recorder, [teams, kFlightEntries]"),
        ("patches", "Patch*", "launched from the host: changes of the page table, then of the counts"),
        ("spin_deadline_ns", "u64", "a wait that lasts longer aborts the loop"),
        ("census_ns", "u64", "the first wait of a launch: all teams must have started"),
        ("lease_ns", "u64", "a launch leaves after this long with its state kept; 0: never"),
        ("idle_ns", "u64", "a launch leaves after this long without work; 0: never"),
        ("heartbeat_ns", "u64", "a launch leaves when the host's heartbeat stood still for this long; 0: never"),
        ("version", "i32", "kLayoutVersion"),
        ("max_rows", "i32", "rows of a step at most"),
        ("planner", "i32", "1: the last team plans beside the steps and has no share of them; 0: there is none"),
        ("max_running", "i32", "requests that run at once"),
        ("max_slots", "i32", "requests that run or wait with their tokens on the device"),
        ("max_len", "i32", "tokens of a sequence at most"),
        ("max_spans", "i32", "ceil(max_len / kAttentionSpan)"),
        ("max_slot_pages", "i32", "ceil(max_len / page_size)"),
        ("n_pages", "i32", ""),
        ("n_buckets", "i32", "power of two"),
        ("n_swap_pages", "i32", "0: preempted requests are computed again"),
        ("n_eos_ids", "i32", ""),
        ("scratch_floats", "i32", "floats of scratch a team has"),
        ("submission_capacity", "i32", "power of two"),
        ("prompt_capacity", "i32", "power of two, tokens"),
        ("event_capacity", "i32", "power of two"),
        ("step_capacity", "i32", "power of two"),
        ("trace_capacity", "i32", "power of two"),
        ("span_capacity", "i32", "power of two"),
        ("prefill_chunk", "i32", "prompt tokens of one request in one step at most"),
        ("block", "i32", "most tokens a verification may emit: drafts + 1"),
        ("policy", "i32", "Policy"),
        ("ageing_steps", "i32", "steps of waiting that are worth one level of priority"),
        ("eviction", "i32", "Eviction"),
        ("prefix_sharing", "i32", "1: pages are addressable by their content"),
        ("proposer", "i32", "Proposer"),
        ("acceptance", "i32", "Acceptance"),
        ("ngram_min", "i32", "shortest suffix that is looked up"),
        ("ngram_max", "i32", "longest suffix that is looked up"),
        ("mismatch_stride", "i32", "oracle: output positions p with (p + 1) % stride == 0 get a wrong draft; 0: never"),
        ("forced_stride", "i32", "forced acceptance rejects drafts at output positions p with (p + 1) % stride == 0"),
    ),
)

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


def _camel(name: str) -> str:
    return "k" + "".join(part.capitalize() for part in name.split("_"))


def render() -> str:
    """The text of `kernels/generated/layout.h`."""
    out = [
        "// Rendered by `python -m xlpk.layout`; edit xlpk/layout.py instead.",
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
    first = next(index for index, phase in enumerate(PHASES) if phase.per == "layer")
    last = max(index for index, phase in enumerate(PHASES) if phase.per == "layer")
    out += [
        f"constexpr int kFirstLayerPhase = {first};",
        f"constexpr int kLastLayerPhase = {last};",
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
        out.append(f"  static constexpr {_SCALARS[kind][1]} {name} = XL_{name.upper()};")
    out += ["};", "#endif", "", "}  // namespace xl"]
    return "\n".join(out) + "\n"


def power_of_two_at_least(count: int) -> int:
    return 1 << (count - 1).bit_length()


def ring_capacities(max_waiting: int, max_len: int) -> tuple[int, int]:
    """(submissions, prompt tokens) that the rings of a session hold."""
    submissions = power_of_two_at_least(max_waiting)
    return submissions, power_of_two_at_least(max(4 * max_len + 4 * MAX_BIAS, 64 * submissions))


def phase_sequence(num_hidden_layers: int) -> list[tuple[int, int]]:
    """(phase, layer) in the order in which one step's forward pass runs them; control is not part of it."""
    first = next(index for index, phase in enumerate(PHASES) if phase.per == "layer")
    last = max(index for index, phase in enumerate(PHASES) if phase.per == "layer")
    before = [(index, 0) for index in range(first)]
    layers = [(index, layer) for layer in range(num_hidden_layers) for index in range(first, last + 1)]
    return before + layers + [(index, 0) for index in range(last + 1, len(PHASES) - 1)]


def main() -> None:
    """Writes the header beside the kernels of this checkout."""
    target = Path(__file__).resolve().parents[1] / "kernels" / "generated" / "layout.h"
    target.write_text(render())


if __name__ == "__main__":
    main()
