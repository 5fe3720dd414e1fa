"""Quantities as users type them and as tables show them: sizes in bytes, percentiles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xlpk.errors import InputError, shown

_SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([KMG]i?B|B)\s*")


def parse_bytes(text: str, field: str, otherwise: str = "") -> int:
    """`64MiB` -> 67108864. Raises InputError naming `field`; `otherwise` adds to what it says is allowed."""
    match = _SIZE.fullmatch(text)
    if not match or float(match[1]) <= 0:
        raise InputError(field, shown(text), f"a positive size such as 64MiB or 1.5GiB{otherwise}")
    return int(float(match[1]) * _SIZES[match[2]])


def format_bytes(count: float) -> str:
    """67108864 -> `64.0 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def free_memory() -> int:
    """Bytes that this machine can give to a process without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise InputError("kv.budget", "a share of the memory", "a size: /proc/meminfo has no MemAvailable")


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100), linear between neighbours, as numpy's default."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), q))
