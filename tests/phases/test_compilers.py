"""Other compilers and another processor: clang++, the ziglang wheel and aarch64 give the bits of the build in use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stages.sessions import serve, session

from xlpk.backends.cpu import CpuLibrary
from xlpk.model import Model
from xlpk.speculation import Ngram
from xlpk.toolchain import CXX_FLAGS, build_cpu_library, kernels_folder
from xlpk.workload import Request

AARCH64 = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
ARM_FLAGS = ["-march=armv8.2-a" if flag == "-march=native" else flag for flag in CXX_FLAGS]


def outputs(model: Model, library: CpuLibrary) -> tuple[dict[int, list[int]], bytes]:
    """Tokens of two requests, one greedy and one sampled, and the bits of the first one's logits."""
    rng = np.random.RandomState(5)
    prompts = [tuple(rng.randint(0, model.config.vocab_size, length).tolist()) for length in (70, 9)]
    batch = [Request(i, prompt, 12, temperature=0.7 * i, seed=i, ignore_eos=True) for i, prompt in enumerate(prompts)]
    options = {"max_len": 128, "pages": 32, "prefill_chunk": 32, "spec": Ngram()}
    with session(model, library, threads=1, max_num_seqs=2, debug_logits=True, **options) as backend:
        log = serve(backend, batch)
        return dict(log.tokens), backend.logits(70).tobytes()


def same_bits(small: Callable[[str], Model], one: CpuLibrary, other: CpuLibrary) -> None:
    for name in ("narrow", "head128_mha_fp32"):  # bf16 and fp32
        assert outputs(small(name), one) == outputs(small(name), other)


@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not on PATH")
def test_clang_gives_the_same_bits(
    small: Callable[[str], Model], cpu_library: CpuLibrary, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "clang++")
    built = build_cpu_library(cache)
    assert "clang" in built.compiler
    same_bits(small, cpu_library, CpuLibrary(built))


@pytest.mark.heavy
def test_the_wheel_gives_the_same_bits(
    small: Callable[[str], Model], cpu_library: CpuLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra `compiler` in a folder of its own, on a machine that has nothing else."""
    wheel = tmp_path / "wheel"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(wheel), "ziglang>=0.13"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("the ziglang wheel cannot be had here")
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setenv("PYTHONPATH", str(wheel))
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(tmp_path / "zig"))
    monkeypatch.syspath_prepend(str(wheel))
    built = build_cpu_library(tmp_path / "cache")
    assert "ziglang c++" in built.compiler
    same_bits(small, cpu_library, CpuLibrary(built))


@pytest.mark.heavy
@pytest.mark.skipif(AARCH64 is None, reason="aarch64-linux-gnu-g++ is not on PATH")
def test_the_library_compiles_for_aarch64(tmp_path: Path) -> None:
    kernels = kernels_folder()
    target = tmp_path / "libxlpk.so"
    command = [str(AARCH64), *ARM_FLAGS, "-Werror", f"-I{kernels}", str(kernels / "cpu.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    assert target.read_bytes()[18] == 183, "EM_AARCH64"


@pytest.mark.heavy
@pytest.mark.skipif(AARCH64 is None or QEMU is None, reason="no aarch64-linux-gnu-g++, or no qemu-aarch64")
def test_neon_sums_in_the_same_order(tmp_path: Path) -> None:
    """Dot products of the vector chunk and of the portable one, bit by bit, in an emulated processor."""
    program = tmp_path / "chunks"
    flags = [flag for flag in ARM_FLAGS if flag not in ("-shared", "-fPIC")]
    source = Path(__file__).with_name("chunks.cpp")
    command = [str(AARCH64), *flags, "-static", f"-I{kernels_folder()}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([str(QEMU), str(program)], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert (done.returncode, done.stdout) == (0, "3000 dots, 0 differ, vector registers\n"), done.stderr
