"""Weights where they lie: safetensors files mapped into memory, or values from a counter hash.

A matrix is handed out as (base, address, shape, stride, layout) over the mapping itself, so a checkpoint is never
copied; norm vectors are small and come as float32 copies.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from xlpk.dtypes import ELEMENT_BYTES, OUR_DTYPE, Array, decode, first_nonfinite
from xlpk.errors import InputError, shown
from xlpk.hash_weights import HASH_SCALE, Fill, aligned, check_hash, hash_into, hash_tensor, tensor_id
from xlpk.safetensors_file import INDEX, SINGLE, MappedFile, locate

if TYPE_CHECKING:
    from xlpk.model import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SAMPLE = 4096  # bytes of each tensor that go into the identity


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

    def check_finite(self) -> None:
        """Reads every tensor once. Raises InputError naming the first element that is NaN or infinite."""
        for name, array in self._tensors.items():
            index = first_nonfinite(array)
            if index is not None:
                place = ", ".join(map(str, np.unravel_index(index, array.shape)))
                value = float(decode(array.reshape(-1)[index : index + 1])[0])
                raise InputError(f"{name}[{place}]", value, "a finite number: these weights are damaged")

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
        files = locate(folder)
        wanted = config.tensor_shapes()
        opened: dict[str, MappedFile] = {}
        tensors: dict[str, Array] = {}
        names = [*wanted, HEAD] if config.tie_word_embeddings and HEAD in files else list(wanted)
        for name in names:
            file_name = files.get(name, "") if files else SINGLE
            if not file_name:
                raise InputError(f"{INDEX}:{name}", "missing", f"a shard that holds it, shape {list(wanted[name])}")
            if file_name not in opened:
                opened[file_name] = MappedFile.open(folder / file_name)
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
        check_hash(seed, dtype)
        tensors: dict[str, Array] = {}
        for name, shape in config.tensor_shapes().items():
            if len(shape) == 1:
                tensors[name] = hash_tensor(name, shape, seed, dtype)
                continue
            values = aligned(math.prod(shape), dtype)
            if fill is None:
                hash_into(values, tensor_id(name), seed)
            else:
                fill(values, tensor_id(name), seed, float(HASH_SCALE))
            tensors[name] = values.reshape(shape)
        return cls(config, tensors, f"philox4x32-10 seed={seed} dtype={dtype}")


def _equal(one: Array, other: Array) -> bool:
    """Same bits, compared in pieces."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    rows = max(1, (1 << 22) // one.shape[1])
    return all(np.array_equal(one[i : i + rows], other[i : i + rows]) for i in range(0, one.shape[0], rows))
