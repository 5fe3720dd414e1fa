"""Drafts of the proposers that need no model: prompt lookup and the oracle."""

from __future__ import annotations

from xlpk.simulator.sequence import Sequence
from xlpk.speculation import Ngram, NoSpec, Oracle, Proposer


class Drafter:
    """Proposes drafts for a decoding request."""

    def __init__(self, proposer: Proposer, vocab_size: int) -> None:
        self._proposer, self._vocab_size = proposer, vocab_size

    def propose(self, sequence: Sequence, wanted: int) -> list[int]:
        """At most `wanted` >= 1 drafts for what follows the sequence's last token."""
        proposer = self._proposer
        if isinstance(proposer, NoSpec):
            return []
        if isinstance(proposer, Ngram):
            index: NgramIndex = sequence.ngrams or NgramIndex(proposer)
            sequence.ngrams = index
            return index.propose(sequence.tokens, wanted)
        assert isinstance(proposer, Oracle)
        return self._answers(proposer, sequence, wanted)

    def _answers(self, proposer: Oracle, sequence: Sequence, wanted: int) -> list[int]:
        """The last right answer is never drafted: it is the token that no draft gives."""
        begin, answers = sequence.n_output, sequence.request.oracle
        drafts = list(answers[begin : min(begin + wanted, len(answers) - 1)])
        stride = proposer.mismatch_stride
        for place in range(len(drafts)):
            if stride and (begin + place + 1) % stride == 0:
                drafts[place] = (drafts[place] + 1) % self._vocab_size
        return drafts


class NgramIndex:
    """Where each n-gram of a growing sequence occurred last: the answers of `Ngram.propose` without its search."""

    def __init__(self, proposer: Ngram) -> None:
        self._sizes = range(proposer.max_n, proposer.min_n - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> position behind its last occurrence
        self._known = 0  # tokens whose n-grams, but for those that end the sequence, are in the table

    def propose(self, tokens: list[int], wanted: int) -> list[int]:
        length = len(tokens)
        for end in range(self._known + 1, length):  # n-grams in front of the last token
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._known = length - 1
        for size in self._sizes:
            if size < length:
                found = self._ends.get(tuple(tokens[length - size :]))
                if found is not None:
                    return tokens[found : found + wanted]
        return []
