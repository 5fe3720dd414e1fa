"""A request as a backend takes it, and how a workload and the sampling options become requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from xlpk import layout
from xlpk.errors import InputError, shown
from xlpk.text import encode
from xlpk.workload.base import Stream, Workload, capacity
from xlpk.workload.prompts import in_vocabulary
from xlpk.workload.sampling import Sampling, biases

if TYPE_CHECKING:
    from xlpk.kv import KVPlan
    from xlpk.model import Model


@dataclass(frozen=True)
class Request:
    """One request as a backend takes it."""

    request_id: int
    prompt: tuple[int, ...]  # token ids, at least one
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    arrival_s: float = 0.0  # intended, after the start of the measurement
    oracle: tuple[int, ...] = ()  # the right output tokens, for spec=oracle
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, bias)
    logprobs: int | None = None
    target: tuple[int, ...] = ()  # token ids
    stop: tuple[str, ...] = ()  # the engine's affair: a backend sees token ids only
    priority: int = 0  # lower is served first, as in vLLM
    deadline_ms: float = 0.0  # after `arrival_s`; 0: none
    share_prefix: bool = True  # it may use pages of others, and leave its own to them
    pin: bool = False  # the full pages of its prompt stay on the device for good

    def untimed(self) -> Request:
        """The same work without what decides when it is done: arrival, priority, deadline."""
        return replace(self, arrival_s=0.0, priority=0, deadline_ms=0.0)


def make_requests(
    workload: Workload, sampling: Sampling, model: Model, plan: KVPlan
) -> tuple[list[Request], list[str]]:
    """The requests of a run, by id, and one line for each way in which they differ from what was asked for.

    Raises InputError: empty prompt, ids outside the vocabulary, a prompt beyond the positions or the KV pages.
    """
    shared = _shared(sampling, model)
    workload.check()
    stream = workload.stream(model, plan)
    seconds = stream.arrivals_s or [0.0] * len(stream.prompts)
    priorities = stream.priorities or workload.draw_priorities(len(stream.prompts))
    max_new_tokens = sampling.values().max_new_tokens
    wanted = stream.output_lens or [max_new_tokens] * len(stream.prompts)
    requests, capped = [], []
    for index, prompt in enumerate(stream.prompts):
        count = min(wanted[index], _room(prompt, plan, stream.named))
        if count < wanted[index]:
            capped.append(count)
        requests.append(
            Request(
                request_id=index,
                prompt=prompt,
                max_new_tokens=count,
                seed=sampling.seed + index,
                ignore_eos=sampling.ignore_eos or stream.output_lens is not None,
                arrival_s=seconds[index],
                priority=priorities[index],
                deadline_ms=workload.deadline_ms,
                **shared,
            )
        )
    if capped:
        stream.notes.append(_capped_note(stream, max_new_tokens, capped, plan))
    return requests, stream.notes


def _capped_note(stream: Stream, max_new_tokens: int, capped: list[int], plan: KVPlan) -> str:
    key = "output lengths" if stream.output_lens is not None else f"sampling.max_new_tokens={max_new_tokens}"
    return (
        f"{key}: capped to {min(capped)} for {len(capped)} of {len(stream.prompts)} "
        f"requests, which is what {plan.max_len} positions and {plan.usable_pages} KV pages leave"
    )


def _shared(sampling: Sampling, model: Model) -> dict[str, Any]:
    """What all requests of a run have alike, checked against the model."""
    vocab_size = model.config.vocab_size
    for token in sampling.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise InputError("sampling.stop_token_ids", token, f"ids of the vocabulary: 0 to {vocab_size - 1}")
    for token, _ in biases(sampling):
        if not 0 <= token < vocab_size:
            raise InputError("sampling.logit_bias", token, f"ids of the vocabulary: 0 to {vocab_size - 1}")
    if sampling.stop and model.tokenizer is None:
        raise InputError(
            "sampling.stop", shown(sampling.stop[0]), f"model {model.name} has no tokenizer.json: stop_token_ids"
        )
    values = sampling.values()
    return {
        "temperature": values.temperature,
        "stop_token_ids": tuple(sampling.stop_token_ids),
        "top_k": values.top_k,
        "top_p": values.top_p,
        "min_p": values.min_p,
        "repetition_penalty": values.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": biases(sampling),
        "logprobs": sampling.logprobs,
        "target": _target(sampling, model),
        "stop": tuple(sampling.stop),
    }


def _target(sampling: Sampling, model: Model) -> tuple[int, ...]:
    """The target's token ids."""
    if sampling.target is None:
        return ()
    if model.tokenizer is None:
        raise InputError("sampling.target", shown(sampling.target), f"model {model.name} has no tokenizer.json")
    (ids,) = in_vocabulary([encode(model.tokenizer, sampling.target, add_special_tokens=False)], model)
    if not 1 <= len(ids) <= layout.MAX_TARGET:
        raise InputError("sampling.target", f"{len(ids)} tokens", f"1 to {layout.MAX_TARGET} tokens")
    return ids


def _room(prompt: Sequence[int], plan: KVPlan, named: str) -> int:
    """Output tokens for which positions and pages are left. Raises InputError about `named` if there is none."""
    if not prompt:
        raise InputError(named, "no tokens", "a prompt of at least one token")
    if len(prompt) >= plan.max_len:
        raise InputError(named, f"{len(prompt)} tokens", f"fewer than the {plan.max_len} positions of model.max_len")
    needed = plan.pages_for(len(prompt) + 1)
    if needed > plan.usable_pages:
        raise InputError(
            named,
            f"{len(prompt)} tokens",
            f"it needs {needed} KV pages and kv.budget has {plan.usable_pages}, of {plan.page_size} tokens each",
        )
    return capacity(plan) - len(prompt)
