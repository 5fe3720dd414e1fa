"""The whole forward pass of the Llama family in numpy and float64: the oracle that every backend is compared with.

tokens [n] -> logits [n, vocab]. Nothing here is fast. `error_bound` computes how far a float32 implementation may be
from it; no tolerance is typed in by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from xlpk.dtypes import bf16_decode, bf16_encode, decode
from xlpk.errors import InputError
from xlpk.model import ModelConfig
from xlpk.weights import Weights

Array: TypeAlias = npt.NDArray[Any]
Float64: TypeAlias = npt.NDArray[np.float64]
Cache: TypeAlias = list[tuple[Array, Array]]  # per layer: K and V of the tokens so far, each [kv, past, d]

ROUNDOFF = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-8}  # largest relative error of one rounding to nearest


def bound(dtype: str, k: int) -> float:
    """Standard deviation of a sum of k products t in `dtype`, relative to |sum of t| + sqrt(sum of t^2): sqrt(k) * u.

    Each of the k additions errs by up to u times the partial sum it makes, independently, so the variance is at most
    u^2 times the sum of the squared partial sums (Higham and Mary 2019, "A new approach to probabilistic rounding error
    analysis": sqrt(k) where the worst case has k). In an order that ignores the values, partial sums wander no further
    than the drift |sum of t| plus the walk sqrt(sum of t^2) (the same authors' "Sharper probabilistic backward error
    analysis", 2020, for terms of zero mean). A tree or blocked sum errs less.
    """
    return math.sqrt(k) * ROUNDOFF[dtype]


class Exact:
    """Weights decoded to `dtype`, each on first use. Pass one to several calls of `forward` to decode once."""

    def __init__(self, weights: Weights, dtype: npt.DTypeLike = np.float64) -> None:
        self.weights = weights
        self.dtype = np.dtype(dtype)
        self._decoded: dict[str, Array] = {}

    def __call__(self, name: str) -> Array:
        """[rows, columns] of a matrix, [n] of a norm vector or a bias."""
        if name not in self._decoded:
            if name.endswith(("norm.weight", ".bias")):
                self._decoded[name] = self.weights.vector(name).astype(self.dtype)
            else:
                self._decoded[name] = decode(self.weights.matrix(name).base).astype(self.dtype)
        return self._decoded[name]


class Arithmetic:
    """What happens to each intermediate once it is computed. Here: nothing. `Perturbed` adds errors."""

    def value(self, x: Array, roundings: float = 1.0) -> Array:
        """x, the result of so many roundings an element."""
        return x

    def product(self, x: Array, w: Array) -> Array:
        """x [..., n, k] @ w [..., k, m]."""
        return np.asarray(x @ w)

    def mean_square(self, x: Array) -> Array:
        """[n, k] -> [n, 1]."""
        return np.asarray(np.mean(x * x, axis=-1, keepdims=True))

    def total(self, x: Array) -> Array:
        """Of terms >= 0: [..., k] -> [..., 1]."""
        return np.asarray(np.sum(x, axis=-1, keepdims=True))

    def stored(self, x: Array) -> Array:
        """K or V as a page gives it back."""
        return x

    def read(self, x: Array) -> Array:
        """Activations as the multiply by a matrix reads them."""
        return x


@dataclass
class Rounded(Arithmetic):
    """Rounded to bf16 where the dtype says so, by the kernels' own rule; everything else exact."""

    kv_dtype: str | None  # of pages
    activations: str | None  # in front of a matrix

    def __post_init__(self) -> None:
        for name in ("kv_dtype", "activations"):
            if getattr(self, name) not in (None, "fp32", "bf16"):
                raise InputError(name, getattr(self, name), "one of fp32, bf16")

    def stored(self, x: Array) -> Array:
        return _to_bf16(x) if self.kv_dtype == "bf16" else x

    def read(self, x: Array) -> Array:
        return _to_bf16(x) if self.activations == "bf16" else x


def _to_bf16(x: Array) -> Array:
    return bf16_decode(bf16_encode(x)).astype(x.dtype)


# ---------------------------------------------------------------------------------------------- the forward pass


def forward(
    config: ModelConfig,
    weights: Weights | Exact,
    tokens: npt.ArrayLike,
    *,
    kv_dtype: str | None = None,
    activations: str | None = None,
    cache: Cache | None = None,
    dtype: npt.DTypeLike = np.float64,
    ops: Arithmetic | None = None,
) -> Array:
    """Logits after each of `tokens` [n] -> [n, vocab], in `dtype`.

    Args:
        kv_dtype: "bf16" rounds K (after RoPE) and V as bf16 pages do; None leaves them exact.
        activations: "bf16" rounds what a matrix is multiplied with, as the kernels do for bf16 matrices; None does not.
        cache: K and V of earlier tokens, an empty list at first; this call appends its own.
        ops: how intermediates are treated; by default as `kv_dtype` and `activations` say.
    """
    w = weights if isinstance(weights, Exact) else Exact(weights, dtype)
    ops = Rounded(kv_dtype, activations) if ops is None else ops
    ids = check_tokens(config, tokens)
    past = cache[0][0].shape[1] if cache else 0
    heads, kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    angles = (past + np.arange(ids.size))[:, None] * config.inv_freq()  # [n, d/2] radians
    x = w("model.embed_tokens.weight")[ids]  # [n, hidden]

    def project(h: Array, name: str) -> Array:
        """[n, k] -> [n, m], plus the bias where the model has one."""
        y = ops.product(ops.read(h), w(name + ".weight").T)
        return ops.value(y + w(name + ".bias")) if name + ".bias" in w.weights.names else y

    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        h = rms_norm(x, w(at + "input_layernorm.weight"), config.rms_norm_eps, ops)  # [n, hidden]
        q = split_heads(project(h, at + "self_attn.q_proj"), heads, d)  # [heads, n, d]
        k = split_heads(project(h, at + "self_attn.k_proj"), kv, d)  # [kv, n, d]
        v = split_heads(project(h, at + "self_attn.v_proj"), kv, d)  # [kv, n, d]
        q, k = rotate(q, angles, ops), ops.stored(rotate(k, angles, ops))
        v = ops.stored(v)
        if cache is not None:
            if len(cache) > layer:
                k = np.concatenate([cache[layer][0], k], axis=1)  # [kv, past + n, d]
                v = np.concatenate([cache[layer][1], v], axis=1)
                cache[layer] = k, v
            else:
                cache.append((k, v))
        owner = kv_head_of(config)  # [heads]
        a = attend(q, k[owner], v[owner], ops)  # [heads, n, d]
        a = a.transpose(1, 0, 2).reshape(ids.size, heads * d)  # [n, heads * d]
        x = ops.value(x + project(a, at + "self_attn.o_proj"))  # [n, hidden]

        h = rms_norm(x, w(at + "post_attention_layernorm.weight"), config.rms_norm_eps, ops)  # [n, hidden]
        gate = project(h, at + "mlp.gate_proj")  # [n, intermediate]
        up = project(h, at + "mlp.up_proj")  # [n, intermediate]
        h = ops.value(silu(gate) * up, 6)  # [n, intermediate]
        x = ops.value(x + project(h, at + "mlp.down_proj"))  # [n, hidden]

    x = rms_norm(x, w("model.norm.weight"), config.rms_norm_eps, ops)  # [n, hidden]
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return ops.product(ops.read(x), w(head).T)  # [n, vocab]


def rms_norm(x: Array, gain: Array, eps: float, ops: Arithmetic) -> Array:
    """[n, hidden] -> [n, hidden]: each row to root mean square 1, times gain [hidden]."""
    return ops.value(x / np.sqrt(ops.mean_square(x) + eps) * gain, 4)


def split_heads(x: Array, heads: int, d: int) -> Array:
    """[n, heads * d] -> [heads, n, d]."""
    return x.reshape(x.shape[0], heads, d).transpose(1, 0, 2)


def rotate(x: Array, angles: Float64, ops: Arithmetic) -> Array:
    """RoPE on [heads, n, d]: turns the pair (x[i], x[i + d/2]) by angles[n, i], the Hugging Face layout."""
    first, second = np.split(x, 2, axis=-1)  # [heads, n, d/2] each
    angles = ops.value(angles, 3)  # frequency, position times it, reduction
    cos, sin = ops.value(np.cos(angles).astype(x.dtype), 2), ops.value(np.sin(angles).astype(x.dtype), 2)
    one, two = ops.value(first * cos), ops.value(second * sin)
    three, four = ops.value(second * cos), ops.value(first * sin)
    return np.concatenate([ops.value(one - two), ops.value(three + four)], axis=-1)


def kv_head_of(config: ModelConfig) -> Array:
    """The key/value head that each query head reads: neighbours share."""
    return np.arange(config.num_attention_heads) // config.group


def attend(q: Array, k: Array, v: Array, ops: Arithmetic) -> Array:
    """Causal attention: q [heads, n, d], k and v [heads, m, d] with m >= n, of which the last n are q's own."""
    n, m, d = q.shape[1], k.shape[1], q.shape[2]
    scores = ops.value(ops.product(q, k.transpose(0, 2, 1)) / math.sqrt(d), 2)  # [heads, n, m]
    future = np.arange(m) > np.arange(m - n, m)[:, None]  # [n, m]
    scores = np.where(future, -np.inf, scores)
    p = ops.value(np.exp(scores - scores.max(axis=-1, keepdims=True)), 4)  # [heads, n, m]
    return ops.value(ops.product(p, v) / ops.total(p), 2)  # [heads, n, d]


def silu(x: Array) -> Array:
    """x * sigmoid(x), without overflow."""
    return np.asarray(x * 0.5 * (1 + np.tanh(0.5 * x)))


def check_tokens(config: ModelConfig, tokens: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """[n] token ids, n >= 1, each inside the vocabulary."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise InputError("tokens", f"{ids.dtype}{list(ids.shape)}", "a list of at least one whole number")
    for token in (ids.min(), ids.max()):
        if not 0 <= token < config.vocab_size:
            raise InputError("tokens", token, f"0 to {config.vocab_size - 1}")
    return ids.astype(np.int64)


def greedy(
    config: ModelConfig, weights: Weights | Exact, prompt: npt.ArrayLike, n: int, *, kv_dtype: str | None = None
) -> tuple[npt.NDArray[np.int64], Array]:
    """Continues `prompt` by n tokens -> (tokens [n], margins [n]). Ties go to the lower id; stop tokens do not stop it.

    margin: the best logit less the second best. A comparison of tokens says something only where it exceeds twice the
    error bound.
    """
    w = weights if isinstance(weights, Exact) else Exact(weights)
    cache: Cache = []
    tokens, margins = np.zeros(n, dtype=np.int64), np.zeros(n)
    feed = check_tokens(config, prompt)
    for i in range(n):
        logits = forward(config, w, feed, kv_dtype=kv_dtype, cache=cache)[-1]  # [vocab]
        tokens[i], margins[i] = np.argmax(logits), margin(logits)
        feed = tokens[i : i + 1]
    return tokens, margins


def margin(logits: Array) -> Array:
    """[..., vocab] -> [...]: the largest less the second largest."""
    top: Array = np.partition(logits, -2, axis=-1)
    return np.asarray(top[..., -1] - top[..., -2])


# ---------------------------------------------------------------------------------------------- the error bound


@dataclass
class Perturbed(Arithmetic):
    """Adds to each intermediate an error of random sign and of the size that rounding may give it."""

    rng: np.random.Generator
    dtype: str  # of sums
    kv_dtype: str | None  # of pages; None: as exact as the sums
    activations: str | None  # in front of a matrix; None: likewise

    def _signs(self, shape: tuple[int, ...]) -> Array:
        return self.rng.integers(0, 2, size=shape, dtype=np.int8) * 2.0 - 1.0

    def value(self, x: Array, roundings: float = 1.0) -> Array:
        return np.asarray(x + x * self._signs(x.shape) * (roundings * ROUNDOFF[self.dtype]))

    def product(self, x: Array, w: Array) -> Array:
        y = x @ w
        size = np.abs(y) + np.sqrt((x * x) @ (w * w))
        return np.asarray(y + size * self._signs(y.shape) * bound(self.dtype, x.shape[-1]))

    def mean_square(self, x: Array) -> Array:
        return self.value(super().mean_square(x), 2 * math.sqrt(x.shape[-1]))

    def total(self, x: Array) -> Array:
        return self.value(super().total(x), 2 * math.sqrt(x.shape[-1]))

    def stored(self, x: Array) -> Array:
        return self._near_bf16(x) if self.kv_dtype == "bf16" else x

    def read(self, x: Array) -> Array:
        return self._near_bf16(x) if self.activations == "bf16" else x

    def _near_bf16(self, x: Array) -> Array:
        half = np.ldexp(ROUNDOFF["bf16"], np.frexp(x)[1] - 1)  # half the distance between x's bf16 neighbours
        return np.asarray(x + half * self.rng.uniform(-1, 1, x.shape))


def error_bound(
    config: ModelConfig,
    weights: Weights | Exact,
    tokens: npt.ArrayLike,
    *,
    dtype: str = "fp32",
    kv_dtype: str | None = None,
    activations: str | None = None,
    samples: int = 8,
    failure: float = 1e-6,
    seed: int = 0,
    errors: Callable[[np.random.Generator], Arithmetic] | None = None,
) -> Float64:
    """[n]: the largest |logits - `forward(..., kv_dtype=None)`| that rounding explains, at each position.

    For an implementation with sums in `dtype`, in any order, pages in `kv_dtype` and what matrices are multiplied with
    in `activations` ("bf16", or None for as exact as the sums). It covers the comparison with `forward` of the same
    `kv_dtype` and `activations` too: there only values next to a rounding boundary differ. `errors` stands for another
    implementation's arithmetic, in place of `Perturbed` with the three dtypes.

    Method: to first order the error of a logit is a sum of independent local errors, each carried to the logit by the
    derivative (Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.8; independence as in Higham
    and Mary 2019). So: run the oracle `samples` times with every intermediate moved by a random error of the size that
    `bound` or the pages' rounding gives it; the root mean square of the deviations estimates the standard deviation s
    of each logit; take the largest s of a position, and the tail of a sum of independent bounded terms (Hoeffding
    1963), |error| < s * sqrt(2 ln(2N / failure)), for all N = n * vocab logits at once.
    """
    w = weights if isinstance(weights, Exact) else Exact(weights)
    rng = np.random.default_rng(seed)
    exact = forward(config, w, tokens)
    squares = np.zeros_like(exact)
    ops = Perturbed(rng, dtype, kv_dtype, activations) if errors is None else errors(rng)
    for _ in range(samples):
        squares += np.square(forward(config, w, tokens, ops=ops) - exact)
    deviation = np.sqrt(squares / samples).max(axis=-1)  # [n]
    return np.asarray(deviation * math.sqrt(2 * math.log(2 * exact.size / failure)))
