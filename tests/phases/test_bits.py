"""One order of sums: tokens and logits are the same bits whatever instructions the build has and whatever a team is."""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache as memoize
from pathlib import Path

import numpy as np
import pytest
from phases.shims import Array, Shim, fused
from stages.sessions import serve, session

from xlpk.backends.cpu import CpuLibrary
from xlpk.dtypes import NUMPY_DTYPE, bf16_decode, bf16_encode, decode
from xlpk.model import Model
from xlpk.reference import bound
from xlpk.speculation import Ngram
from xlpk.toolchain import CXX_FLAGS, build_cpu_library
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
Outputs = tuple[dict[int, list[int]], Array]
VECTORS = ("-DXL_NO_AMX",)  # tiles have an order of their own: test_amx.py


QUICK = {("generic", "biases_fp16"), ("generic", "narrow")}
ALL = [(variant, name) for variant in VARIANTS for name in ("narrow", "head128_mha_fp32", "head80", "biases_fp16")]


@pytest.fixture(scope="module")
def builds(cache: Path, request: pytest.FixtureRequest) -> dict[str, CpuLibrary]:
    """The vector build, and the variants that are asked for."""
    using = [item for item in request.session.items if "builds" in getattr(item, "fixturenames", ())]
    asked = {item.callspec.params.get("variant") for item in using if hasattr(item, "callspec")}
    flags = {"": (), **{name: flags for name, flags in VARIANTS.items() if name in asked}}
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda extra: build_cpu_library(cache, extra_flags=(*VECTORS, *extra)), flags.values())
        return {name: CpuLibrary(build) for name, build in zip(flags, made, strict=True)}


@pytest.fixture(scope="module")
def expected(small: Callable[[str], Model], builds: dict[str, CpuLibrary]) -> Callable[[str], Outputs]:
    """Name of a model -> what the vector build makes of it."""
    return memoize(lambda name: outputs(small(name), builds[""]))


def outputs(model: Model, library: CpuLibrary, *, threads: int = 1) -> Outputs:
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


@pytest.mark.parametrize(
    ("variant", "name"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.heavy) for case in ALL]
)
def test_every_build_gives_the_same_bits(
    small: Callable[[str], Model],
    builds: dict[str, CpuLibrary],
    expected: Callable[[str], Outputs],
    variant: str,
    name: str,
) -> None:
    tokens, logits = expected(name)
    assert np.isfinite(logits).all()
    assert len(np.unique(logits)) > 10_000
    others, other_logits = outputs(small(name), builds[variant], threads=2 if variant == "race" else 1)
    assert other_logits.tobytes() == logits.tobytes()
    assert others == tokens


@pytest.mark.parametrize(("dtype", "rounded"), [("bf16", True), ("bf16", False), ("fp16", False), ("fp32", False)])
def test_dot_has_one_order(cache: Path, dtype: str, rounded: bool) -> None:
    """The vector chunk against the portable one, alone and among others, for every remainder of rows and lengths."""
    shim = Shim(cache)
    rng = np.random.RandomState(7)
    for k in (32, 64, 96, 1056, 2080, 8192):
        n, most = (19, 12) if k < 2080 else (5, 131)
        w: Array = rng.standard_normal((n, k)).astype(np.float32)
        w = bf16_encode(w) if dtype == "bf16" else w.astype(NUMPY_DTYPE[dtype])
        x = (rng.standard_normal((most, k)) * 10.0 ** rng.randint(-3, 4, (most, k))).astype(np.float32)
        values = bf16_decode(bf16_encode(x)) if rounded else x
        x = bf16_encode(x) if rounded else x
        plain = shim.dot(w, x, plain=True)
        exact = values.astype(np.float64) @ decode(w).astype(np.float64).T
        size = np.abs(values.astype(np.float64)) @ np.abs(decode(w)).astype(np.float64).T
        assert (np.abs(plain - exact) <= bound("fp32", k) * size).all()
        for count in (*range(1, 10), 24, 128, 130, 131):
            if count <= most:
                assert shim.dot(w, x[:count], plain=False).tobytes() == plain[:count].tobytes()
        for begin in (0, 1):  # on a cache line or across two: many rows move what lies across
            memory = np.empty(w.size + 64, w.dtype)
            begin += -memory.ctypes.data % 64 // w.itemsize
            moved = memory[begin : begin + w.size].reshape(w.shape)
            moved[:] = w
            assert shim.dot(moved, x, plain=False).tobytes() == plain.tobytes()
        for r in range(0, most, 5):
            assert shim.dot(w[:3], x[r : r + 1], plain=False).tobytes() == plain[r, :3].tobytes()


def test_dot_is_32_lanes_and_the_fixed_tree(cache: Path) -> None:
    """The order itself: a product a lane, then lanes 16 apart, 8, 4, 2, 1; small integers would hide it."""
    rng = np.random.RandomState(8)
    k = 96
    w, x = rng.standard_normal((2, k)).astype(np.float32)
    lanes = np.zeros(32, np.float32)
    for i in range(0, k, 32):
        lanes = fused(w[i : i + 32], x[i : i + 32], lanes)
    assert Shim(cache).dot(w[None], x[None], plain=False) == tree(lanes)


def test_dot_of_bf16_adds_the_odd_of_a_pair_first(cache: Path) -> None:
    """A lane takes two neighbours; 96 elements end with pairs for half of the lanes."""
    rng = np.random.RandomState(9)
    k = 96
    w, x = bf16_encode(rng.standard_normal((2, k)).astype(np.float32))
    pairs_w, pairs_x = decode(w).reshape(-1, 2), bf16_decode(x).reshape(-1, 2)
    lanes = np.zeros(32, np.float32)
    for i in (0, 32):
        one, two = pairs_w[i : i + 32], pairs_x[i : i + 32]
        lanes[: len(one)] = fused(one[:, 0], two[:, 0], fused(one[:, 1], two[:, 1], lanes[: len(one)]))
    assert Shim(cache).dot(w[None], x[None], plain=False) == tree(lanes)


def tree(lanes: Array) -> np.float32:
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return lanes[0]


def test_flags_forbid_contraction() -> None:
    """Also where the machine has FMA: `-march=native` alone would let g++ contract."""
    assert "-ffp-contract=off" in CXX_FLAGS
    assert not any(flag.startswith(("-ffast-math", "-Ofast", "-funsafe")) for flag in CXX_FLAGS)
