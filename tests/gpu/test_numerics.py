"""The device's logits of a trained model against the float64 oracle, by its bound, and by divergence and loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from drive import run

from xlpk.model import Model, load_model
from xlpk.reference import Exact, error_bound, forward, margin
from xlpk.workload import Request

pytestmark = pytest.mark.heavy

TEXT = (
    "def read_file(path):\n    with open(path) as file:\n        return file.read()\n\n\nclass Stack:\n    def __init__"
)


@dataclass
class Answers:
    """The oracle's, with all its precision and with what the model stores in bf16."""

    model: Model
    prompt: tuple[int, ...]
    exact: np.ndarray
    stored: np.ndarray
    limit: np.ndarray


@pytest.fixture(scope="module")
def answers() -> Answers:
    model = load_model("tiny")
    assert model.tokenizer is not None
    prompt = tuple(model.tokenizer.encode(TEXT).ids)
    weights, kinds = Exact(model.weights), {"kv_dtype": "bf16", "activations": "bf16"}
    stored = forward(model.config, weights, prompt, **kinds)
    limit = error_bound(model.config, weights, prompt, **kinds)
    return Answers(model, prompt, forward(model.config, weights, prompt), stored, limit)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1)[:, None]


def divergence(logits: np.ndarray, exact: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence from the exact distribution, nats."""
    true = log_softmax(exact)
    return float((np.exp(true) * (true - log_softmax(logits))).sum(axis=1).mean())


def loss(logits: np.ndarray, prompt: tuple[int, ...]) -> float:
    """Mean negative log-likelihood of the text, nats a token."""
    return float(-log_softmax(logits)[np.arange(len(prompt) - 1), prompt[1:]].mean())


def test_logits_are_within_the_bound(answers: Answers, kind: str) -> None:
    logits = run(answers.model, [Request(0, answers.prompt, 1)], debug_logits=True).logits
    assert logits is not None
    assert (np.abs(logits - answers.stored).max(axis=1) / answers.limit).max() < 1
    assert divergence(logits, answers.exact) < 1.1 * max(divergence(answers.stored, answers.exact), 1e-6)
    assert loss(logits, answers.prompt) < loss(answers.exact, answers.prompt) + 1e-3


def test_tokens_are_the_oracles_where_its_margin_decides(answers: Answers, kind: str) -> None:
    tokens = run(answers.model, [Request(0, answers.prompt, 24, ignore_eos=True)]).tokens[0]
    whole = (*answers.prompt, *tokens)
    logits = forward(answers.model.config, Exact(answers.model.weights), whole[:-1])[len(answers.prompt) - 1 :]
    decided = margin(logits) > 2 * answers.limit.max()
    assert decided.sum() >= 6
    assert (logits.argmax(axis=1) == tokens)[decided].all()
