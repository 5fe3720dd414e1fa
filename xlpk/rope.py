"""Rotary position embeddings: the frequencies of RoPE, plain or scaled (linear, dynamic NTK, Llama 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from xlpk.errors import InputError

FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_POSITIONS = 1 << 30


@dataclass(frozen=True)
class Llama3Rope:
    """RoPE scaling of Llama 3.1 and 3.2: long waves stretched by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int  # tokens


@dataclass(frozen=True)
class LinearRope:
    """RoPE scaling by position interpolation: every wave stretched by `factor` (Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True)
class DynamicRope:
    """NTK-aware RoPE scaling: theta grows with the sequence once it is longer than `max_position_embeddings`."""

    factor: float


Rope: TypeAlias = Llama3Rope | LinearRope | DynamicRope


def check_rope(scaling: Rope | None) -> None:
    """Raises InputError naming the field of `rope_scaling`."""
    if scaling is None:
        return
    if not 1 <= scaling.factor <= FLOAT32_MAX:
        raise InputError("rope_scaling.factor", scaling.factor, "a finite number of at least 1")
    if not isinstance(scaling, Llama3Rope):
        return
    if not 0 < scaling.low_freq_factor < math.inf:
        raise InputError("rope_scaling.low_freq_factor", scaling.low_freq_factor, "a finite number above 0")
    if not scaling.low_freq_factor < scaling.high_freq_factor < math.inf:
        raise InputError(
            "rope_scaling.high_freq_factor",
            scaling.high_freq_factor,
            f"finite and above low_freq_factor={scaling.low_freq_factor}",
        )
    if not 1 <= scaling.original_max_position_embeddings <= MAX_POSITIONS:
        raise InputError(
            "rope_scaling.original_max_position_embeddings",
            scaling.original_max_position_embeddings,
            f"1 to {MAX_POSITIONS}",
        )


def inv_freq(theta: float, head_dim: int, scaling: Rope | None) -> npt.NDArray[np.float64]:
    """Radians a token for each pair of rotated elements -> [head_dim / 2].

    Plain: theta^(-2i/d) (Su et al. 2021, RoFormer, section 3.2.2). Linear: that over the factor. Dynamic: plain, see
    `dynamic_theta`. Llama 3 scaling: `apply_scaling` in meta-llama/llama-models (models/llama3/model.py), which
    transformers repeats as `_compute_llama3_parameters` in modeling_rope_utils.py.
    """
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if isinstance(scaling, LinearRope):
        return np.asarray(plain / scaling.factor, dtype=np.float64)
    if not isinstance(scaling, Llama3Rope):
        return plain
    waves = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # turns over the original context
    blend = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(blend, 0.0, 1.0)  # 1: a short wave, kept; 0: a long one, stretched
    return np.asarray((1 - keep) * plain / scaling.factor + keep * plain, dtype=np.float64)


def dynamic_theta(theta: float, head_dim: int, scaling: DynamicRope, tokens: int, positions: int) -> float:
    """theta for a sequence of `tokens` of a model with `positions` (max_position_embeddings).

    `_compute_dynamic_ntk_parameters` in modeling_rope_utils.py of transformers.
    """
    growth = scaling.factor * max(tokens, positions) / positions - (scaling.factor - 1)
    return float(theta * growth ** (head_dim / (head_dim - 2)))
