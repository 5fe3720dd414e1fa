"""The oracle: equal to transformers within a computed bound, and the bound is tight enough to see planted mistakes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache as memoize
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CASES, SOME, fingerprint, make_case, prompt

from xlpk import reference
from xlpk.errors import InputError
from xlpk.model import Model, load_model
from xlpk.reference import Exact, bound, error_bound, forward, greedy, margin

GOLDEN = Path(__file__).parent.parent / "golden"


@dataclass
class Case:
    name: str
    folder: Path
    model: Model
    exact: Exact
    prompt: np.ndarray  # [40]
    golden: dict[str, np.ndarray]
    limits: dict[str, np.ndarray]  # pages' dtype -> [40] error bound of float32 activations

    def error(self, logits: np.ndarray, pages: str = "fp32") -> float:
        """Logits [40, vocab] -> the largest distance from transformers' float32 logits, in units of the bound."""
        at = self.golden["positions"]
        distance = np.abs(logits[at] - self.golden["logits"]).max(axis=-1)
        return float((distance / self.limits[pages][at]).max())


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @memoize
    def make(name: str) -> Case:
        folder = make_case(tmp_path_factory.mktemp(name), name)
        model = load_model(name, folder)
        exact = Exact(model.weights)
        with np.load(GOLDEN / f"{name}.npz") as file:
            golden = dict(file)
        limits = {pages: error_bound(model.config, exact, prompt(name), kv_dtype=pages) for pages in ("fp32", "bf16")}
        return Case(name, folder, model, exact, prompt(name), golden, limits)

    return make


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in SOME else [pytest.mark.heavy]


@pytest.fixture(params=[pytest.param(name, marks=marks(name)) for name in CASES])
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


def test_the_checkpoint_is_the_golden_one(case: Case) -> None:
    assert fingerprint(case.folder) == case.golden["checkpoint"].item(), "it has changed: run tests/golden/make.py"
    np.testing.assert_array_equal(case.prompt, case.golden["prompt"])


def test_every_golden_file_has_its_case() -> None:
    assert {file.stem for file in GOLDEN.glob("*.npz")} == set(CASES)


def test_logits_equal_transformers(case: Case) -> None:
    logits = forward(case.model.config, case.exact, case.prompt)
    assert logits.dtype == np.float64
    assert 1 < logits.std() < 10, "logits without a spread prove nothing"
    assert case.error(logits) < 1


def test_the_greedy_continuation_equals_transformers(case: Case) -> None:
    expected = case.golden["continuation"]
    whole = np.concatenate([case.prompt, expected])
    logits = forward(case.model.config, case.exact, whole[:-1])[case.prompt.size - 1 :]  # [24, vocab]
    decided = margin(logits) > 2 * case.limits["fp32"].max()
    assert decided.sum() >= expected.size - 3
    np.testing.assert_array_equal(logits.argmax(axis=-1)[decided], expected[decided])


def test_float32_arithmetic_stays_in_the_bound(case: Case) -> None:
    logits = forward(case.model.config, case.model.weights, case.prompt, dtype=np.float32)
    assert logits.dtype == np.float32
    error = np.abs(logits - forward(case.model.config, case.exact, case.prompt)).max(axis=-1)
    assert (error < case.limits["fp32"]).all()
    assert error.max() > 0


def test_bf16_pages_stay_in_their_bound_and_leave_the_other(case: Case) -> None:
    exact = forward(case.model.config, case.exact, case.prompt)
    rounded = forward(case.model.config, case.exact, case.prompt, kv_dtype="bf16")
    error = np.abs(rounded - exact).max(axis=-1)
    assert (error < case.limits["bf16"]).all()
    assert (error > case.limits["fp32"]).any(), "the float32 bound has to see that K and V were rounded"
    assert case.limits["bf16"].max() < exact.std(), "a bound as wide as the logits sees nothing"


def test_torch_in_bf16_leaves_the_bound(case: Case) -> None:
    """What torch's bf16 activations cost: an implementation with float32 activations has to be well inside it."""
    assert case.golden["torch_fp32_max"] < case.limits["fp32"].max() < case.golden["torch_bf16_max"]


# ---------------------------------------------------------------------------------------------- mutants


class SwappedGateUp(Exact):
    def __call__(self, name: str) -> np.ndarray:
        swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        return super().__call__(".".join(swap.get(part, part) for part in name.split(".")))


def mutant(case: Case, kind: str, pages: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Logits [40, vocab] of a forward pass with one mistake."""
    config, exact = case.model.config, case.exact
    if kind == "theta":
        config = replace(config, rope_theta=config.rope_theta * 1.1)
    if kind == "eps":
        config = replace(config, rms_norm_eps=config.rms_norm_eps * 10)
    if kind == "gate_up":
        exact = SwappedGateUp(exact.weights)
    if kind == "head_map":
        monkeypatch.setattr(reference, "kv_head_of", lambda c: np.arange(c.num_attention_heads) % c.num_key_value_heads)
    if kind in ("query_later", "query_earlier"):  # RoPE is relative: queries and keys shifted together change nothing
        step = config.inv_freq() * (1 if kind == "query_later" else -1)
        calls, rotate = itertools.count(), reference.rotate

        def shifted(x: np.ndarray, angles: np.ndarray, ops: reference.Arithmetic) -> np.ndarray:
            return rotate(x, angles + step * (next(calls) % 2 == 0), ops)  # queries come first

        monkeypatch.setattr(reference, "rotate", shifted)
    return forward(config, exact, case.prompt, kv_dtype=pages)


MUTANTS = [(name, kind) for name in CASES for kind in ("theta", "query_later", "query_earlier", "gate_up")]
MUTANTS += [  # with one key/value head, or one for each query head, both maps are the same
    (name, "head_map") for name, made in CASES.items() if 1 < made["num_key_value_heads"] < made["num_attention_heads"]
]


@pytest.mark.parametrize(
    ("case", "kind"), [pytest.param(*mutant, marks=marks(mutant[0])) for mutant in MUTANTS], indirect=["case"]
)
def test_a_mutant_fails_by_far(case: Case, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A theta off by a tenth is the smallest of them in 40 tokens: beside bf16 pages it is just seen."""
    assert case.error(mutant(case, kind, "fp32", monkeypatch)) > 100
    monkeypatch.undo()
    assert case.error(mutant(case, kind, "bf16", monkeypatch), "bf16") > (1 if kind == "theta" else 10)


def test_the_eps_mutant_fails(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its effect is about 9 eps over the mean square of what is normed: plain with 1e-2, small with 1e-6."""
    error = case.error(mutant(case, "eps", "fp32", monkeypatch))
    assert error > (1000 if case.model.config.rms_norm_eps == 1e-2 else 2)


# ---------------------------------------------------------------------------------------------- the rest


def test_chunks_with_a_cache_equal_the_whole(cases: Callable[[str], Case]) -> None:
    for name in ("gqa", "llama3_rope_style5"):
        case, cache = cases(name), []
        parts = np.split(case.prompt, [1, 2, 9, 30])
        chunks = np.concatenate([forward(case.model.config, case.exact, part, cache=cache) for part in parts])
        whole = forward(case.model.config, case.exact, case.prompt)
        limit = error_bound(case.model.config, case.exact, case.prompt, dtype="fp64")
        assert limit.max() < 1e-10
        assert (np.abs(chunks - whole).max(axis=-1) < 2 * limit).all()


def test_greedy(cases: Callable[[str], Case]) -> None:
    case = cases("mqa")
    tokens, margins = greedy(case.model.config, case.exact, case.prompt, 24)
    assert margins.min() > 2 * case.limits["fp32"].max()
    np.testing.assert_array_equal(tokens, case.golden["continuation"])


def test_a_later_token_changes_nothing_earlier(cases: Callable[[str], Case]) -> None:
    case = cases("gqa")
    other = case.prompt.copy()
    other[20] = (other[20] + 1) % case.model.config.vocab_size
    one, two = (forward(case.model.config, case.exact, tokens) for tokens in (case.prompt, other))
    np.testing.assert_array_equal(one[:20], two[:20])
    assert (one[20:] != two[20:]).any(axis=-1).all()


def test_bound_holds_for_a_sum_in_order() -> None:
    """float32, one term after the other, the worst order there is in practice: the measured deviation is below it."""
    rng = np.random.default_rng(1)
    for k, drift in ((64, 0.0), (2048, 0.0), (2048, 0.5), (8192, 0.0)):
        products = (rng.standard_normal((200, k)) + drift).astype(np.float32)
        exact = products.astype(np.float64).sum(axis=1)
        size = np.abs(exact) + np.sqrt((products.astype(np.float64) ** 2).sum(axis=1))
        relative = (np.cumsum(products, axis=1, dtype=np.float32)[:, -1] - exact) / size
        measured = np.sqrt(np.mean(relative**2))
        assert 0.05 * bound("fp32", k) < measured < bound("fp32", k)


@pytest.mark.parametrize("tokens", [[], [[1]], [1.5], [-1], [1031], ["a"]])
def test_bad_tokens_are_refused(cases: Callable[[str], Case], tokens: list[object]) -> None:
    with pytest.raises(InputError, match=r"^tokens=.*(whole number|0 to 1030)"):
        forward(cases("mha").model.config, cases("mha").exact, tokens)


def test_a_bad_page_dtype_is_refused(cases: Callable[[str], Case]) -> None:
    with pytest.raises(InputError, match=r"^kv_dtype=int3: one of fp32, bf16$"):
        forward(cases("mha").model.config, cases("mha").exact, [1], kv_dtype="int3")
