"""The numerics of a backend on a text: its logits under teacher forcing against a float32 reference's.

A session of its own in front of the measured one, not timed: the text's windows go through the real loop as prompts,
chunked as prompts are, with the logits of all their rows kept. Every orchestration of ours gives a row the same bits in
prefill, decode and verification, so these are the served numerics; of transformers with a cache that grows they are
those of a prompt, with one of fixed size those of the decode step.

The reference: the checkpoint's values as float32, K, V and activations in float32, by `xlpk.reference` in numpy or by
transformers on the CPU.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from xlpk import divergence
from xlpk.backend import Backend, Finished
from xlpk.errors import BackendError, InputError
from xlpk.kv import KVPlan
from xlpk.model import TINY, Model
from xlpk.reference import Exact, forward
from xlpk.settings import Quality, Settings
from xlpk.speculation import Acceptance, Keyed, NoSpec, Proposer
from xlpk.text import encode_with_ends
from xlpk.units import format_bytes
from xlpk.workload import Request

if TYPE_CHECKING:
    from xlpk.event_writer import EventLog

HELD_OUT = TINY / "heldout.txt"
MAX_FILE_BYTES = 64 << 20
KEPT_BYTES = 256 << 20  # of reference logits, for the other points of a sweep
POLL_S = 0.0005
Reference = Callable[[tuple[int, ...]], npt.NDArray[np.float32]]  # token ids [n] -> logits [n, vocab]
_KEPT: OrderedDict[tuple[object, ...], npt.NDArray[np.float32]] = OrderedDict()


@dataclass(frozen=True)
class Window:
    """A teacher-forced sequence. Row `first + i` of its logits is scored against `targets[i]`."""

    tokens: tuple[int, ...]
    first: int
    targets: tuple[int, ...]
    n_bytes: int  # of text that the targets stand for


def windows_of(ids: tuple[int, ...], ends: list[int], window: int, stride: int) -> Iterator[Window]:
    """Each token but the first is scored once, after up to `window - 1`, at least `window - stride`, tokens of context
    (fewer at the text's beginning). `ends`: bytes of text up to and with each token."""
    last = len(ids) - 1
    for begin in range(0, last, stride):
        end = min(begin + stride, last)
        low = max(0, begin + stride - window)
        targets = ids[begin + 1 : end + 1]
        yield Window(ids[low:end], begin - low, targets, ends[end] - ends[begin])


def read_windows(quality: Quality, model: Model) -> list[Window]:
    """The windows of the text that the config names. Raises InputError."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError("quality.measure", "true", f"false: model {model.name} has no tokenizer.json")
    path = HELD_OUT if quality.file is None else Path(quality.file)
    ids, ends = encode_with_ends(tokenizer, _read(path))
    if max(ids, default=0) >= model.config.vocab_size:
        allowed = f"tokens below vocab_size={model.config.vocab_size}: another model's tokenizer?"
        raise InputError("tokenizer.json", f"token {max(ids)}", allowed)
    count = len(ids) if quality.tokens is None else quality.tokens + 1
    if len(ids) < 2:
        raise InputError("quality.file", path, f"a text of at least 2 tokens; it has {len(ids)}")
    stride = quality.stride or max(1, quality.window // 2)
    return list(windows_of(ids[:count], ends[:count], quality.window, stride))


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError("quality.file", path, f"a file of at most {format_bytes(MAX_FILE_BYTES)}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError("quality.file", path, f"a readable text file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError("quality.file", path, "a text file in UTF-8") from None


def session_plan(quality: Quality, model: Model, plan: KVPlan) -> KVPlan:
    """The plan of the session: as many positions as a window takes, since logits are kept by position."""
    most = min(plan.max_len, plan.pages * plan.page_size) - 1
    if quality.window > most:
        allowed = f"at most {most}: what model.max_len={plan.max_len} and {plan.pages} KV pages leave"
        raise InputError("quality.window", quality.window, allowed)
    if model.config.stretches:  # its rotation depends on the plan's length
        return plan
    return replace(plan, max_len=quality.window + 1)


def measure(
    settings: Settings,
    model: Model,
    plan: KVPlan,
    make: Callable[[Settings, Proposer, Acceptance], Backend],
    log: EventLog,
) -> None:
    """Scores the text and logs an event a window. InputError, ToolError or BackendError as a session raises them."""
    quality, begin_s = settings.quality, time.monotonic()
    windows = read_windows(quality, model)
    short = session_plan(quality, model, plan)
    reference = make_reference(quality, model, plan, Path(settings.run.outputs).resolve() / "cache")
    alone = replace(settings.scheduler, max_num_seqs=1)
    backend = make(replace(settings, keep_logits=True, scheduler=alone), NoSpec(), Keyed())
    if hasattr(backend, "folder"):
        backend.folder = log.folder
    try:
        backend.open(model, short)
        for number, window in enumerate(windows):
            rows = slice(window.first, window.first + len(window.targets))
            logits = teacher_forced(backend, number, window.tokens)[rows]
            if not np.isfinite(logits).all():
                raise BackendError(f"logits of the text are not finite (window {number}): are the model's weights?")
            figures = divergence.compare(logits, reference(window.tokens)[rows], window.targets)
            log.add("quality", window=number, tokens=len(window.targets), bytes=window.n_bytes, **figures)
            log.tick()
    finally:
        backend.close()
    log.add(
        "note",
        kind="quality",
        text="distributions against float32, in a session of their own",
        reference=quality.reference,
        file=str(quality.file or HELD_OUT.name),
        seconds=round(time.monotonic() - begin_s, 6),
    )


def teacher_forced(backend: Any, request_id: int, tokens: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Logits [n, vocab] after each of `tokens`, of an open backend that keeps them."""
    request = Request(request_id, tokens, 1, ignore_eos=True, share_prefix=False)
    while not backend.submit(request):
        time.sleep(POLL_S)
    while True:
        events = backend.poll()
        if any(isinstance(event, Finished) for event in events):
            return np.asarray(backend.logits(len(tokens)), np.float32)
        if not events:
            time.sleep(POLL_S)


# ---------------------------------------------------------------------------------------------- the reference


def make_reference(quality: Quality, model: Model, plan: KVPlan, cache: Path) -> Reference:
    """Who computes in float32; what it says is kept for other points of a sweep in this process."""
    _check_memory(model)
    config = model.config.at_length(plan.max_len)
    if quality.reference == "transformers":
        from xlpk.backends.hf_model import Float32

        run: Reference = Float32(model, cache / "inductor")
    else:
        exact = Exact(model.weights, np.float32)

        def run(tokens: tuple[int, ...]) -> npt.NDArray[np.float32]:
            return np.asarray(forward(config, exact, tokens, dtype=np.float32), np.float32)

    def kept(tokens: tuple[int, ...]) -> npt.NDArray[np.float32]:
        key = (quality.reference, model.fingerprint, config.rope_theta, tokens)
        if key not in _KEPT:
            _KEPT[key] = run(tokens)
            while sum(table.nbytes for table in _KEPT.values()) > KEPT_BYTES and len(_KEPT) > 1:
                _KEPT.popitem(last=False)
        return _KEPT[key]

    return kept


def _check_memory(model: Model) -> None:
    """The reference holds every weight as float32."""
    needed = 4 * model.config.parameters
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), needed)
    if needed > free:
        allowed = (
            f"false: a float32 reference of {model.name} takes {format_bytes(needed)}; {format_bytes(free)} are free"
        )
        raise InputError("quality.measure", "true", allowed)
