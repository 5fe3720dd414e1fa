"""One order of sums: tokens and logits are the same bits whatever instructions the build has and whatever a team is."""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from phases.shims import Array, Shim
from stages.sessions import serve, session

from xlpk.backends.cpu import CpuLibrary
from xlpk.model import Model
from xlpk.reference import bound
from xlpk.speculation import Ngram
from xlpk.toolchain import CXX_FLAGS, build_cpu_library
from xlpk.weights import NUMPY_DTYPE, bf16_encode, decode
from xlpk.workload import Request

X86 = {
    "avx2": ("-mno-avx512f",),  # four registers of 8
    "generic": ("-march=x86-64-v2",),  # no vector chunk, and fma in software
}
VARIANTS: dict[str, tuple[str, ...]] = {
    **(X86 if platform.machine() == "x86_64" else {"generic": ("-mtune=generic",)}),
    "unoptimised": ("-O1",),
    "race": ("-DXL_RACE", "-O1"),  # teams of 4 threads in warps of 2 lanes
}


@pytest.fixture(scope="module")
def variants(cache: Path) -> dict[str, CpuLibrary]:
    with ThreadPoolExecutor(2) as pool:
        builds = pool.map(lambda flags: build_cpu_library(cache, extra_flags=flags), VARIANTS.values())
        return {name: CpuLibrary(build) for name, build in zip(VARIANTS, builds, strict=True)}


def outputs(model: Model, library: CpuLibrary, *, threads: int = 1) -> tuple[dict[int, list[int]], Array]:
    """Tokens of three requests that run together, and the logits at the prompt of the first, which crosses a span."""
    rng = np.random.RandomState(6)
    vocab = model.config.vocab_size
    batch = [
        Request(
            i, tuple(rng.randint(0, vocab, length).tolist()), 12, temperature=0.7 * (i % 2), seed=i, ignore_eos=True
        )
        for i, length in enumerate((270, 9, 33))
    ]
    options = {"max_len": 512, "pages": 96, "prefill_chunk": 90, "max_step_rows": 96, "spec": Ngram()}
    with session(model, library, threads=threads, max_num_seqs=3, debug_logits=True, **options) as backend:
        log = serve(backend, batch)
        return dict(log.tokens), backend.logits(270)


@pytest.mark.parametrize("name", ["narrow", "head128_mha_fp32", "head80", "biases_fp16"])
def test_every_build_gives_the_same_bits(
    small: Callable[[str], Model], cpu_library: CpuLibrary, variants: dict[str, CpuLibrary], name: str
) -> None:
    model = small(name)
    tokens, logits = outputs(model, cpu_library)
    assert np.isfinite(logits).all()
    assert len(np.unique(logits)) > 10_000
    for variant, library in variants.items():
        others, other_logits = outputs(model, library, threads=2 if variant == "race" else 1)
        assert other_logits.tobytes() == logits.tobytes(), variant
        assert others == tokens, variant


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_dot_has_one_order(cache: Path, dtype: str) -> None:
    """The vector chunk against the portable one, alone and among others, for every remainder of the row block."""
    shim = Shim(cache)
    rng = np.random.RandomState(7)
    for k in (32, 64, 96, 1056, 8192):
        w: Array = rng.standard_normal(k).astype(np.float32)
        w = bf16_encode(w) if dtype == "bf16" else w.astype(NUMPY_DTYPE[dtype])
        x = (rng.standard_normal((9, k)) * 10.0 ** rng.randint(-3, 4, (9, k))).astype(np.float32)
        plain = shim.dot(w, x, plain=True)
        exact = x.astype(np.float64) @ decode(w).astype(np.float64)
        size = np.abs(x.astype(np.float64)) @ np.abs(decode(w)).astype(np.float64)
        assert (np.abs(plain - exact) <= bound("fp32", k) * size).all()
        for count in range(1, 10):
            for row in shim.dot(w, x[:count], plain=False), shim.dot(w, x[:count], plain=True):
                assert row.tobytes() == plain[:count].tobytes()
        alone = [shim.dot(w, x[r : r + 1], plain=False)[0] for r in range(9)]
        assert np.array(alone).tobytes() == plain.tobytes()


def test_dot_is_32_lanes_and_the_fixed_tree(cache: Path) -> None:
    """The order itself: a product a lane, then lanes 16 apart, 8, 4, 2, 1; small integers would hide it."""
    rng = np.random.RandomState(8)
    k = 96
    w, x = rng.standard_normal((2, k)).astype(np.float32)
    lanes = np.zeros(32, np.float64)
    for i in range(0, k, 32):  # fma in float64, rounded once: exact products of two float32
        lanes = (lanes + w[i : i + 32].astype(np.float64) * x[i : i + 32]).astype(np.float32).astype(np.float64)
    total = lanes.astype(np.float32)
    while total.size > 1:
        total = total[: total.size // 2] + total[total.size // 2 :]
    assert Shim(cache).dot(w, x[None], plain=False)[0] == total[0]


def test_flags_forbid_contraction() -> None:
    """Also where the machine has FMA: `-march=native` alone would let g++ contract."""
    assert "-ffp-contract=off" in CXX_FLAGS
    assert not any(flag.startswith(("-ffast-math", "-Ofast", "-funsafe")) for flag in CXX_FLAGS)
