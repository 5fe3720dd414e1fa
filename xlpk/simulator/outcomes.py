"""What a forward pass would have found: which token comes next, and which drafts hold.

`Recorded` answers with what a real loop put out. `Synthetic` answers with tokens from a keyed hash, and may propose the
drafts itself, so that they hold as often as an acceptance law says.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Tokens

from xlpk.simulator.sequence import Sequence
from xlpk.speculation import Acceptance, Forced, Keyed

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Outcomes:
    """The text of every request is known beforehand, as it is under lossless acceptance."""

    def __init__(self, acceptance: Acceptance | None = None) -> None:
        self._stride = acceptance.stride if isinstance(acceptance, Forced) else 0

    def token(self, sequence: Sequence, index: int) -> int:
        """Output token `index` of the request; -1: there is none, every logit was NaN."""
        raise NotImplementedError

    def propose(self, sequence: Sequence, wanted: int) -> list[int] | None:
        """At most `wanted` drafts; None: the proposer of the rules makes them."""
        return None

    def all_drafts(self, sequence: Sequence, count: int) -> list[int]:
        """Of outcomes that propose: the drafts of its first `count` output tokens, one a place whenever it is drafted.

        ~draft where a verification that begins there has no drafts.
        """
        raise NotImplementedError

    def verify(self, sequence: Sequence, drafts: Tokens[int]) -> tuple[list[int], int]:
        """-> (tokens that the request emits: the drafts that hold, then one of the target's own; drafts that hold)."""
        index = len(sequence.tokens) - sequence.prompt_len
        tokens = [self.token(sequence, index)]
        for draft in drafts:
            rejected = self._stride and (index + len(tokens)) % self._stride == 0
            if draft != tokens[-1] or rejected:
                break
            tokens.append(self.token(sequence, index + len(tokens)))
        return tokens, len(tokens) - 1


class Recorded(Outcomes):
    """What a real loop put out. `outputs`: output tokens by request id."""

    def __init__(self, outputs: Mapping[int, Tokens[int]], acceptance: Acceptance | None = None) -> None:
        super().__init__(acceptance)
        self._outputs = outputs

    def token(self, sequence: Sequence, index: int) -> int:
        output = self._outputs.get(sequence.request_id, ())
        return output[index] if index < len(output) else -1


class Synthetic(Outcomes):
    """Tokens from a keyed hash of (seed, request, position): a stand-in for text, the same whatever the schedule.

    Args:
        vocab_size: tokens are below it.
        seed: of all tokens and of the law.
        avoid: tokens that never come, such as those that would end an output by chance.
        rate: each draft holds with this probability, independently (Bernoulli); None: whether it holds is up to the
            proposer of the rules and to the tokens.
        hit_rate: with `rate`, the share of verifications for which the proposer finds anything.
        acceptance: its strides apply on top.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        seed: int = 0,
        avoid: frozenset[int] = frozenset(),
        rate: float | None = None,
        hit_rate: float = 1.0,
        acceptance: Acceptance | None = None,
    ) -> None:
        super().__init__(acceptance or Keyed())
        if not all(0 <= share <= 1 for share in (hit_rate, *([] if rate is None else [rate]))):
            raise ValueError(f"rate={rate}, hit_rate={hit_rate}: probabilities")
        if len([token for token in avoid if 0 <= token < vocab_size]) >= vocab_size:
            raise ValueError("no token is left")
        self._vocab_size, self._avoid, self._seed = vocab_size, avoid, seed
        self._rate, self._hit_rate = rate, hit_rate

    def token(self, sequence: Sequence, index: int) -> int:
        if sequence.memo is None:
            sequence.memo = self._key(sequence.request_id)
        token = _mixed(sequence.memo + index * _GOLDEN) % self._vocab_size
        while token in self._avoid:
            token = (token + 1) % self._vocab_size
        return token

    def answers(self, request_id: int, count: int) -> list[int]:
        """The first output tokens of a request, as right answers for spec=oracle."""
        key, out = self._key(request_id), []
        for index in range(count):
            token = _mixed(key + index * _GOLDEN) % self._vocab_size
            while token in self._avoid:
                token = (token + 1) % self._vocab_size
            out.append(token)
        return out

    def propose(self, sequence: Sequence, wanted: int) -> list[int] | None:
        if self._rate is None:
            return None
        index = sequence.n_output
        return self._drafts(sequence, index, wanted) if self._finds(sequence, index) else []

    def all_drafts(self, sequence: Sequence, count: int) -> list[int]:
        drafts = self._drafts(sequence, 0, count)
        return [draft if self._finds(sequence, index) else ~draft for index, draft in enumerate(drafts)]

    def _finds(self, sequence: Sequence, index: int) -> bool:
        return self._hit_rate == 1 or self._uniform(sequence, index, 1) < self._hit_rate

    def _drafts(self, sequence: Sequence, begin: int, count: int) -> list[int]:
        assert self._rate is not None
        drafts = []
        for place in range(begin, begin + count):
            token = self.token(sequence, place)
            holds = self._uniform(sequence, place, 2) < self._rate
            drafts.append(token if holds else (token + 1) % self._vocab_size)
        return drafts

    def _key(self, request_id: int) -> int:
        return _mixed(_mixed(self._seed * _GOLDEN + 1) + request_id * _GOLDEN)

    def _uniform(self, sequence: Sequence, index: int, stream: int) -> float:
        """In [0, 1), one number for each (request, position, stream)."""
        key = self._key(sequence.request_id) ^ (stream * 0xD1342543DE82EF95)
        return float(_mixed(key + index * _GOLDEN) / 2.0**64)


def _mixed(key: int) -> int:
    """Finalizer of splitmix64 (Steele et al. 2014), modulo 2^64."""
    key &= _MASK
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB & _MASK
    return key ^ (key >> 31)
