"""Keyed sampling in numpy: what the kernels do to a row of logits, for peers whose logits lie with the host.

logits [vocab] float32 -> a token. The order of kernels/penalties.h, sampling.h and phases/filter.h: bias, repetition,
frequency and presence penalties, temperature, top-k, top-p, min-p, Gumbel noise keyed by (seed, position, token id).
Given the same logits the same token comes out, but where two candidates lie within a rounding of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from xlpk.hash_weights import philox4x32
from xlpk.workload import Request

Float32: TypeAlias = npt.NDArray[np.float32]
NOISE_WORD = 0x53414D50  # the counter's third word: this use of the generator
Logprobs: TypeAlias = tuple[float, tuple[tuple[int, float], ...]]  # of the token; (token id, logprob), likely first


def gumbel(seed: int, position: int, vocab_size: int) -> Float32:
    """[vocab_size]: standard Gumbel variates, -log(-log u) with u = (word + 1/2) / 2^32.

    The word of token n is Philox4x32-10[n % 4] of counter (n / 4, position, NOISE_WORD, 0) under the key `seed`. Above
    1/2, -log u is taken from 1 - u, which is exact, so that both tails are.
    """
    counter = np.zeros((4, -(-vocab_size // 4)), np.uint32)
    counter[0], counter[1], counter[2] = np.arange(counter.shape[1]), position, NOISE_WORD
    seed &= (1 << 64) - 1
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    u = (np.ascontiguousarray(words.T).reshape(-1)[:vocab_size] + 0.5) * 2.0**-32
    exponential = np.where(u < 0.5, -np.log(u), -np.log1p(-np.minimum(1 - u, 0.5)))
    return np.asarray(-np.log(exponential), np.float32)


def kept(logits: Float32, request: Request) -> npt.NDArray[np.bool_]:
    """[vocab]: the tokens that top-k, top-p and min-p leave, in transformers' order. Equal values stay or go together.

    NaN never stays. `logits`: after bias and penalties; the request's temperature is above 0.
    """
    mask = ~np.isnan(logits)
    if not mask.any():
        return mask
    scaled = np.where(mask, logits, -np.inf).astype(np.float64) / request.temperature
    if 0 < request.top_k < logits.size:
        mask &= scaled >= np.partition(scaled, -request.top_k)[-request.top_k]
    weights = np.where(mask, np.exp(scaled - scaled.max()), 0.0)
    if request.top_p < 1:
        order = np.argsort(-scaled, kind="stable")
        reached = int(np.searchsorted(np.cumsum(weights[order]), request.top_p * weights.sum()))
        mask &= scaled >= scaled[order[min(reached, scaled.size - 1)]]
    if request.min_p > 0:
        mask &= weights >= request.min_p
    return mask


def logprobs_of(logits: Float32, token: int, count: int) -> Logprobs:
    """The token's logprob by the model's own logits, and the `count` most likely tokens; ties by id."""
    exact = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    top = np.argsort(-exact, kind="stable")[:count]
    return float(exact[token]), tuple((int(n), float(exact[n])) for n in top)


class Picker:
    """Picks one request's tokens; counts what was picked, for penalties."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        self.request = request
        self._filters = request.temperature > 0 and (request.top_k > 0 or request.top_p < 1 or request.min_p > 0)
        self._penalizes = request.repetition_penalty != 1 or bool(request.presence_penalty or request.frequency_penalty)
        self._output = np.zeros(vocab_size, np.int64)
        self._prompt = np.zeros(vocab_size, np.bool_)
        self._prompt[list(request.prompt)] = True

    @property
    def plain(self) -> bool:
        """Whether a token is nothing but the argmax of the model's logits."""
        request = self.request
        return request.temperature == 0 and not (self._penalizes or request.logit_bias or request.logprobs is not None)

    def commit(self, token: int) -> None:
        """The token joins the output."""
        self._output[token] += 1

    def pick(self, logits: Float32, position: int, before: Sequence[int] = ()) -> int:
        """The token for `position` of the sequence; -1: every logit is NaN.

        `before`: drafts in front of this row, which count as output: if one of them is rejected, so is the row.
        """
        request = self.request
        values = self._adjusted(logits, before) if self._penalizes or request.logit_bias else logits
        mask = kept(values, request) if self._filters else ~np.isnan(values)
        if not mask.any():
            return -1
        if request.temperature > 0:
            values = values / np.float32(request.temperature) + gumbel(request.seed, position, logits.size)
        candidates = np.flatnonzero(mask)
        return int(candidates[np.argmax(values[candidates])])  # the first of equals: the lower id

    def _adjusted(self, logits: Float32, before: Sequence[int]) -> Float32:
        """Bias, then repetition (over prompt and output), frequency and presence (over the output)."""
        request = self.request
        values = logits.astype(np.float32, copy=True)
        for token, bias in request.logit_bias:
            values[token] += np.float32(bias)
        if not self._penalizes:
            return values
        output = self._output
        if before:
            output = output + np.bincount(before, minlength=output.size)
        seen = self._prompt | (output > 0)
        factor = np.float32(request.repetition_penalty)
        values[seen] = np.where(values[seen] > 0, values[seen] / factor, values[seen] * factor)
        shift = request.frequency_penalty * output + request.presence_penalty * (output > 0)
        return np.asarray(values - shift.astype(np.float32), np.float32)
