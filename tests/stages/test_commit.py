"""Commit: a request ends where its end token is, in the middle of an accepted block or not, and only once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stages.audit import Audit
from stages.sessions import Log, serial_text, serve, session

from xlpk.backends.cpu import CpuLibrary
from xlpk.model import Model, load_model
from xlpk.speculation import NoSpec, Oracle, Proposer
from xlpk.workload import Request

PROMPT, N = (3, 9, 4, 7), 40
SPECS = [NoSpec(), Oracle(block=8, mismatch_stride=0), Oracle(block=16, mismatch_stride=5)]


def spec_id(spec: Proposer) -> str:
    return f"{spec.name}-{spec.block}"


@pytest.fixture(scope="module")
def model(small: Callable[[str], Model]) -> Model:
    return small("alphabet")


@pytest.fixture(scope="module")
def text(model: Model, cpu_library: CpuLibrary) -> tuple[int, ...]:
    return serial_text(model, cpu_library, Request(0, PROMPT, N, temperature=0.9, seed=5, ignore_eos=True))


def first_seen(text: tuple[int, ...]) -> list[int]:
    """Output positions at which a token occurs for the first time: where a stop at it must happen."""
    return [i for i, token in enumerate(text) if text.index(token) == i]


def ends(model: Model, library: CpuLibrary, spec: Proposer, text: tuple[int, ...], **more: object) -> Log:
    fields = {"temperature": 0.9, "seed": 5, "oracle": text, "max_new_tokens": N, **more}
    request = Request(1, PROMPT, **fields)  # type: ignore[arg-type]
    with session(model, library, spec=spec) as backend:
        log = serve(backend, [request], each=Audit(backend))
        assert backend.free_pages() == 64
    return log


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_stop_token_is_the_last_of_the_output(
    model: Model, cpu_library: CpuLibrary, text: tuple[int, ...], spec: Proposer
) -> None:
    positions = first_seen(text)
    assert len(positions) >= 6
    assert any((p - 1) % 8 not in (0, 7) for p in positions[1:])  # inside an accepted block of 8
    for position in positions:
        log = ends(model, cpu_library, spec, text, stop_token_ids=(text[position],), ignore_eos=True)
        assert tuple(log.tokens[1]) == text[: position + 1]
        assert log.reason(1) == "stop"


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_eos_ends_a_request_unless_it_is_ignored(
    model: Model, cpu_library: CpuLibrary, text: tuple[int, ...], spec: Proposer
) -> None:
    for position in first_seen(text)[1:]:
        ending = replace(model, config=replace(model.config, eos_token_ids=(text[position], 16)))
        log = ends(ending, cpu_library, spec, text)
        cut = min(i for i, token in enumerate(text) if token in ending.config.eos_token_ids)
        assert tuple(log.tokens[1]) == text[: cut + 1]
        assert log.reason(1) == "eos"
        log = ends(ending, cpu_library, spec, text, ignore_eos=True)
        assert tuple(log.tokens[1]) == text
        assert log.reason(1) == "length"


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_length(model: Model, cpu_library: CpuLibrary, text: tuple[int, ...], spec: Proposer) -> None:
    for n in (1, 2, 3, 8, 9, 10, 17, N):
        log = ends(model, cpu_library, spec, text, max_new_tokens=n, ignore_eos=True)
        assert tuple(log.tokens[1]) == text[:n]
        assert log.reason(1) == "length"


def test_eight_stop_ids_and_the_earliest_wins(model: Model, cpu_library: CpuLibrary, text: tuple[int, ...]) -> None:
    absent = [token for token in range(17) if token not in text]
    late, early = text[first_seen(text)[4]], text[first_seen(text)[2]]
    ids = (*(absent * 8)[:6], late, early) if absent else (late,) * 7 + (early,)
    log = ends(model, cpu_library, SPECS[1], text, stop_token_ids=ids, ignore_eos=True)
    assert len(ids) == 8
    assert tuple(log.tokens[1]) == text[: first_seen(text)[2] + 1]


def test_max_new_tokens_at_the_last_position(model: Model, cpu_library: CpuLibrary, text: tuple[int, ...]) -> None:
    """prompt + output fill the last position of the last page."""
    for spec in SPECS:
        with session(model, cpu_library, spec=spec, pages=1, page_size=16, max_len=16) as backend:
            request = Request(1, PROMPT, 12, temperature=0.9, seed=5, ignore_eos=True, oracle=text[:16])
            log = serve(backend, [request], each=Audit(backend))
        assert tuple(log.tokens[1]) == text[:12]


@pytest.mark.parametrize("bad", ["one", "all"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_nan_never_wins(
    checkpoint: Callable[[str], Path], cpu_library: CpuLibrary, tmp_path: Path, bad: str, temperature: float
) -> None:
    """A NaN logit is no candidate: the others are picked from as if it were not there; if all are NaN, an error."""
    good = checkpoint("alphabet")
    tensors = load_file(good / "model.safetensors")
    request = Request(1, PROMPT, 20, temperature=temperature, seed=5, ignore_eos=True)
    plain = serial_text(load_model("good", good), cpu_library, request)
    victim = plain[3]
    rows = [victim] if bad == "one" else list(range(17))
    tensors["lm_head.weight"][rows, :] = np.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((good / "config.json").read_bytes())
    with session(load_model("bad", tmp_path), cpu_library) as backend:
        log = serve(backend, [request])
    if bad == "one":
        assert victim not in log.tokens[1]
        upto = plain.index(victim)
        assert tuple(log.tokens[1][:upto]) == plain[:upto]
        assert log.reason(1) == "length"
    else:
        assert log.tokens[1] == []
        assert log.reason(1) == "error"
