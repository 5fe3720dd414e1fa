"""Many rows of bf16 on the CPU: activations in the lanes, by groups and stretches, with the bits of a row alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from phases.shims import Array, Shim

from xlpk.dtypes import bf16_encode
from xlpk.toolchain import CXX_FLAGS, kernels_folder

COUNTS = (12, 13, 16, 17, 21, 32, 33, 48, 64, 100, 128, 131)  # on both sides of 16 rows, of groups of 32, of 128
WIDTHS = (64, 96, 192, 1056, 2048, 2112, 4096, 4128)  # whole, with half a step, of one stretch and of more


@pytest.fixture(scope="module")
def shim(cache: Path) -> Shim:
    shim = Shim(cache)
    if not shim.takes_many(64, 64):
        pytest.skip("the processor has no AVX-512 BF16")
    return shim


def matrices(n: int, count: int, k: int, seed: int = 5) -> tuple[Array, Array]:
    rng = np.random.RandomState(seed)
    x = rng.standard_normal((count, k)) * 10.0 ** rng.randint(-3, 4, (count, k))
    return bf16_encode(rng.standard_normal((n, k)).astype(np.float32)), bf16_encode(x.astype(np.float32))


@pytest.mark.parametrize("k", WIDTHS)
def test_bits_of_a_row_alone(shim: Shim, k: int) -> None:
    w, x = matrices(19, max(COUNTS), k)  # a panel and a part of one
    plain = shim.dot(w, x, plain=True)
    assert sum(shim.takes_many(count, k) for count in COUNTS) >= 9
    for count in COUNTS:
        assert shim.dot(w, x[:count], plain=False).tobytes() == plain[:count].tobytes(), count
        last = x[-count:]  # other rows in the same lanes
        assert shim.dot(w, last, plain=False).tobytes() == plain[-count:].tobytes(), count


@pytest.mark.parametrize("k", [96, 192, 4128])
def test_a_row_keeps_to_itself(shim: Shim, k: int) -> None:
    """NaN in one weight row and one activation row, which lie beside all others, show there alone."""
    w, x = matrices(32, 40, k)
    plain = shim.dot(w, x, plain=False)
    w[7], x[11] = 0x7FC0, 0x7F80  # NaN, infinity
    found = shim.dot(w, x, plain=False)
    touched = np.zeros(found.shape, bool)
    touched[:, 7] = touched[11] = True
    assert not np.isfinite(found[touched]).any()
    assert found[~touched].tobytes() == plain[~touched].tobytes()


def test_an_underflow_leaves_no_sign(shim: Shim) -> None:
    """96 elements: the last products of half of the lanes are zeros, which make +0 of -0."""
    w, x = np.full((2, 96), -(2.0**-100), np.float32), np.full((40, 96), 2.0**-100, np.float32)
    found = shim.dot(bf16_encode(w), bf16_encode(x), plain=False)
    alone = shim.dot(bf16_encode(w), bf16_encode(x[:1]), plain=False)
    assert (found.view(np.uint32) == alone.view(np.uint32)).all()
    assert alone.view(np.uint32).max() == 0
    assert shim.dot(bf16_encode(w[:, :64]), bf16_encode(x[:, :64]), plain=False).view(np.uint32).min() == 1 << 31


@pytest.mark.heavy
def test_no_byte_beyond(shim: Shim, tmp_path: Path) -> None:
    flags = [flag for flag in CXX_FLAGS if flag not in ("-shared", "-fPIC", "-O3")]
    flags += ["-O1", "-g", "-DXL_NO_AMX", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program, source = tmp_path / "bounds", Path(__file__).with_name("lanes_bounds.cpp")
    command = ["g++", *flags, f"-I{kernels_folder()}", str(source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([str(program)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


@pytest.mark.parametrize("k", [96, 192])
def test_sums_around_the_smallest_numbers(shim: Shim, k: int) -> None:
    """Subnormal sums are flushed in the same places."""
    rng = np.random.RandomState(6)
    w = bf16_encode((rng.standard_normal((64, k)) * 2.0**-63).astype(np.float32))
    x = bf16_encode((rng.standard_normal((64, k)) * 2.0**-64).astype(np.float32))
    plain = shim.dot(w, x, plain=True)
    assert ((np.abs(plain) < 2.0**-120) & (plain != 0)).any()
    for r in range(0, 64, 9):
        assert shim.dot(w, x[r : r + 1], plain=False).tobytes() == shim.dot(w, x, plain=False)[r].tobytes()
