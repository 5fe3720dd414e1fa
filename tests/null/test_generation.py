"""generation_config.json: what was typed wins, then the model's file, then xlpk; a bad value is named with its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_case
from hydra import compose, initialize_config_module

from xlpk import config
from xlpk.errors import InputError
from xlpk.generation import FILE, GenerationConfig, SamplingValues, read_generation_config
from xlpk.kv import KV, KVPlan
from xlpk.model import load_model
from xlpk.workload import Sampling, Synthetic, check_sampling, make_requests

LLAMA = {  # as Llama 3 Instruct comes, with a length
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [7, 9],
    "max_new_tokens": 5,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.40.0",
}


def written(folder: Path, values: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def values_of(folder: Path, contents: dict[str, Any], **typed: Any) -> SamplingValues:
    filled, _ = Sampling(**typed).filled(read_generation_config(written(folder, contents)))
    check_sampling(filled, 8)
    return filled.values()


def test_without_a_file_the_values_are_neutral(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == GenerationConfig()
    filled, note = Sampling().filled(GenerationConfig())
    assert (filled, note) == (Sampling(), None)
    assert filled.values() == SamplingValues(0.0, 0, 1.0, 0.0, 1.0, 128)
    tiny = load_model("tiny").generation
    assert (tiny.values, tiny.eos_token_ids) == ({}, (0,)), "its file says greedy, as xlpk does"


def test_the_file_fills_what_was_not_typed(tmp_path: Path) -> None:
    assert values_of(tmp_path, LLAMA) == SamplingValues(temperature=0.6, top_p=0.9, max_new_tokens=5)
    typed = values_of(tmp_path, LLAMA, temperature=0.0, top_p=1.0, max_new_tokens=128)
    assert typed == SamplingValues(), "typed values win even where they are xlpk's own"
    everything = LLAMA | {"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1}
    assert values_of(tmp_path, everything) == SamplingValues(0.6, 40, 0.9, 0.05, 1.1, 5)


@pytest.mark.parametrize(
    ("contents", "temperature", "noted"),
    [
        ({"do_sample": True}, 1.0, "sampling.temperature=1.0"),
        ({"do_sample": True, "temperature": 2}, 2.0, "sampling.temperature=2.0"),
        ({"do_sample": True, "temperature": None}, 1.0, "sampling.temperature=1.0"),
        ({"do_sample": False, "temperature": 0.6}, 0.0, "temperature=0.6 of it is unused without do_sample=true"),
        ({"temperature": 0.6}, 0.0, "temperature=0.6 of it is unused without do_sample=true"),
        ({"do_sample": None}, 0.0, None),
        ({}, 0.0, None),
    ],
)
def test_a_model_is_sampled_from_only_if_it_says_so(
    tmp_path: Path, contents: dict[str, Any], temperature: float, noted: str | None
) -> None:
    filled, note = Sampling().filled(read_generation_config(written(tmp_path, contents)))
    assert filled.values().temperature == temperature
    assert noted is None if note is None else noted is not None and noted in note
    assert Sampling(temperature=0.3).filled(read_generation_config(tmp_path)) == (Sampling(temperature=0.3), None)


def test_one_note_names_what_came_from_the_file(tmp_path: Path) -> None:
    _, note = Sampling(top_p=0.5).filled(read_generation_config(written(tmp_path, LLAMA)))
    assert note == (
        "generation_config.json: sampling.temperature=0.6, sampling.max_new_tokens=5 "
        "(model.generation_config=none ignores it)"
    )


def test_requests_and_stop_tokens(tmp_path: Path) -> None:
    folder = written(make_case(tmp_path / "model", "one_head"), LLAMA)
    model = load_model("x", folder)
    assert model.config.eos_token_ids == (7, 9)
    filled, _ = Sampling().filled(model.generation)
    plan = KVPlan.make(KV(), model.config, model.weights.dtype, 64)
    (request,), _ = make_requests(Synthetic(requests=1, prompt_len=8), filled, model, plan)
    assert (request.temperature, request.top_p, request.max_new_tokens, request.top_k) == (0.6, 0.9, 5, 0)


def test_the_config_chooses() -> None:
    model = GenerationConfig({"temperature": 0.7, "top_p": 0.9})
    config.register()
    with initialize_config_module("xlpk.conf", version_base="1.3"):
        made = config.validate(compose("config", overrides=["sampling.top_p=1", "acceptance=greedy"]))
        none = config.validate(compose("config", overrides=["model.generation_config=none"]))
        with pytest.raises(InputError, match=r"^model\.generation_config=vllm: one of auto, none$"):
            config.validate(compose("config", overrides=["model.generation_config=vllm"]))
    filled = made.for_model(model)
    assert filled.sampling.values() == SamplingValues(temperature=0.7)
    assert (made.lossless, filled.lossless) == (True, False), "greedy acceptance of a model that is sampled from"
    assert [FILE in note for note in filled.notes] == [True]
    assert none.for_model(model) == none


@pytest.mark.parametrize(
    ("contents", "field"),
    [
        ({"temperature": "0.6"}, "temperature=0.6"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 1e-9, "do_sample": False}, "temperature=1e-09"),
        ('{"temperature": NaN}', "temperature=nan"),
        ('{"temperature": Infinity}', "temperature=inf"),
        ('{"temperature": 1e39}', "temperature=1e+39"),
        ({"temperature": True}, "temperature=True"),
        ({"temperature": [0.6]}, "temperature=[0.6]"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 1 << 31}, "top_k=2147483648"),
        ({"top_p": 0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0.0"),
        ({"repetition_penalty": 1e-30}, "repetition_penalty=1e-30"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": "many"}, "max_new_tokens=many"),
        ({"do_sample": 1}, "do_sample=1"),
        ({"do_sample": "yes"}, "do_sample=yes"),
        ({"eos_token_id": "</s>"}, "eos_token_id=</s>"),
        ({"eos_token_id": [1, None]}, "eos_token_id=[1, None]"),
        ({"eos_token_id": [1, 33]}, "eos_token_id=33"),
        ({"eos_token_id": -1}, "eos_token_id=-1"),
        ('{"top_k": 1, "top_k": 2}', "top_k=twice"),
    ],
)
def test_a_bad_value_is_named_with_its_file(tmp_path: Path, contents: object, field: str) -> None:
    folder = written(make_case(tmp_path / "model", "one_head"), contents)
    with pytest.raises(InputError) as refused:
        load_model("x", folder)
    assert str(refused.value).startswith(f"generation_config.json:{field}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("contents", ["[]", "7", "", "{"])
def test_a_broken_file_is_named(tmp_path: Path, contents: str) -> None:
    with pytest.raises(InputError, match=r"^generation_config\.json="):
        read_generation_config(written(tmp_path, contents))


@pytest.mark.peers
@pytest.mark.parametrize(
    "contents",
    [
        LLAMA,
        {},
        {"do_sample": True},
        {"do_sample": False, "temperature": 0.6},
        {"temperature": 0.6, "top_k": 3},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.05},
        {"repetition_penalty": 1.2, "max_new_tokens": 9, "eos_token_id": 4},
    ],
)
def test_transformers_reads_the_same(tmp_path: Path, contents: dict[str, Any]) -> None:
    """Greedy or not, and each value that its file sets; what it leaves out is ours to choose."""
    from transformers import GenerationConfig as Theirs
    from transformers.generation import GenerationMode

    theirs = Theirs.from_pretrained(str(written(tmp_path, contents)))
    ours = read_generation_config(tmp_path)
    greedy = theirs.get_generation_mode() == GenerationMode.GREEDY_SEARCH
    assert (Sampling().filled(ours)[0].values().temperature == 0) == greedy
    for name in ("top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens"):
        assert ours.values.get(name) == getattr(theirs, name), name
    if not greedy:
        assert ours.values["temperature"] == (theirs.temperature or 1.0)
    ids = theirs.eos_token_id
    assert ours.eos_token_ids == (None if ids is None else tuple(ids) if isinstance(ids, list) else (ids,))
