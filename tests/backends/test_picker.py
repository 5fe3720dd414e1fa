"""The sampler in numpy, fed with the loop's own logits, picks the loop's own tokens: with every option."""

from __future__ import annotations

import pytest
from backends.test_sampling import OPTIONS, make_requests
from checkpoints import make_case
from drive import run

from xlpk.model import Model, load_model
from xlpk.sampling import Picker
from xlpk.workload import Request


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model("gqa", make_case(tmp_path_factory.mktemp("gqa"), "gqa"))


@pytest.mark.parametrize("name", ["temperature", *OPTIONS])
def test_tokens_of_the_loop(model: Model, name: str) -> None:
    (request,) = make_requests(OPTIONS.get(name, {"temperature": 0.8}), 1)
    tokens = run(model, [request], threads=1).tokens[0]
    whole = (*request.prompt, *tokens)
    logits = run(model, [Request(0, whole, 1)], debug_logits=True, threads=1).logits
    assert logits is not None
    picker, picked = Picker(request, model.config.vocab_size), []
    for position in range(len(request.prompt), len(whole)):
        picked.append(picker.pick(logits[position - 1], position))
        picker.commit(whole[position])
    assert picked == tokens
