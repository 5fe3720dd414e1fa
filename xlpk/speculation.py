"""Proposers and acceptance policies: their parameters (nodes of the config) and their oracles in plain Python.

A block of b emits at most b tokens: b - 1 drafts and the token that the target itself adds. The kernels hold the same
logic in stages/draft.h and stages/spec_verify.h; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from xlpk import layout


@dataclass
class NoSpec:
    """No drafts: one token a step."""

    name: str = "none"
    block: int = 1  # tokens that a step may emit
    code: ClassVar[int] = int(layout.Proposer.NONE)


@dataclass
class Ngram:
    """Prompt lookup (Saxena 2023, vLLM's `ngram`): what followed the last occurrence of the sequence's own suffix."""

    name: str = "ngram"
    block: int = 4  # tokens that a verification may emit at most: block - 1 drafts and one more
    min_n: int = 1  # tokens of the shortest suffix that is looked up
    max_n: int = 4  # tokens of the longest, which is tried first
    code: ClassVar[int] = int(layout.Proposer.NGRAM)

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` drafts: longest suffix first (max_n .. min_n), most recent occurrence, what followed it.

        An occurrence may overlap the suffix; the drafts stop at the end of what is known.
        """
        length = len(tokens)
        for n in range(min(self.max_n, length - 1), self.min_n - 1, -1):
            suffix = list(tokens[length - n :])
            for begin in range(length - n - 1, -1, -1):
                if list(tokens[begin : begin + n]) == suffix:
                    return list(tokens[begin + n : begin + n + count])
        return []


@dataclass
class Oracle:
    """Drafts are the right answers, except at output positions p with (p + 1) % mismatch_stride == 0 (0: nowhere)."""

    name: str = "oracle"
    block: int = 4  # tokens that a verification may emit at most: block - 1 drafts and one more
    mismatch_stride: int = 4  # output tokens from one wrong draft to the next; 0: none is wrong
    code: ClassVar[int] = int(layout.Proposer.ORACLE)

    def expected(self, n_output: int) -> tuple[int, int, int]:
        """(verifications, proposed, accepted) of a request with `n_output` tokens, in closed form."""
        each = self.verifications(n_output)
        return len(each), sum(proposed for proposed, _ in each), sum(accepted for _, accepted in each)

    def verifications(self, n_output: int) -> list[tuple[int, int]]:
        """(proposed, accepted) of each verification of a request with `n_output` tokens.

        The first token comes from prefill. A mismatch ends its verification with the right token, so verifications
        re-align at each multiple of the stride s: a segment of m tokens takes ceil(m / block) of them, and each emits
        one token that no draft gave. Only the last ones of a request propose fewer than block - 1 drafts.
        """
        out: list[tuple[int, int]] = []
        stride = self.mismatch_stride if self.mismatch_stride > 0 else max(n_output, 1)
        begin = 1
        while begin < n_output:
            end = min((begin // stride + 1) * stride, n_output)
            for position in range(begin, end, self.block):
                out.append((min(self.block - 1, n_output - 1 - position), min(self.block, end - position) - 1))
            begin = end
        return out


Proposer = NoSpec | Ngram | Oracle


@dataclass
class Keyed:
    """A draft is accepted iff it equals the token that the keyed sampler picks there. Lossless."""

    name: str = "keyed"
    code: ClassVar[int] = int(layout.Acceptance.KEYED)

    def lossless(self, temperature: float) -> bool:
        return True


@dataclass
class Greedy:
    """A draft is accepted iff it is the argmax of the target; lossy at a temperature above 0."""

    name: str = "greedy"
    code: ClassVar[int] = int(layout.Acceptance.GREEDY)

    def lossless(self, temperature: float) -> bool:
        return temperature == 0.0


@dataclass
class Forced:
    """Keyed, but the draft at output positions p with (p + 1) % stride == 0 is rejected whatever it is. Lossless.

    It only ever rejects: the token that replaces the draft is the keyed sample, so the text stays the right text.
    """

    name: str = "forced"
    stride: int = 4  # output tokens from one rejection to the next
    code: ClassVar[int] = int(layout.Acceptance.FORCED)

    def lossless(self, temperature: float) -> bool:
        return True


Acceptance = Keyed | Greedy | Forced
