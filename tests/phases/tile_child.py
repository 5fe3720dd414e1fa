"""A process of its own for tile instructions, which a preloaded library may carry out.

    tile_child.py ROOT FLAGS OUT [MODEL]

Writes products, and a session's tokens and logits if there is a model, to OUT (npz), or prints why the library refuses
to start.
"""

from __future__ import annotations

import ctypes
import mmap
import shlex
import sys
from pathlib import Path

import numpy as np

ROOT = Path(sys.argv[1])
sys.path.insert(0, str(ROOT / "tests"))

from phases.shims import Array, Shim  # noqa: E402
from stages.sessions import serve, session  # noqa: E402

from xlpk.backends.cpu import CpuLibrary  # noqa: E402
from xlpk.dtypes import bf16_encode  # noqa: E402
from xlpk.errors import BackendError  # noqa: E402
from xlpk.model import Model, load_model  # noqa: E402
from xlpk.toolchain import build_cpu_library  # noqa: E402
from xlpk.workload import Request  # noqa: E402


def guarded(array: Array) -> Array:
    """A copy behind whose end, and in front of whose start rounded down to a page, memory cannot be read."""
    page = mmap.PAGESIZE
    pages = -(-array.nbytes // page)
    held = np.frombuffer(mmap.mmap(-1, (pages + 2) * page), np.uint8)
    for guard in (0, pages + 1):
        address = ctypes.c_void_p(held.ctypes.data + guard * page)
        assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(page), 0) == 0
    end = (pages + 1) * page
    copy: Array = held[end - array.nbytes : end].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def products(shim: Shim) -> Array:
    """Dot products of bf16: panels with a remainder, every way to take groups of rows, an odd number of blocks."""
    rng = np.random.RandomState(12)
    w, x = (guarded(bf16_encode(rng.standard_normal((n, 160)).astype(np.float32))) for n in (37, 70))
    return np.concatenate([shim.dot(w, x[:count], plain=False).ravel() for count in (1, 3, 16, 30, 48, 70)])


def outputs(model: Model, library: CpuLibrary) -> tuple[Array, Array]:
    """(tokens of two requests, logits of the first one's prompt)"""
    rng = np.random.RandomState(13)
    prompts = [tuple(rng.randint(0, model.config.vocab_size, length).tolist()) for length in (40, 7)]
    batch = [Request(i, prompt, 6, temperature=0.7 * i, seed=i, ignore_eos=True) for i, prompt in enumerate(prompts)]
    options = {"max_len": 64, "pages": 32, "prefill_chunk": 32, "threads": 2}
    with session(model, library, max_num_seqs=2, debug_logits=True, **options) as backend:
        log = serve(backend, batch)
        return np.array([log.tokens[0], log.tokens[1]]), backend.logits(40)


if __name__ == "__main__":
    flags, out = shlex.split(sys.argv[2]), sys.argv[3]
    cache = ROOT / "outputs" / "cache"
    found: dict[str, Array] = {}
    for folder in sys.argv[4:]:
        try:
            library = CpuLibrary(build_cpu_library(cache, extra_flags=flags))
            found["tokens"], found["logits"] = outputs(load_model("model", Path(folder)), library)
        except BackendError as error:
            sys.exit(str(error))
    found["products"] = products(Shim(cache, flags))
    counter = getattr(ctypes.CDLL(None), "tile_traps_count", None)
    if counter:
        counter.restype = ctypes.c_uint64
        found["counts"] = np.array([counter(kind) for kind in range(6)])
    np.savez(out, **found)
