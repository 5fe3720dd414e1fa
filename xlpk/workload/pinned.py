"""Pinned prefixes (`kv.pinned`): prompts whose full pages stay on the device whatever else needs room.

Each is a request of its own, served before the run's; the pages of its prompt are then found by every prompt that
begins alike, and never evicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from xlpk.errors import InputError
from xlpk.workload.prompts import encode_prompts
from xlpk.workload.request import Request

if TYPE_CHECKING:
    from xlpk.kv import KVPlan
    from xlpk.model import Model


def pinned_requests(texts: Sequence[str], model: Model, plan: KVPlan) -> tuple[list[Request], KVPlan]:
    """-> the requests that pin (ids are the caller's to change), and the plan that knows how many pages they take.

    Two texts that begin alike share pages, which the plan counts twice. InputError: too long, too many, or no
    tokenizer.
    """
    if not texts:
        return [], plan
    if model.tokenizer is None:
        raise InputError("kv.pinned", f"{len(texts)} texts", f"null: model {model.name} has no tokenizer.json")
    requests = []
    for index, prompt in enumerate(encode_prompts(texts, model, chat=False)):
        if len(prompt) + 1 > plan.max_len:
            allowed = f"texts of fewer than the {plan.max_len} positions of model.max_len"
            raise InputError("kv.pinned", f"{len(prompt)} tokens", allowed)
        requests.append(Request(index, prompt, 1, ignore_eos=True, pin=True))
    pages = sum(len(request.prompt) // plan.page_size for request in requests)
    if pages + max(plan.pages_for(len(request.prompt) + 1) for request in requests) > plan.pages:
        allowed = f"what leaves room among the {plan.pages} pages of kv.budget, of {plan.page_size} tokens each"
        raise InputError("kv.pinned", f"{pages} pages", allowed)
    return requests, replace(plan, pinned_pages=pages)
