"""Enums that host and device share; `ENUMS` has them in the order of the header."""

from __future__ import annotations

import enum


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
