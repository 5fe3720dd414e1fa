"""What a simulated control plane is told: the sizes and policies of a session, and its requests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from xlpk.kv import EVICTIONS, KVPlan
from xlpk.layout import MAX_BLOCK, Eviction, Policy, ring_capacities
from xlpk.speculation import Acceptance, Proposer
from xlpk.workload import Request


class Limits(Protocol):
    """What `Rules.make` reads of xlpk.backends.memory.Limits."""

    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_step_rows(self) -> int: ...
    @property
    def prefill_chunk(self) -> int: ...
    @property
    def max_waiting(self) -> int: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def ageing_steps(self) -> int: ...
    @property
    def slots(self) -> int: ...


@dataclass(frozen=True)
class Rules:
    """Sizes and policies, fixed for a session; names as in layout.PARAMS."""

    max_running: int  # requests that run at once
    max_slots: int  # requests that run or were preempted
    max_rows: int  # rows of a step
    prefill_chunk: int  # prompt tokens of one request in one step
    n_pages: int
    page_size: int  # tokens
    n_swap_pages: int  # 0: preempted requests are computed again
    prefix_sharing: bool
    eviction: Eviction
    policy: Policy
    ageing_steps: int  # steps of waiting that are worth one level of priority
    proposer: Proposer
    acceptance: Acceptance
    eos_ids: frozenset[int]
    vocab_size: int
    submission_capacity: int  # submissions whose tokens are still in the rings
    prompt_capacity: int  # tokens in the prompt ring

    @property
    def events_per_round(self) -> int:
        """Events that one round may write: the tokens and the end of each running request, and its preemption."""
        return self.max_running * (MAX_BLOCK + 2)

    @staticmethod
    def make(
        limits: Limits,
        plan: KVPlan,
        spec: Proposer,
        acceptance: Acceptance,
        eos_ids: Iterable[int],
        vocab_size: int,
    ) -> Rules:
        """The rules of a session that xlpk.backends.memory would lay out for the same arguments."""
        submissions, prompts = ring_capacities(limits.max_waiting, plan.max_len)
        return Rules(
            max_running=limits.max_num_seqs,
            max_slots=limits.slots,
            max_rows=limits.max_step_rows,
            prefill_chunk=limits.prefill_chunk,
            n_pages=plan.pages,
            page_size=plan.page_size,
            n_swap_pages=plan.swap_pages,
            prefix_sharing=plan.prefix_sharing,
            eviction=EVICTIONS[plan.eviction],
            policy=limits.policy,
            ageing_steps=limits.ageing_steps,
            proposer=spec,
            acceptance=acceptance,
            eos_ids=frozenset(eos_ids),
            vocab_size=vocab_size,
            submission_capacity=submissions,
            prompt_capacity=prompts,
        )


class Filters(Protocol):
    """What `drops_tokens` reads of a Request or of SamplingValues."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...


def drops_tokens(values: Filters) -> bool:
    """Whether rows sampled so take the filter phase; rows with logprobs do as well."""
    return (values.top_k > 0 or values.top_p < 1 or values.min_p > 0) and values.temperature > 0


@dataclass(frozen=True, slots=True)
class SimRequest:
    """A request as the control plane sees it: no weights, no logits, no text."""

    request_id: int  # unique within a session
    prompt: tuple[int, ...]  # token ids, at least one
    max_new_tokens: int
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    target: tuple[int, ...] = ()  # it ends when its output ends with these
    seed: int = 0
    priority: int = 0  # lower goes first, under Policy.PRIORITY
    deadline_ns: int = 0  # time it has from when the loop sees it; 0: for ever
    share: bool = True  # it may use pages of others and leave its own to them
    pin: bool = False  # the full pages of its prompt are held for good; needs `share`
    oracle: tuple[int, ...] = ()  # right output tokens, for spec=oracle
    filtered: bool = False  # its sampled rows take the filter phase
    n_bias: int = 0  # logit biases, which take two places each in the prompt ring

    @property
    def ring_tokens(self) -> int:
        """Places of the prompt ring that it takes until it is admitted."""
        return len(self.prompt) + len(self.oracle) + 2 * self.n_bias

    @staticmethod
    def of(request: Request) -> SimRequest:
        return SimRequest(
            request.request_id,
            request.prompt,
            request.max_new_tokens,
            ignore_eos=request.ignore_eos,
            stop_token_ids=request.stop_token_ids,
            target=request.target,
            seed=request.seed,
            priority=request.priority,
            deadline_ns=round(request.deadline_ms * 1e6),
            share=request.share_prefix,
            pin=request.pin,
            oracle=request.oracle,
            filtered=drops_tokens(request) or request.logprobs is not None,
            n_bias=len(request.logit_bias),
        )
