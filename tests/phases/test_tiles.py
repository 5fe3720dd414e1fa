"""Weights in tiles: where each element goes, by a definition in numpy; the same bits from either layout."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xlpk import layout
from xlpk.backends.memory import WEIGHT_TYPES
from xlpk.dtypes import OUR_DTYPE
from xlpk.toolchain import build_shared

Array = np.ndarray[Any, Any]
SHAPES = [(8, 256), (1, 32), (131, 96), (17, 544), (24, 768), (9, 288)]  # whole; less than a tile; tails of both kinds
TYPES = [np.uint16, np.float16, np.float32]  # bf16, fp16, fp32 as xlpk.dtypes holds them


def tiles_of(matrix: Array) -> Array:
    """The definition: granules of 8 rows, zeros behind the last; in each, blocks of 256 columns one after the other."""
    rows, columns = layout.WEIGHT_TILE_ROWS, layout.WEIGHT_TILE_COLUMNS
    whole = np.zeros((-(-len(matrix) // rows) * rows, matrix.shape[1]), matrix.dtype)
    whole[: len(matrix)] = matrix
    return np.concatenate(
        [
            granule[:, begin : begin + columns].ravel()
            for granule in np.split(whole, len(whole) // rows)
            for begin in range(0, matrix.shape[1], columns)
        ]
    )


def random_matrix(shape: tuple[int, int], dtype: Any) -> Array:
    """Finite values with all bits in use; uint16: bf16 bits of values around 1."""
    rng = np.random.default_rng(shape[0] * 10_007 + shape[1])
    values = rng.standard_normal(shape).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == np.uint16 else values.astype(dtype)


@pytest.fixture(scope="module")
def kernels(cache: Path) -> ctypes.CDLL:
    source = Path(__file__).with_name("tiles.cpp")
    return ctypes.CDLL(str(build_shared(source, cache, extra_flags=["-DXL_NO_AMX"]).path))


def address(array: Array, offset: int = 0) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data + offset)


def retiled(kernels: ctypes.CDLL, matrix: Array, cuts: list[int], blocks: int = 3) -> Array:
    """By xl_retile, from pieces that begin at byte 0 and at `cuts`, the last piece first."""
    out = np.zeros(-(-len(matrix) // layout.WEIGHT_TILE_ROWS) * layout.WEIGHT_TILE_ROWS * matrix.shape[1], matrix.dtype)
    row_units = matrix.shape[1] * matrix.itemsize // 16
    tile_units = layout.WEIGHT_TILE_COLUMNS * matrix.itemsize // 16
    for begin, end in reversed(list(zip([0, *cuts], [*cuts, matrix.nbytes], strict=True))):
        piece = np.frombuffer(matrix.tobytes()[begin:end], np.uint8).copy()
        for block in range(blocks):
            kernels.tiles_retile(
                address(piece),
                address(out),
                ctypes.c_int64(begin // 16),
                len(piece) // 16,
                row_units,
                tile_units,
                block,
                blocks,
            )
    return out


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_of_a_matrix_go_to_their_tiles(kernels: ctypes.CDLL, shape: tuple[int, int], dtype: Any) -> None:
    matrix = random_matrix(shape, dtype)
    units = matrix.nbytes // 16
    for cuts in ([], [16], sorted({units // 3 * 16, units // 2 * 16} - {0})):
        np.testing.assert_array_equal(retiled(kernels, matrix, cuts), tiles_of(matrix))


@pytest.mark.parametrize("shape", SHAPES)
def test_each_element_is_found_in_its_tile(kernels: ctypes.CDLL, shape: tuple[int, int]) -> None:
    matrix = (np.arange(shape[0] * shape[1]) * 40_503 % 65_521).astype(np.uint16).reshape(shape)
    tiles = tiles_of(matrix)
    for from_first in (False, True):
        for n in range(shape[0]):
            row = np.zeros(shape[1], np.uint16)
            kernels.tiles_read(address(tiles), n, shape[1], from_first, address(row))
            np.testing.assert_array_equal(row, matrix[n])


def test_offsets_beyond_32_bits(kernels: ctypes.CDLL) -> None:
    kernels.tiles_offset.restype = ctypes.c_int64
    n, tile, rest, k = 262_143, 111, 17, 28_672 + 32
    assert kernels.tiles_offset(n, tile, rest, k) == n // 8 * 8 * k + tile * 2048 + n % 8 * 256 + rest > 2**32


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_have_the_same_bits(kernels: ctypes.CDLL, shape: tuple[int, int], dtype: Any) -> None:
    count = 5
    matrix, x = random_matrix(shape, dtype), random_matrix((count, shape[1]), np.float32)
    if dtype == np.uint16:
        x = (x.view(np.uint32) >> 16).astype(np.uint16)
    kind = int(WEIGHT_TYPES[OUR_DTYPE[matrix.dtype]])
    products = []
    for tiled, weights in ((False, matrix), (True, tiles_of(matrix))):
        out = np.full((count, shape[0]), np.nan, np.float32)
        kernels.tiles_multiply(kind, tiled, address(weights), shape[0], address(x), shape[1], count, address(out))
        products.append(out.view(np.uint32))
    np.testing.assert_array_equal(products[0], products[1])
    assert np.isfinite(products[0].view(np.float32)).all()
    assert np.unique(products[0]).size > 1 or shape[0] == 1
