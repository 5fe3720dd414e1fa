"""How a record is declared: a C struct whose fields say name, type and meaning, and the numpy dtype that it is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SCALARS: dict[str, tuple[type[np.generic], str]] = {  # name -> type in numpy, in C
    "i32": (np.int32, "int32_t"),
    "u32": (np.uint32, "uint32_t"),
    "i64": (np.int64, "int64_t"),
    "u64": (np.uint64, "uint64_t"),
    "f32": (np.float32, "float"),
    "f64": (np.float64, "double"),
    "u8": (np.uint8, "uint8_t"),
    "u16": (np.uint16, "uint16_t"),
}


class Record(NamedTuple):
    """A C struct: fields are (name, type, doc); type is one of SCALARS, `scalar[n]`, or `ctype*`."""

    name: str
    doc: str
    fields: tuple[tuple[str, str, str], ...]

    @property
    def dtype(self) -> np.dtype[np.void]:
        return np.dtype([_numpy_field(name, kind) for name, kind, _ in self.fields], align=True)


def _numpy_field(name: str, kind: str) -> tuple[object, ...]:
    if kind.endswith("*"):
        return (name, np.uint64)
    if kind.endswith("]"):
        base, count = kind[:-1].split("[")
        return (name, SCALARS[base][0], (int(count),))
    return (name, SCALARS[kind][0])
