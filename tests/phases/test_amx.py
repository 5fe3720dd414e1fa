"""Products by AMX tiles: one order of sums at every width, the documented one.

On a machine without AMX the instructions are replaced by C++ of the same bits, and those that the compiler made are
carried out by a handler of illegal instructions.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES, make_case, prompt
from phases.shims import Array, Shim, fused
from stages.sessions import Log, serve, session

from xlpk.backends.cpu import CpuLibrary
from xlpk.dtypes import bf16_decode, bf16_encode
from xlpk.model import Model, load_model
from xlpk.reference import Exact, bound, error_bound, forward
from xlpk.speculation import Ngram, NoSpec
from xlpk.toolchain import amx_flags, build_cpu_library, build_shared
from xlpk.workload import Request

EMULATED = ("-DXL_AMX_EMULATED",)
REAL = ("-DXL_NO_AMX", "-UXL_NO_AMX", "-mamx-tile", "-mamx-bf16")  # whatever the toolchain adds
ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("tile_child.py")
X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86-64")


@pytest.fixture(scope="module")
def shim(cache: Path) -> Shim:
    return Shim(cache, EMULATED)


@pytest.fixture(scope="module")
def library(cache: Path) -> CpuLibrary:
    return CpuLibrary(build_cpu_library(cache, extra_flags=EMULATED))


def tile_sums(w: Array, x: Array) -> Array:
    """w [n, k], x [count, k] float32 of bf16 values -> [count, n]: 32 products at a time into two sums in turn."""
    sums = np.zeros((2, len(x), len(w)), np.float32)
    for block in range(w.shape[1] // 32):
        halves = np.zeros((2, len(x), len(w)), np.float32)  # even and odd elements
        for i in range(32):
            halves[i % 2] = fused(x[:, None, 32 * block + i], w[None, :, 32 * block + i], halves[i % 2])
        sums[block % 2] += halves[0] + halves[1]
    return np.asarray(sums[0] + sums[1])


def operands(n: int, count: int, k: int, seed: int = 10) -> tuple[Array, Array]:
    rng = np.random.RandomState(seed)
    x = rng.standard_normal((count, k)) * 10.0 ** rng.randint(-3, 4, (count, k))
    return bf16_encode(rng.standard_normal((n, k)).astype(np.float32)), bf16_encode(x.astype(np.float32))


@pytest.mark.parametrize("k", [32, 64, 96, 160, 1056])
def test_tiles_have_one_order_at_every_width(shim: Shim, k: int) -> None:
    """Rows alone and among others, panels with a remainder, against the order in plain words."""
    widths = (*range(1, 18), 31, 32, 33, 47, 48, 49, 64, 65, 80, 97, 129, 256, 257, 300)
    for n in (1, 15, 16, 37):
        w, x = operands(n, 300 if k < 1056 else 49, k)
        wide, values = bf16_decode(w), bf16_decode(x)
        expected = tile_sums(wide, values)
        size = np.abs(values.astype(np.float64)) @ np.abs(wide).astype(np.float64).T
        exact = values.astype(np.float64) @ wide.astype(np.float64).T
        assert (np.abs(expected - exact) <= bound("fp32", k) * size).all()
        for count in widths:
            if count <= len(x):
                assert shim.dot(w, x[:count], plain=False).tobytes() == expected[:count].tobytes(), count
        for r in range(0, len(x), 7):
            assert shim.dot(w, x[r : r + 1], plain=False).tobytes() == expected[r].tobytes()
            assert shim.dot(w, x[r : r + 20], plain=False).tobytes() == expected[r : r + 20].tobytes()


def test_the_vector_path_has_another_order(shim: Shim, cache: Path) -> None:
    """Else the equalities here would prove nothing about tiles."""
    w, x = operands(37, 20, 96)
    assert (shim.dot(w, x, plain=False) != Shim(cache).dot(w, x, plain=False)).any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_other_types_keep_the_vector_path(shim: Shim, cache: Path, dtype: type) -> None:
    rng = np.random.RandomState(11)
    w, x = rng.standard_normal((37, 96)).astype(dtype), rng.standard_normal((20, 96)).astype(np.float32)
    assert shim.dot(w, x, plain=False).tobytes() == Shim(cache).dot(w, x, plain=False).tobytes()


def test_subnormals_are_zero(shim: Shim) -> None:
    """Operands and results, although this thread's mode keeps them."""
    w, x = np.zeros((16, 32), np.float32), np.zeros((3, 32), np.float32)
    w[:3, 0] = 1.0, 2.0**-127, 2.0**-100  # a subnormal operand, a subnormal product
    x[:, 0] = 1.0, 2.0**-127, 2.0**-40
    found = shim.dot(bf16_encode(w), bf16_encode(x), plain=False)
    assert found[0, 0] == 1.0
    assert found[2, 0] == 2.0**-40
    assert np.count_nonzero(found) == 3, "1, 2^-40 and 2^-100; nothing of 2^-127 and 2^-140"
    assert found[0, 2] == 2.0**-100


@X86
def test_rows_are_packed_alike_without_avx512(shim: Shim, cache: Path) -> None:
    plain = Shim(cache, (*EMULATED, "-mno-avx512f"))
    for count in (1, 2, 15, 16, 31, 50):
        w, x = operands(37, count, 96)
        assert plain.dot(w, x, plain=False).tobytes() == shim.dot(w, x, plain=False).tobytes()


# ---------------------------------------------------------------------------------------------- the whole loop


@pytest.mark.parametrize("name", ["gqa", "head80"])
def test_logits_are_within_the_bound(name: str, library: CpuLibrary, cpu_library: CpuLibrary, tmp_path: Path) -> None:
    """As in test_parity.py: the oracle with bf16 activations. Heads of 80: panels that run over several heads."""
    model = load_model(name, make_case(tmp_path, name))
    tokens = prompt(name)
    request = Request(0, tuple(int(token) for token in tokens), 1)
    options: dict[str, Any] = {"max_len": 512, "pages": 96, "kv_dtype": "fp32", "debug_logits": True}
    logits = []
    for build in (library, cpu_library):
        with session(model, build, threads=2, max_num_seqs=1, **options) as backend:
            serve(backend, [request])
            logits.append(backend.logits(tokens.size))
    exact = Exact(model.weights)
    oracle = forward(model.config, exact, tokens, activations="bf16")
    limit = error_bound(model.config, exact, tokens, activations="bf16")
    assert (np.abs(logits[0] - oracle).max(axis=-1) < limit).all()
    if amx_flags():  # the other build has no tiles
        assert (logits[0] != logits[1]).any()


def requests(model: Model) -> list[Request]:
    """Of several lengths, the first of which repeats itself; the second crosses a span."""
    rng = np.random.RandomState(14)
    texts = [np.tile(rng.randint(0, model.config.vocab_size, 5), 9), *(rng.randint(0, 200, n) for n in (270, 9, 33))]
    return [
        Request(i, tuple(text.tolist()), 16, temperature=0.7 * (i % 2), seed=i, ignore_eos=True)
        for i, text in enumerate(texts)
    ]


def served(model: Model, library: CpuLibrary, batch: list[Request], **options: Any) -> tuple[Log, bytes]:
    """What a session publishes, and the bits of the logits at the prompt of the request in slot 0."""
    options = {"max_len": 320, "pages": 96, "max_num_seqs": 4, "spec": NoSpec(), **options}
    with session(model, library, debug_logits=True, **options) as backend:
        log = serve(backend, batch)
        return log, backend.logits(len(batch[0].prompt)).tobytes()


@pytest.mark.parametrize("name", ["gqa", pytest.param("head80", marks=pytest.mark.heavy)])
def test_the_same_bits_at_every_width(small: Callable[[str], Model], library: CpuLibrary, name: str) -> None:
    """Alone, in a batch, with teams, in chunks, with drafts."""
    model = small(name)
    batch = requests(model)
    alone = {request.request_id: served(model, library, [request]) for request in batch}
    tokens = {i: log.tokens[i] for i, (log, _) in alone.items()}
    for teams, chunk, spec, orchestration in (
        (1, 300, NoSpec(), "persistent"),
        (
            4,
            300,
            NoSpec(),
            "launched",
        ),  # more rows than a panel takes, packed in turn by teams that do not wait for each other
        (2, 1, NoSpec(), "persistent"),
        (3, 17, Ngram(block=4), "launched"),
        (2, 64, Ngram(block=8), "persistent"),
    ):
        options = {"threads": teams, "prefill_chunk": chunk, "max_step_rows": chunk + 64, "spec": spec}
        log, logits = served(model, library, batch, orchestration=orchestration, **options)
        assert log.tokens == tokens
        assert logits == alone[0][1]
        assert max(step["n_decode"] for step in log.steps) > 1
        assert max(step["n_prefill_rows"] for step in log.steps) >= min(chunk, 270)
        if isinstance(spec, Ngram):
            assert sum(step["n_draft_rows"] for step in log.steps) > 0


# ---------------------------------------------------------------------------------------------- the instructions


def child(
    tmp_path: Path, flags: tuple[str, ...], models: list[Path], env: dict[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], dict[str, Array]]:
    """A process of tile_child.py and what it wrote."""
    out = tmp_path / "out.npz"
    command = [sys.executable, str(CHILD), str(ROOT), " ".join(flags), str(out), *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})
    if done.returncode:
        return done, {}
    with np.load(out) as file:
        return done, dict(file)


@pytest.fixture(scope="module")
def traps(cache: Path) -> dict[str, str]:
    """The environment of a process whose tile instructions are carried out by tile_traps.cpp."""
    source = Path(__file__).with_name("tile_traps.cpp")
    return {"LD_PRELOAD": str(build_shared(source, cache, extra_flags=[*EMULATED, "-ldl"]).path)}


@X86
@pytest.mark.parametrize(
    ("compiler", "whole"),
    [
        ("", False),
        pytest.param("", True, marks=pytest.mark.heavy),
        pytest.param("clang++", True, marks=pytest.mark.heavy),
    ],
)
def test_the_compiled_instructions_are_those_of_the_emulation(
    checkpoint: Callable[[str], Path], traps: dict[str, str], tmp_path: Path, compiler: str, whole: bool
) -> None:
    """Operands, addresses, strides and shapes of tiles: a wrong one in either would change bits or stop the process."""
    if compiler and not shutil.which(compiler):
        pytest.skip(f"{compiler} is not on PATH")
    models = [checkpoint("race")] if whole else []
    env = {"CXX": compiler} if compiler else {}
    done, real = child(tmp_path, REAL, models, {**env, **(traps if amx_flags() else {})})
    assert done.returncode == 0, done.stderr
    done, emulated = child(tmp_path, EMULATED, models)
    assert done.returncode == 0, done.stderr
    for name in ("products", "tokens", "logits") if whole else ("products",):
        assert real[name].tobytes() == emulated[name].tobytes(), name
        assert np.isfinite(real[name]).all()
    if amx_flags():
        assert (real["counts"] > 0).all()
        assert real["counts"][4] >= 195, "products of tiles: 13 groups of rows, 3 panels, 5 blocks"


@X86
@pytest.mark.heavy
def test_a_library_with_tiles_refuses_where_they_do_not_work(
    checkpoint: Callable[[str], Path], traps: dict[str, str], tmp_path: Path
) -> None:
    """One line that says how to build without: where Linux does not grant them, and where products are wrong."""
    if not amx_flags():
        pytest.skip("this machine has AMX")
    models = [checkpoint("race")]
    done, _ = child(tmp_path, REAL, models)
    assert done.returncode == 1
    assert re.fullmatch(r"the operating system refuses the AMX tile registers: .*-DXL_NO_AMX'\n", done.stderr)
    done, _ = child(tmp_path, REAL, models, {**traps, "XL_TRAPS_WRONG": "1"})
    assert done.returncode == 1
    assert re.fullmatch(r"this machine's AMX products are not Intel's: .*-DXL_NO_AMX'\n", done.stderr)


@X86
@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not on PATH")
def test_a_machine_with_tiles_gets_tile_instructions(cache: Path) -> None:
    library = build_cpu_library(cache, extra_flags=["-UXL_NO_AMX", "-march=sapphirerapids", "-Werror"]).path
    text = subprocess.run(["objdump", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"\b(ldtilecfg|tilezero|tileloadd|tilestored|tdpbf16ps|tilerelease)\b", text))
    assert len(found) == 6, found


def test_the_flag_is_given_once(cache: Path) -> None:
    """A build that asks for vectors is the default build where there are no tiles."""
    if amx_flags():
        assert build_cpu_library(cache, extra_flags=["-DXL_NO_AMX"]).path == build_cpu_library(cache).path
    assert set(amx_flags()) <= {"-DXL_NO_AMX"}


def test_the_cases_are_of_bf16() -> None:
    """Other weights never meet a tile."""
    assert all("dtype" not in CASES[name] for name in ("gqa", "head80"))
