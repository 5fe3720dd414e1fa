"""Weights where they lie: safetensors files mapped into memory, or values from a counter hash.

A matrix is handed out as (base, address, shape, stride, layout) over the mapping itself, so a checkpoint is never
copied; norm vectors are small and come as float32 copies. Every header is checked before a byte of data is used,
because a kernel that reads past a mapping dies without a message.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from xlpk.errors import InputError

if TYPE_CHECKING:
    from xlpk.model import ModelConfig

Array: TypeAlias = npt.NDArray[Any]
Fill: TypeAlias = Callable[[Array, int, int, float], None]  # (values 1-D, tensor_id, seed, scale): fills in place

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}  # the dtypes a matrix may have
# How each is held: bf16 as its bits.
NUMPY_DTYPE: dict[str, type[np.generic]] = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}
OUR_DTYPE = {np.dtype(held): ours for ours, held in NUMPY_DTYPE.items()}
FILE_DTYPE = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}  # safetensors' word -> ours
FILE_BITS = {  # every dtype that safetensors defines; all but three are refused for the tensors of a model
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
HEADER_LIMIT = 100_000_000  # bytes; the official reader's own cap
MAX_RANK = 64  # of a tensor; the product of a million sizes would take hours
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HASH_SCALE = np.float32(math.sqrt(3) * 0.02)  # uniform on +-scale: standard deviation 0.02, Llama's initial one
HASH_ALIGN = 64  # bytes: a cache line
SAMPLE = 4096  # bytes of each tensor that go into the identity


# ---------------------------------------------------------------------------------------------- bf16


def bf16_encode(values: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """float -> bf16 bits, to nearest, ties to even. NaN stays NaN (quiet, sign kept); overflow gives infinity."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)  # rounding could carry a NaN into infinity or zero
    return np.where(nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def bf16_decode(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bf16 bits -> float32, exactly."""
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def decode(values: Array) -> npt.NDArray[np.float32]:
    """A stored tensor -> float32, exactly; float32 itself is not copied."""
    return bf16_decode(values) if values.dtype == np.uint16 else values.astype(np.float32, copy=False)


# ---------------------------------------------------------------------------------------------- what a caller gets


@dataclass(frozen=True)
class Matrix:
    """One matrix, row-major: y[r] = sum over k of base[r, k] * x[k]."""

    base: Array  # [rows, columns] uint16 (bf16 bits), float16 or float32; a view that keeps its mapping alive
    layout: str = "row_major"

    @property
    def address(self) -> int:
        """Of element (0, 0). In a file it is a multiple of the element's size, and of no more than that."""
        return int(self.base.ctypes.data)

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape[0], self.base.shape[1]

    @property
    def stride(self) -> int:
        """Elements from one row to the next."""
        return int(self.base.strides[0]) // int(self.base.itemsize)


class Weights:
    """The tensors of one model, by their Hugging Face names. `dtype` (bf16, fp16 or fp32) holds for every matrix.

    `Weights.open` maps a folder, `Weights.from_hash` makes values up. Arrays keep the mapping they look into alive, so
    there is nothing to close; a file that shrinks while mapped kills the process (SIGBUS), as with any mapping.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Array], identity: str) -> None:
        """`tensors`: uint16 is bf16, float16 fp16, float32 fp32; names and shapes as in `config.tensor_shapes()`."""
        self.identity = identity  # tells these weights from others, see `Weights.open` and `Weights.from_hash`
        self.tied = config.tie_word_embeddings
        self._tensors: dict[str, Array] = {}
        kinds: dict[str, str] = {}  # dtype -> the first matrix that has it
        for name, shape in config.tensor_shapes().items():
            if name not in tensors:
                raise InputError(name, "missing", f"a tensor of shape {list(shape)}")
            array = tensors[name]
            if array.shape != shape:
                raise InputError(f"{name}.shape", list(array.shape), f"expected {list(shape)}")
            if array.dtype not in OUR_DTYPE:
                raise InputError(f"{name}.dtype", array.dtype, "expected uint16 (bf16 bits), float16 or float32")
            if len(shape) == 2:
                kinds.setdefault(OUR_DTYPE[array.dtype], name)
            self._tensors[name] = array
        if len(kinds) > 1:
            (one, first), (other, second) = [(kind, kinds[kind]) for kind in ELEMENT_BYTES if kind in kinds][:2]
            raise InputError(f"{second}.dtype", other, f"expected one dtype for all matrices, and {first} is {one}")
        (self.dtype,) = kinds

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    @property
    def nbytes(self) -> int:
        """As stored; a tied embedding counts once."""
        return sum(array.nbytes for array in self._tensors.values())

    def matrix(self, name: str) -> Matrix:
        """No copy. With tied embeddings "lm_head.weight" is the embedding."""
        array = self._find(EMBEDDING if self.tied and name == HEAD else name)
        if array.ndim != 2:
            raise InputError(name, list(array.shape), "a matrix; this is a vector")
        return Matrix(array)

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """A float32 copy."""
        array = self._find(name)
        if array.ndim != 1:
            raise InputError(name, list(array.shape), "a vector; this is a matrix")
        return decode(array).copy()

    def _find(self, name: str) -> Array:
        if name not in self._tensors:
            raise InputError("tensor", shown(name), "a name from ModelConfig.tensor_shapes()")
        return self._tensors[name]

    @classmethod
    def open(cls, folder: Path, config: ModelConfig) -> Weights:
        """Maps FOLDER's model.safetensors, or the shards that its index names, and checks them against `config`.

        Tensors that the model does not use (rotary buffers, for one) are ignored. The identity covers file names,
        sizes, headers and the first 4 KiB of each tensor: another training run shows, at no cost.
        """
        files = _locate(folder)
        wanted = config.tensor_shapes()
        opened: dict[str, _File] = {}
        tensors: dict[str, Array] = {}
        names = [*wanted, HEAD] if config.tie_word_embeddings and HEAD in files else list(wanted)
        for name in names:
            file_name = files.get(name, "") if files else SINGLE
            if not file_name:
                raise InputError(f"{INDEX}:{name}", "missing", f"a shard that holds it, shape {list(wanted[name])}")
            if file_name not in opened:
                opened[file_name] = _File.open(folder / file_name)
            file = opened[file_name]
            tensors[name] = file.tensor(name, wanted.get(name, wanted[EMBEDDING]))
        if config.tie_word_embeddings and not files and HEAD in opened[SINGLE].entries:
            tensors[HEAD] = opened[SINGLE].tensor(HEAD, wanted[EMBEDDING])
        if HEAD in tensors and HEAD not in wanted and not _equal(tensors.pop(HEAD), tensors[EMBEDDING]):
            # transformers 5 unties such a checkpoint with a warning, 4 drops the head: neither is a guess to make here.
            raise InputError(
                "config.json:tie_word_embeddings",
                True,
                f"false, because the checkpoint's {HEAD} differs from its {EMBEDDING}",
            )
        digest = hashlib.sha256()
        for file_name in sorted(opened):
            opened[file_name].digest(digest)
        for name in sorted(tensors):
            digest.update(tensors[name].reshape(-1)[: SAMPLE // tensors[name].itemsize].tobytes())
        return cls(config, tensors, f"safetensors {digest.hexdigest()}")

    @classmethod
    def from_hash(cls, config: ModelConfig, seed: int, dtype: str, fill: Fill | None = None) -> Weights:
        """Weights of `hash_tensor`. `fill` may do the work faster and has to give the same bits."""
        _check_hash(seed, dtype)
        tensors: dict[str, Array] = {}
        for name, shape in config.tensor_shapes().items():
            if len(shape) == 1:
                tensors[name] = hash_tensor(name, shape, seed, dtype)
                continue
            values = _aligned(math.prod(shape), dtype)
            if fill is None:
                _hash_into(values, tensor_id(name), seed)
            else:
                fill(values, tensor_id(name), seed, float(HASH_SCALE))
            tensors[name] = values.reshape(shape)
        return cls(config, tensors, f"philox4x32-10 seed={seed} dtype={dtype}")


# ---------------------------------------------------------------------------------------------- safetensors


class Entry(NamedTuple):
    """One tensor in a header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the end of the header
    end: int


class _File:
    """One mapped safetensors file whose header has been checked."""

    def __init__(self, path: Path, mapping: mmap.mmap, entries: dict[str, Entry], data: int) -> None:
        self.path = path
        self.mapping = mapping
        self.entries = entries
        self.data = data  # bytes from the start of the file to the first tensor

    @classmethod
    def open(cls, path: Path) -> _File:
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                if size < 8:
                    raise InputError(path.name, f"{size} bytes", "a safetensors file: it is truncated")
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise InputError(path.name, "missing", f"a file in {path.parent}") from None
        except OSError as error:
            raise InputError(path.name, error.strerror, "a readable file") from None
        entries, data = check_header(mapping, path.name)
        try:  # the official reader as a second opinion; it maps the file too, and is closed again
            with safe_open(str(path), framework="numpy") as official:
                known = set(official.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(path.name, shown(str(error)), "a file that the safetensors library reads") from None
        if known != set(entries):
            raise InputError(path.name, f"{len(entries)} tensors", f"the safetensors library sees {len(known)}")
        return cls(path, mapping, entries, data)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Array:
        """A view [shape] into the mapping."""
        entry, label = self.entries.get(name), f"{self.path.name}:{name}"
        if entry is None:
            raise InputError(label, "missing", f"a tensor of shape {list(shape)}")
        if entry.dtype not in FILE_DTYPE:
            raise InputError(f"{label}.dtype", entry.dtype, f"expected one of {', '.join(FILE_DTYPE)}")
        if entry.shape != shape:
            raise InputError(f"{label}.shape", list(entry.shape), f"expected {list(shape)}")
        dtype = NUMPY_DTYPE[FILE_DTYPE[entry.dtype]]
        array = np.frombuffer(self.mapping, dtype=dtype, count=math.prod(shape), offset=self.data + entry.begin)
        if not array.flags.aligned:
            # The format aligns nothing but the header's end: after a tensor of odd length the next one lies askew, and
            # kernels load whole elements. Writers put wide dtypes first, so this copy is rare.
            array = array.copy()
        return array.reshape(shape)

    def digest(self, digest: hashlib._Hash) -> None:
        digest.update(f"{self.path.name} {len(self.mapping)}\n".encode())
        digest.update(self.mapping[: self.data])


def check_header(content: mmap.mmap | bytes, label: str) -> tuple[dict[str, Entry], int]:
    """A whole safetensors file -> (tensors by name, offset of the data), or an InputError that opens with `label`.

    Format: https://huggingface.co/docs/safetensors: header length, JSON, then data without holes or overlaps.
    """
    size = len(content)
    if size < 8:
        raise InputError(label, f"{size} bytes", "a safetensors file: it is truncated")
    (length,) = struct.unpack("<Q", content[:8])
    if length > HEADER_LIMIT:
        raise InputError(f"{label}:header length", length, f"at most {HEADER_LIMIT} bytes: is this a safetensors file?")
    if 8 + length > size:
        raise InputError(f"{label}:header length", length, f"at most {size - 8}, the rest of the file: it is truncated")
    data, held = 8 + length, size - 8 - length
    header = parse_json(content[8:data], f"{label}:header")
    if not isinstance(header, dict):
        raise InputError(f"{label}:header", shown(header), "a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{label}:__metadata__", shown(metadata), "an object of strings")
    entries = {name: _entry(raw, f"{label}:{shown(name)}", held) for name, raw in header.items()}
    position, before = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            what = "it overlaps" if entry.begin < position else "there is a hole after"
            raise InputError(
                f"{label}:{shown(name)}.data_offsets",
                [entry.begin, entry.end],
                f"expected a start at {position}: {what} {before}",
            )
        position, before = entry.end, shown(name)
    if position != held:
        raise InputError(f"{label}:size", size, f"expected {data + position} bytes, where the last tensor ends")
    return entries, data


def _entry(raw: object, label: str, held: int) -> Entry:
    if not isinstance(raw, dict):
        raise InputError(label, shown(raw), "an object with dtype, shape and data_offsets")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in raw:
            raise InputError(f"{label}.{key}", "missing", "dtype, shape and data_offsets are required")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in FILE_BITS:
        raise InputError(f"{label}.dtype", shown(dtype), f"one of {', '.join(FILE_BITS)}")
    if not _are_counts(shape) or len(shape) > MAX_RANK:
        raise InputError(f"{label}.shape", shown(shape), f"a list of at most {MAX_RANK} whole numbers of at least 0")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{label}.data_offsets", shown(offsets), "two byte offsets, the end not before the start")
    if offsets[1] > held:
        raise InputError(
            f"{label}.data_offsets",
            shown(offsets),
            f"an end of at most {held}, what the file holds: it is truncated or damaged",
        )
    bits = math.prod(shape) * FILE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        # Beyond 2^64 the number may be too large for a float, or for a repr.
        needed = "over 2^61" if bits >= 1 << 64 else shown(bits / 8 if bits % 8 else bits // 8)
        raise InputError(
            f"{label}.data_offsets",
            shown(offsets),
            f"expected {needed} bytes for {dtype} {shown(shape)}",
        )
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 63 for item in value
    )


def _locate(folder: Path) -> dict[str, str]:
    """The index's tensor -> shard; empty if the folder has one single file, which wins, as it does in transformers."""
    if (folder / SINGLE).exists():
        return {}
    if not (folder / INDEX).exists():
        raise InputError("model.path", folder, f"a folder that holds {SINGLE} or {INDEX}")
    try:
        content = (folder / INDEX).read_bytes()
    except OSError as error:
        raise InputError(INDEX, error.strerror, "a readable file") from None
    index = parse_json(content, INDEX)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{INDEX}:weight_map", shown(shards), "an object that names each tensor's shard")
    for name, shard in shards.items():
        label = f"{INDEX}:{shown(name)}"
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\:\0"):
            raise InputError(label, shown(shard), "a *.safetensors file name in the same folder, without separators")
    for shard in sorted(set(shards.values())):
        if not os.path.isfile(folder / shard):  # false for what cannot be a name; Path.is_file raises for a long one
            raise InputError(f"{INDEX}:weight_map", shown(shard), "a shard that is in the folder; this one is missing")
    return dict(shards)


def _equal(one: Array, other: Array) -> bool:
    """Same bits, compared in pieces."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    rows = max(1, (1 << 22) // one.shape[1])
    return all(np.array_equal(one[i : i + rows], other[i : i + rows]) for i in range(0, one.shape[0], rows))


def parse_json(content: bytes, label: str) -> object:
    """Strict JSON: UTF-8, each key once. A failure is an InputError about `label`."""

    def once(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{label}:{shown(key)}", "twice", "each key once")
            found[key] = value
        return found

    try:
        parsed: object = json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except InputError:
        raise
    except RecursionError:
        raise InputError(label, "deeply nested", "JSON of a sane depth") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and integers of thousands of digits
        raise InputError(label, shown(str(error)), "valid JSON in UTF-8") from None
    return parsed


def shown(value: object, limit: int = 100) -> str:
    """`value` for a message of one line, whatever a file may hold."""
    text = value if isinstance(value, str) else repr(value)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit else text[: limit - 3] + "..."


# ---------------------------------------------------------------------------------------------- hash weights


def philox4x32(counter: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Philox4x32-10: counters [4, n] and one key -> words [4, n].

    Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = (row.astype(np.uint64) for row in counter)
    k0, k1 = key
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        one, two = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)  # 32 x 32 -> 64 bits: cannot overflow
        c0, c1, c2, c3 = (two >> high) ^ c1 ^ np.uint64(k0), two & low, (one >> high) ^ c3 ^ np.uint64(k1), one & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def tensor_id(name: str) -> int:
    """The word of the counter that belongs to a tensor."""
    return zlib.crc32(name.encode())


def hash_tensor(name: str, shape: tuple[int, ...], seed: int, dtype: str) -> Array:
    """The tensor `name` of a model without a checkpoint -> [shape], held as NUMPY_DTYPE says.

    Norm vectors are 1, biases 0. Element i is a function of (seed, name, i) alone, so any part can be made anywhere:
    with counter = (low 32 bits of i/4, its high, crc32(name), 0) and key = (low, high 32 bits of the seed), the word
    Philox4x32-10[i % 4], as a signed number, times 2^-31, times HASH_SCALE, in float32; for bf16 and fp16 then rounded
    to nearest even.
    """
    _check_hash(seed, dtype)
    values = _aligned(math.prod(shape), dtype)
    if len(shape) == 1:
        one = 0.0 if name.endswith(".bias") else 1.0
        values[...] = bf16_encode(one) if dtype == "bf16" else one
    else:
        _hash_into(values, tensor_id(name), seed)
    return values.reshape(shape)


def _hash_into(values: Array, tensor: int, seed: int) -> None:
    """Fills `values` (1-D). In pieces that stay in the cache."""
    piece = 1 << 16  # elements, a multiple of 4
    key = seed & 0xFFFFFFFF, seed >> 32
    for start in range(0, values.size, piece):
        count = min(piece, values.size - start)
        index = np.arange(start // 4, (start + count + 3) // 4, dtype=np.uint64)
        counter = np.zeros((4, index.size), dtype=np.uint32)
        counter[0], counter[1], counter[2] = index & np.uint64(0xFFFFFFFF), index >> np.uint64(32), tensor
        words = np.ascontiguousarray(philox4x32(counter, key).T).reshape(-1)[:count]
        floats = words.view(np.int32).astype(np.float32) * np.float32(2.0**-31) * HASH_SCALE
        values[start : start + count] = bf16_encode(floats) if values.dtype == np.uint16 else floats


def _aligned(count: int, dtype: str) -> Array:
    """1-D, uninitialised, starting on a cache line."""
    size = count * ELEMENT_BYTES[dtype]
    raw = np.empty(size + HASH_ALIGN, dtype=np.uint8)
    start = -raw.ctypes.data % HASH_ALIGN
    return raw[start : start + size].view(NUMPY_DTYPE[dtype])


def _check_hash(seed: int, dtype: str) -> None:
    if not 0 <= seed < 1 << 64:
        raise InputError("model.seed", seed, "0 to 2^64 - 1")
    if dtype not in ELEMENT_BYTES:
        raise InputError("model.dtype", shown(dtype), f"one of {', '.join(ELEMENT_BYTES)}")
