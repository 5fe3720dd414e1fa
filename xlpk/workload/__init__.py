"""Requests and where they come from: prompts, traffic by a process, traces, conversations, shared prefixes.

Shapes: a prompt is a tuple of token ids. A node of the `workload` group gives a `Stream`, `make_requests` makes
requests of it. What the text means is the tokenizer's affair; when to send is the engine's.
"""

from xlpk.workload.base import MAX_REQUESTS, MAX_TOKENS, Arriving, Stream, Workload
from xlpk.workload.pinned import pinned_requests
from xlpk.workload.prompts import Prompts, Synthetic, is_text
from xlpk.workload.request import Request, make_requests
from xlpk.workload.sampling import Sampling, biases, check_sampling
from xlpk.workload.shared_prefix import SharedPrefix
from xlpk.workload.sharegpt import ShareGPT
from xlpk.workload.trace import Trace
from xlpk.workload.traffic import Constant, Gamma, Poisson

WORKLOADS: tuple[type[Workload], ...] = (
    Prompts, Synthetic, Poisson, Gamma, Constant, Trace, ShareGPT, SharedPrefix,
)  # fmt: skip

__all__ = [
    "MAX_REQUESTS",
    "MAX_TOKENS",
    "WORKLOADS",
    "Arriving",
    "Constant",
    "Gamma",
    "Poisson",
    "Prompts",
    "Request",
    "Sampling",
    "ShareGPT",
    "SharedPrefix",
    "Stream",
    "Synthetic",
    "Trace",
    "Workload",
    "biases",
    "check_sampling",
    "is_text",
    "make_requests",
    "pinned_requests",
]
