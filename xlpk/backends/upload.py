"""Weights from the checkpoint's mapping to the device: two page-locked buffers, one filled while the other is copied.

The host's memory does not depend on the model: pages of the mapping are the file cache's. Norms and biases arrive as
float32, as the kernels read them. With `weight_layout=tiles` matrices go through one buffer of the device, from which a
kernel moves each piece to its tiles (kernels/retile.h).
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backends.gpu_device import Device
from xlpk.backends.library import usable_cores
from xlpk.kv import KVPlan
from xlpk.model import Model

STAGING_BYTES = 32 << 20  # of one buffer
FILLERS = 8  # threads that fill a buffer; one alone copies slower than the link does
_PART_BYTES = 1 << 20  # the least that is worth a thread
_ALIGNMENT = 256
_UNIT_BYTES = 16  # WeightUnit: what xl_retile moves at once
_BLOCKS = 8  # of xl_retile, a multiprocessor

Progress = Callable[[int, int], None]  # (bytes copied, bytes in all)
_MATRICES = (
    *((name, "self_attn") for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *((name, "mlp") for name in ("gate_proj", "up_proj", "down_proj")),
)


@dataclass(frozen=True)
class DeviceWeights:
    """Where the weights lie: the fields of Params that point to them, and what their way took."""

    addresses: dict[str, int]
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class _Piece:
    """Contiguous host memory, and what keeps it alive. `row_bytes`: of a matrix for tiles; 0: copied as it is."""

    address: int
    nbytes: int
    keeps: Any
    row_bytes: int = 0
    element_bytes: int = 0

    @property
    def device_bytes(self) -> int:
        """In tiles with rows of zeros behind the last one."""
        granule = layout.WEIGHT_TILE_ROWS * self.row_bytes or 1
        return -(-self.nbytes // granule) * granule


def _array(values: np.ndarray[Any, Any]) -> _Piece:
    values = np.ascontiguousarray(values)
    return _Piece(values.ctypes.data, values.nbytes, values)


def _pieces(model: Model, plan: KVPlan, tiled: bool) -> Iterator[tuple[str, _Piece]]:
    """(name, memory) of everything but the table of layers; names of a layer are `index.field`."""
    weights, config = model.weights, model.config

    def matrix(name: str) -> _Piece:
        found = weights.matrix(name)
        size = int(found.base.itemsize)
        return _Piece(found.address, found.base.nbytes, found, found.shape[1] * size if tiled else 0, size)

    yield "embed_tokens", matrix("model.embed_tokens.weight")
    if not config.tie_word_embeddings:
        yield "lm_head", matrix("lm_head.weight")
    yield "norm", _array(weights.vector("model.norm.weight"))
    yield "inv_freq", _array(np.asarray(config.at_length(plan.max_len).inv_freq(), np.float64))
    yield "eos_ids", _array(np.asarray(config.eos_token_ids or (-1,), np.int32))
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        for field in ("input_layernorm", "post_attention_layernorm"):
            yield f"{index}.{field}", _array(weights.vector(f"{prefix}{field}.weight"))
        for field, block in _MATRICES:
            yield f"{index}.{field}", matrix(f"{prefix}{block}.{field}.weight")
            bias = f"{prefix}{block}.{field}.bias"
            if bias in weights.names:
                yield f"{index}.{field.replace('_proj', '_bias')}", _array(weights.vector(bias))


def upload(
    device: Device, model: Model, plan: KVPlan, progress: Progress | None = None, retile: Any = None
) -> DeviceWeights:
    """Copies all weights; one allocation. `retile`: the kernel xl_retile if matrices are to lie in tiles.

    InputError if they do not fit, with one more STAGING_BYTES for the way to tiles.
    """
    begin_s = time.perf_counter()
    pieces = list(_pieces(model, plan, retile is not None))
    layers = np.zeros(model.config.num_hidden_layers, layout.LAYER_WEIGHTS.dtype)
    offsets, size = {}, 0
    for name, nbytes in (*((name, piece.device_bytes) for name, piece in pieces), ("layers", layers.nbytes)):
        offsets[name] = size
        size += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    base = device.allocate(size, "model")
    addresses = {}
    for name, offset in offsets.items():
        index, _, field = name.rpartition(".")
        if index:
            layers[field][int(index)] = base + offset
        else:
            addresses[name] = base + offset
    addresses.setdefault("lm_head", addresses["embed_tokens"])
    pieces.append(("layers", _array(layers)))
    with device.errors("the weights could not be copied"):
        _copy(device, [(base + offsets[name], piece) for name, piece in pieces], progress, retile)
    nbytes = sum(piece.nbytes for _, piece in pieces)
    return DeviceWeights(addresses, nbytes, time.perf_counter() - begin_s)


def _copy(device: Device, pieces: list[tuple[int, _Piece]], progress: Progress | None, retile: Any) -> None:
    """Chunk by chunk through two buffers; a chunk never mixes pieces."""
    cuda, total, done = device.cuda, sum(piece.nbytes for _, piece in pieces), 0
    size = min(STAGING_BYTES, max(piece.nbytes for _, piece in pieces)) // _UNIT_BYTES * _UNIT_BYTES
    staging = device.allocate(size, "model: the buffer for its tiles") if retile is not None else 0
    buffers = [device.locked(size) for _ in range(2)]
    pool = ThreadPoolExecutor(min(FILLERS, usable_cores()))
    copied = [cuda.Event(cuda.event_flags.DISABLE_TIMING) for _ in range(2)]
    turn = 0
    try:
        for target, piece in pieces:
            for begin in range(0, piece.nbytes, size):
                count = min(size, piece.nbytes - begin)
                buffer, event = buffers[turn % 2], copied[turn % 2]
                if turn >= 2:
                    event.synchronize()
                _fill(pool, buffer.ctypes.data, piece.address + begin, count)
                if piece.row_bytes:
                    cuda.memcpy_htod_async(staging, buffer[:count], device.stream)
                    event.record(device.stream)
                    _to_tiles(device, retile, staging, target, piece, begin, count)
                else:
                    cuda.memcpy_htod_async(target + begin, buffer[:count], device.stream)
                    event.record(device.stream)
                turn += 1
                done += count
                if progress is not None:
                    progress(done, total)
        device.stream.synchronize()
    except BaseException:
        with contextlib.suppress(cuda.Error):
            device.stream.synchronize()  # nothing copies from the buffers any more; `close` frees them
        raise
    finally:
        pool.shutdown()
    for buffer in buffers:
        device.release(buffer)
    if staging:
        device.free(staging)


def _to_tiles(device: Device, retile: Any, staging: int, target: int, piece: _Piece, begin: int, count: int) -> None:
    """Bytes begin .. begin + count of a matrix, which lie in `staging`, to its tiles at `target`; on the stream.

    Counted nowhere, as the upload's copies are not: counters are of what a session does for its requests.
    """
    units = count // _UNIT_BYTES
    columns = layout.WEIGHT_TILE_COLUMNS * piece.element_bytes // _UNIT_BYTES
    places = staging, target, begin // _UNIT_BYTES, units, piece.row_bytes // _UNIT_BYTES, columns
    blocks = min(_BLOCKS * device.multiprocessors, -(-units // layout.GPU_THREADS))
    retile._launch_kernel((blocks, 1), (layout.GPU_THREADS, 1, 1), struct.pack("=QQqiii", *places), 0, device.stream)


def _fill(pool: ThreadPoolExecutor, to: int, source: int, count: int) -> None:
    """Copies host memory, in parts by the pool's threads; ctypes lets go of the interpreter meanwhile."""
    part = max(_PART_BYTES, -(-count // FILLERS))
    if count <= part:
        ctypes.memmove(to, source, count)
        return
    list(pool.map(lambda at: ctypes.memmove(to + at, source + at, min(part, count - at)), range(0, count, part)))
