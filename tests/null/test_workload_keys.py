"""The keys of every workload with any values: requests that can run, or one line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fake_run import CONFIG, load_model
from fuzz.profile import cases, fixed
from fuzz.test_config_keys import VALUES
from hydra import compose, initialize_config_module
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from xlpk import config
from xlpk.errors import InputError
from xlpk.kv import KV, KVPlan
from xlpk.run import one_line
from xlpk.workload import WORKLOADS, make_requests

MODEL = load_model("stub")
PLAN = KVPlan.make(KV(budget="2000pages"), CONFIG, "bf16", 512)
SMALL = {"requests", "prompt_len", "prefix_len", "suffix_len", "limit"}  # else a case draws 10^8 tokens


@pytest.fixture(autouse=True, scope="module")
def _hydra() -> Iterator[None]:
    config.register()
    with initialize_config_module("xlpk.conf", version_base="1.3"):
        yield


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    trace, share = tmp_path / "trace.jsonl", tmp_path / "share.json"
    trace.write_text('{"timestamp": 5, "input_length": 20, "output_length": 3, "hash_ids": []}\n')
    share.write_text(
        '[{"conversations": [{"from": "human", "value": "a prompt"}, {"from": "gpt", "value": "answer"}]}]'
    )
    return {"trace": str(trace), "sharegpt": str(share)}


def test_each_workload_makes_requests_from_its_defaults(files: dict[str, str]) -> None:
    for node in WORKLOADS:
        name = config.node_name(node)
        extra = [f"workload.file={files[name]}"] if name in files else []
        settings = config.validate(compose("config", overrides=[f"workload={name}", *extra]))
        assert type(settings.workload) is node
        requests, _ = make_requests(settings.workload, settings.sampling, MODEL, PLAN)
        assert [request.request_id for request in requests] == list(range(len(requests)))
        assert [request.arrival_s for request in requests] == sorted(request.arrival_s for request in requests)


@cases(30)
def test_any_values(files: dict[str, str], cases: int) -> None:
    bases = {
        config.node_name(node): compose("config", overrides=[f"workload={config.node_name(node)}"])
        for node in WORKLOADS
    }
    for name, file in files.items():
        bases[name].workload.file = file
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(VALUES) | st.text(max_size=4)
    numbers = st.integers(-1, 30) | st.floats(-1, 30)
    pairs = st.dictionaries(st.integers(-3, 3) | scalars, st.floats(0, 1) | scalars, max_size=3)
    value = numbers | scalars | pairs | st.lists(scalars, max_size=2)

    def changes(node: type) -> Any:
        keys = [item.name for item in fields(node) if item.name != "name"]
        pair = st.sampled_from(keys).flatmap(lambda key: st.tuples(st.just(key), numbers if key in SMALL else value))
        return st.tuples(st.just(config.node_name(node)), st.lists(pair, min_size=1, max_size=3))

    @fixed(cases)
    @given(st.sampled_from(WORKLOADS).flatmap(changes))
    def check(case: tuple[str, list[tuple[str, Any]]]) -> None:
        name, changed = case
        try:
            made = bases[name].copy()
            for key, new in changed:
                OmegaConf.update(made, f"workload.{key}", new)
            settings = config.validate(made)
            requests, notes = make_requests(settings.workload, settings.sampling, MODEL, PLAN)
        except (InputError, *config.COMPOSITION_ERRORS, ValueError) as error:
            refused = error if isinstance(error, InputError) else config.explain(error)
            text = one_line(refused)
            assert text.isprintable(), ascii(text)
            assert len(text) < 1000
            return
        assert requests
        assert all("\n" not in note for note in notes)
        for request in requests:
            assert 1 <= len(request.prompt) < 512
            assert 1 <= request.max_new_tokens <= 512 - len(request.prompt)
            assert 0 <= request.arrival_s < 1e8

    check()
