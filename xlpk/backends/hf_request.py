"""A request in `transformers`: its tokens, how it ends, and the library's own proposals for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xlpk.sampling import Picker
from xlpk.workload import Request


@dataclass(eq=False)
class Running:
    """A request with a place."""

    request: Request
    picker: Picker
    tokens: list[int]  # prompt, then output
    computed: int = 0  # tokens whose K and V are stored
    drafts: list[int] = field(default_factory=list)  # of the step in flight

    @property
    def n_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def most(self) -> int:
        """Tokens that it may come to."""
        return len(self.request.prompt) + self.request.max_new_tokens

    def reason_after(self, token: int, eos_ids: Sequence[int]) -> str:
        """Why the output ends with this token, its last; empty: it does not."""
        request = self.request
        if not request.ignore_eos and token in eos_ids:
            return "eos"
        if token in request.stop_token_ids:
            return "stop"
        n = len(request.target)
        if n and self.n_output >= n and tuple(self.tokens[-n:]) == request.target:
            return "target"
        return "length" if self.n_output >= request.max_new_tokens else ""


def prompt_lookup(tokens: Sequence[int], count: int, max_n: int, max_length: int, eos_ids: Sequence[int]) -> list[int]:
    """Up to `count` drafts as `generate(prompt_lookup_num_tokens=count)` has them: what followed the first occurrence
    of the longest suffix of at most `max_n` tokens, up to an end-of-sequence id."""
    import torch
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    lookup = PromptLookupCandidateGenerator(
        eos_token_id=torch.tensor(list(eos_ids)) if eos_ids else None,
        num_output_tokens=count,
        max_matching_ngram_size=max_n,
        max_length=max_length,
    )
    candidates, _ = lookup.get_candidates(torch.tensor([list(tokens)]))
    return [int(token) for token in candidates[0, len(tokens) :]]
