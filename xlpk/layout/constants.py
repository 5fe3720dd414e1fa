"""Numbers that host and device share; `CONSTANTS` is rendered, the names below it are Python's for the same."""

from __future__ import annotations

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
