"""safetensors files mapped into memory, and the index that names a checkpoint's shards; every field is checked.

A kernel that reads past a mapping dies without a message, so no byte of data is used before the whole header is right.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from xlpk.dtypes import FILE_DTYPE, NUMPY_DTYPE, Array
from xlpk.errors import InputError, shown
from xlpk.jsonfile import parse_json

FILE_BITS = {  # every dtype that safetensors defines; all but three are refused for the tensors of a model
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
HEADER_LIMIT = 100_000_000  # bytes; the official reader's own cap
MAX_RANK = 64  # of a tensor; the product of a million sizes would take hours
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Entry(NamedTuple):
    """One tensor in a header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the end of the header
    end: int


class MappedFile:
    """One mapped safetensors file whose header has been checked."""

    def __init__(self, path: Path, mapping: mmap.mmap, entries: dict[str, Entry], data: int) -> None:
        self.path = path
        self.mapping = mapping
        self.entries = entries
        self.data = data  # bytes from the start of the file to the first tensor

    @classmethod
    def open(cls, path: Path) -> MappedFile:
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


def locate(folder: Path) -> dict[str, str]:
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
