"""Sessions of backend=hf on one thread of the CPU, in float32, and what the loop says of the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints import make_case, widened
from drive import CACHE, Result, finish, run

from xlpk.backends.hf import HfBackend
from xlpk.kv import KV, KVPlan
from xlpk.model import Model, load_model
from xlpk.settings import HfBackend as Choice
from xlpk.workload import Request

FP32 = KV(budget="256pages", dtype="fp32")
STATIC = Choice(device="cpu", threads=1, cache="static")


def gqa_in_float32(folder: Path) -> Model:
    """Matrices in float32: nothing is rounded but sums, so that tokens are equal, not alike."""
    return load_model("gqa", widened(make_case(folder / "stored", "gqa"), folder / "widened"))


def opened(model: Model, choice: Choice | None = None, kv: KV = FP32, max_len: int = 512, **options: Any) -> HfBackend:
    backend = HfBackend(choice or Choice(device="cpu", threads=1), cache=CACHE, **options)
    backend.open(model, KVPlan.make(kv, model.config, model.weights.dtype, max_len))
    return backend


def served(model: Model, requests: Sequence[Request], choice: Choice | None = None, **options: Any) -> Result:
    backend = opened(model, choice, **options)
    try:
        result = finish(backend, requests)  # type: ignore[arg-type]
        assert backend.free_pages() == 256
    finally:
        backend.close()
    return result


def ours(model: Model, requests: Sequence[Request]) -> dict[int, list[int]]:
    return run(model, requests, kv=FP32, threads=1).tokens
