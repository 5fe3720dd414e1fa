"""The kernels against the float64 oracle and transformers, within computed bounds; planted mistakes are seen."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache as memoize
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CASES, SOME, make_case, make_checkpoint, prompt, widened
from drive import CACHE, run

from xlpk.backends.cpu import CpuLibrary
from xlpk.kv import KV
from xlpk.model import Model, load_model
from xlpk.reference import Exact, error_bound, forward, margin
from xlpk.toolchain import build_cpu_library, kernels_folder
from xlpk.workload import Request

GOLDEN = Path(__file__).parents[1] / "golden"
NEW_TOKENS = 24


class Case:
    """A checkpoint, its oracle and bounds by (pages, activations)."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.stored = load_model(name, make_case(folder / "stored", name))
        # Tests of the mathematics take the same values as fp32 matrices: there nothing but sums is rounded.
        self.model = load_model(name, widened(folder / "stored", folder / "widened"))
        self.activations = "bf16" if self.stored.weights.dtype == "bf16" else None
        self.prompt = prompt(name)
        self.exact = Exact(self.model.weights)
        self.oracle, self.limit = {}, {}
        for kinds in itertools.product((None, "bf16"), {None, self.activations}):
            options = dict(zip(("kv_dtype", "activations"), kinds, strict=True))
            self.oracle[kinds] = forward(self.model.config, self.exact, self.prompt, **options)
            self.limit[kinds] = error_bound(self.model.config, self.exact, self.prompt, **options)
        with np.load(GOLDEN / f"{name}.npz") as file:
            self.golden = dict(file)

    def logits(self, pages: str, model: Model | None = None, **options: object) -> np.ndarray:
        request = Request(0, tuple(int(token) for token in self.prompt), 1)
        kv = KV(budget="64pages", dtype="fp32" if pages == "fp32" else "bf16")
        result = run(model or self.model, [request], kv=kv, debug_logits=True, threads=2, **options)
        assert result.logits is not None
        return result.logits

    def error(self, logits: np.ndarray, pages: str | None = None, activations: str | None = None) -> float:
        """The largest distance from the oracle, in units of the bound."""
        kinds = pages, activations
        return float((np.abs(logits - self.oracle[kinds]).max(axis=-1) / self.limit[kinds]).max())


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return memoize(lambda name: Case(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=[pytest.param(name, marks=[] if name in SOME else pytest.mark.heavy) for name in CASES])
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


def test_logits_with_fp32_pages(case: Case) -> None:
    logits = case.logits("fp32")
    assert case.error(logits) < 1
    at = case.golden["positions"]
    assert np.abs(logits[at] - case.golden["logits"]).max() < 2 * case.limit[None, None].max(), "transformers"
    assert np.abs(logits - case.oracle[None, None]).max() < 2 * case.golden["torch_bf16_max"]


def test_logits_with_bf16_pages(case: Case) -> None:
    logits = case.logits("bf16")
    assert case.error(logits, "bf16") < 1
    from_exact = np.abs(logits - case.oracle[None, None])
    assert from_exact.max() < 2 * case.golden["torch_bf16_max"]
    assert np.sqrt(np.mean(from_exact**2)) < 2 * case.golden["torch_bf16_rms"]
    assert case.error(logits) > 1, "pages that were not rounded prove nothing about rounded ones"


@pytest.mark.parametrize("pages", ["fp32", "bf16"])
def test_logits_with_the_stored_matrices(case: Case, pages: str) -> None:
    """bf16 matrices are multiplied with bf16 activations: a bound of their own, and no worse than torch's bf16."""
    logits, kind = case.logits(pages, case.stored), None if pages == "fp32" else "bf16"
    assert case.error(logits, kind, case.activations) < 1
    from_exact = np.abs(logits - case.oracle[None, None])
    assert from_exact.max() < 2 * case.golden["torch_bf16_max"]
    assert np.sqrt(np.mean(from_exact**2)) < case.golden["torch_bf16_rms"]
    if case.activations and pages == "fp32":
        assert case.error(logits) > 100, "activations that were not rounded prove nothing about rounded ones"


@pytest.mark.parametrize("matrices", ["stored", "fp32"])
def test_greedy_continuation(case: Case, matrices: str) -> None:
    """Equal to transformers' wherever the oracle's margin exceeds the bound; at most a few tokens are that close."""
    request = Request(0, tuple(int(token) for token in case.prompt), NEW_TOKENS, ignore_eos=True)
    model = case.model if matrices == "fp32" else case.stored
    tokens = run(model, [request], kv=KV(budget="64pages", dtype="fp32")).tokens[0]
    expected = case.golden["continuation"]
    whole = np.concatenate([case.prompt, expected])[:-1]
    margins = margin(forward(case.model.config, case.exact, whole)[case.prompt.size - 1 :])
    activations = None if matrices == "fp32" else case.activations
    decided = margins > 2 * case.limit[None, activations].max()
    assert decided.sum() >= (1 if activations else NEW_TOKENS - 3)
    different = np.flatnonzero(np.asarray(tokens) != expected)
    assert not different.size or not decided[different[0]]  # what follows a token too close to call says nothing


def test_dynamic_rope_beyond_the_original_positions(tmp_path: Path) -> None:
    """The frequencies are those of model.max_len, from the first token on and however the prompt is chunked."""
    made = CASES["dynamic_rope"] | {"max_position_embeddings": 48}
    model = load_model("dynamic", widened(make_checkpoint(tmp_path / "stored", seed=5, **made), tmp_path / "widened"))
    tokens = np.random.RandomState(6).randint(0, model.config.vocab_size, 120)
    request = Request(0, tuple(tokens.tolist()), 1)
    kv, found = KV(budget="64pages", dtype="fp32"), []
    for chunk in (7, 64):
        result = run(model, [request], kv=kv, max_len=144, debug_logits=True, prefill_chunk=chunk)
        assert result.logits is not None
        found.append(result.logits)
    assert found[0].tobytes() == found[1].tobytes()
    config, exact = model.config.at_length(144), Exact(model.weights)
    error = np.abs(found[0] - forward(config, exact, tokens)).max(axis=-1)
    limit = error_bound(config, exact, tokens)
    assert (error < limit).all()
    for other in (model.config, model.config.at_length(120)):
        assert (np.abs(found[0] - forward(other, exact, tokens)).max(axis=-1) > limit)[1:].any()


# ---------------------------------------------------------------------------------------------- mutants


def swapped_gate_up(model: Model) -> Model:
    from xlpk.weights import Weights

    class Swapped(Weights):
        def matrix(self, name: str):  # type: ignore[no-untyped-def]
            swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
            return super().matrix(".".join(swap.get(part, part) for part in name.split(".")))

    twin = object.__new__(Swapped)
    twin.__dict__.update(model.weights.__dict__)
    return replace(model, weights=twin)


@pytest.mark.parametrize("kind", ["theta", "eps", "gate_up"])
def test_a_wrong_model_is_seen(case: Case, kind: str) -> None:
    config = case.model.config
    wrong = {
        "theta": lambda: replace(case.model, config=replace(config, rope_theta=config.rope_theta * 1.1)),
        "eps": lambda: replace(case.model, config=replace(config, rms_norm_eps=config.rms_norm_eps * 10)),
        "gate_up": lambda: swapped_gate_up(case.model),
    }[kind]()
    assert case.error(case.logits("fp32", wrong)) > (2 if kind == "eps" else 100)


KERNEL_MUTANTS = {
    "query_later": (
        "phases/qkv.h",
        "p.rope + size_t(at) *",
        "p.rope + size_t(is_q && at + 1 < n_rows ? at + 1 : at) *",
    ),
    "query_earlier": ("phases/qkv.h", "p.rope + size_t(at) *", "p.rope + size_t(is_q && at > 0 ? at - 1 : at) *"),
    "mask_too_wide": (
        "phases/attend.h",
        "row.position + 1 - begin < kAttentionSpan ? row.position + 1 - begin",
        "row.position + 2 - begin < kAttentionSpan ? row.position + 2 - begin",
    ),
    "mask_too_narrow": (
        "phases/attend.h",
        "row.position + 1 - begin < kAttentionSpan ? row.position + 1 - begin",
        "row.position - begin < kAttentionSpan && row.position > 0 ? row.position - begin",
    ),
    "position_of_keys": ("phases/qkv.h", ".at(row.position, is_v", ".at(row.position + (is_v ? 0 : 1), is_v"),
    "head_map": (
        "phases/attend.h",
        "kv_head * group + first, left}",
        "(kv_head + 1) % kv_heads * group + first, left}",
    ),
    "no_score_scale": ("phases/attend.h", "1.0f / sqrt_(float(d.head_dim))", "1.0f / float(d.head_dim)"),
}


# Each builds the kernels anew: one of them stands for the others in the quick suite.
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "head_map" else pytest.mark.heavy) for kind in KERNEL_MUTANTS]
)
def test_a_wrong_kernel_is_seen(kind: str, cases: Callable[[str], Case], tmp_path: Path) -> None:
    path, right, wrong = KERNEL_MUTANTS[kind]
    folder = tmp_path / "kernels"
    shutil.copytree(kernels_folder(), folder)
    text = (folder / path).read_text()
    assert text.count(right) == 1, "the planted line is gone: plant it anew"
    (folder / path).write_text(text.replace(right, wrong))
    library = CpuLibrary(build_cpu_library(CACHE, extra_flags=("-O1",), folder=folder))
    case = cases("gqa")
    error = case.error(np.nan_to_num(case.logits("fp32", library=library), nan=1e9))
    assert error > 100
