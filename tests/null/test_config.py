"""Every documented command composes; what cannot run is refused by name, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from xlpk import config
from xlpk.errors import InputError
from xlpk.settings import LaunchedBackend, PersistentBackend, Settings
from xlpk.speculation import Forced, Greedy, Keyed, Ngram, NoSpec, Oracle
from xlpk.workload import Prompts, Synthetic, biases


@pytest.fixture(autouse=True, scope="module")
def _hydra() -> Iterator[None]:
    config.register()
    with initialize_config_module("xlpk.conf", version_base="1.3"):
        yield


def composed(*overrides: str) -> Settings:
    try:
        return config.validate(compose("config", overrides=list(overrides)))
    except InputError:
        raise
    except (*config.COMPOSITION_ERRORS, ValueError) as error:
        raise config.explain(error, overrides) from None


def test_without_arguments() -> None:
    settings = composed()
    assert (settings.mode, settings.spec, settings.acceptance) == ("speculative_decode", Ngram(), Keyed())
    assert settings.backend.name == "cpu"
    assert settings.lossless
    assert isinstance(settings.workload, Prompts)
    assert len(settings.workload.texts()) == 4


@pytest.mark.parametrize(
    ("overrides", "mode", "spec"),
    [
        (["mode=serial_decode"], "serial_decode", NoSpec()),
        (["mode=speculative_decode", "spec.block=8"], "speculative_decode", Ngram(block=8)),
        (["spec=oracle", "spec.mismatch_stride=0"], "speculative_decode", Oracle(mismatch_stride=0)),
        (["mode=forced_rejection", "spec.block=8"], "forced_rejection", Oracle(block=8)),
        (["mode=forced_rejection", "spec.mismatch_stride=3"], "forced_rejection", Oracle(block=8, mismatch_stride=3)),
        (["experiment=quickstart", "mode=serial_decode"], "serial_decode", NoSpec()),
        (["experiment=forced_rejection_grid", "mode=speculative_decode"], "speculative_decode", Ngram()),
    ],
)
def test_modes(overrides: list[str], mode: str, spec: object) -> None:
    settings = composed(*overrides)
    assert (settings.mode, settings.spec) == (mode, spec)
    assert settings.notes == ()


def test_serial_decode_answers_a_block_by_one_line() -> None:
    settings = composed("mode=serial_decode", "spec.block=8")
    assert settings.spec == NoSpec(block=1)
    assert settings.requested_block == 8
    assert settings.resolved["spec"]["block"] == 8
    assert len(settings.notes) == 1
    assert "effective block of 1" in settings.notes[0]


def test_groups_and_keys() -> None:
    assert composed("acceptance=forced", "acceptance.stride=3").acceptance == Forced(stride=3)
    assert composed("acceptance=greedy").acceptance == Greedy()
    assert not composed("acceptance=greedy", "sampling.temperature=0.8").lossless
    assert composed("backend.orchestration=launched", "backend.threads=3").backend.threads == 3
    assert composed("backend=persistent", "backend.lease_ms=0").backend == PersistentBackend(lease_ms=0.0)
    assert composed("backend=launched_phase", "backend.device=1").backend == LaunchedBackend(device=1, sync="phase")
    assert composed("backend=graph").backend.orchestration == composed("backend=graph").backend.name == "graph"
    assert composed("kv.budget=16pages", "kv.page_size=32").kv.page_size == 32
    assert composed("tracking=none").tracking.name == "none"
    assert composed("workload=synthetic", "model=llama_1b_shape").workload == Synthetic()
    assert composed("model=hf", "model.path=somewhere").model.path == "somewhere"
    assert composed('workload.prompt="def f(n):"').workload.texts() == ["def f(n):"]  # type: ignore[union-attr]
    assert composed("workload.prompt=[a,b]", "workload.requests=3").workload.texts() == ["a", "b", "a"]  # type: ignore[union-attr]
    assert composed("spec.block=16").spec.block == 16
    sampling = composed("sampling.logit_bias={5: 3.0, 2: -1}", "sampling.stop=[a,b]", "sampling.target=x").sampling
    assert biases(sampling) == ((2, -1.0), (5, 3.0))
    assert (sampling.stop, sampling.target, sampling.logprobs) == (["a", "b"], "x", None)


@pytest.mark.parametrize("name", config.options("experiment"))
def test_each_experiment_composes(name: str) -> None:
    composed(f"experiment={name}")


@pytest.mark.heavy
@pytest.mark.parametrize("name", config.options("experiment"))
def test_each_value_that_an_experiment_sweeps_composes(name: str) -> None:
    cfg = compose("config", overrides=[f"experiment={name}"], return_hydra_config=True)
    params = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
    for key, values in params.items():
        override = OverridesParser.create().parse_override(f"{key}={values}")
        for value in override.sweep_string_iterator():
            composed(f"experiment={name}", f"{key}={value}")


OF_OPTION = {"launched_phase": "launched", "hf_static": "hf", "hf_compiled": "hf"}  # variants of one node


@pytest.mark.parametrize("group", config.groups())
def test_each_option_composes_and_says_what_it_is(group: str) -> None:
    folder = Path(str(resources.files(config.PACKAGE))) / group
    for option in config.options(group):
        assert (folder / f"{option}.yaml").read_text().startswith("# "), f"{group}/{option}.yaml needs a comment"
        if group == "experiment":
            continue  # composed above
        file = f"workload.file={folder / option}.yaml"  # any that can be opened: it is parsed when the run begins
        extra = {
            "spec=none": ["mode=serial_decode"],
            "model=hf": ["model.path=x"],
            "backend=hf_static": ["mode=serial_decode"],
            "backend=hf_compiled": ["mode=serial_decode"],
            "workload=trace": [file],
            "workload=sharegpt": [file],
        }.get(f"{group}={option}", [])
        settings = composed(f"{group}={option}", *extra)
        if group != "mode":
            assert settings.resolved[group]["name"] == OF_OPTION.get(option, option)


REFUSED = [  # each way of being wrong
    (["spec.block=0"], "spec.block", "0", "1 to 16"),
    (["scheduler.max_step_rows=8", "spec.block=9"], "spec.block", "9", "max_step_rows=8"),
    (["scheduler.max_num_seqs=65"], "scheduler.max_step_rows", "64", "max_num_seqs=65"),
    (["spec.block=abc"], "spec.block", "abc", "Integer"),
    (["spec.blok=8"], "spec.blok", "8", "did you mean block?"),
    (["backnd=cpu"], "backnd", "cpu", "did you mean backend?"),
    (["spec=turbo"], "spec", "turbo", "one of ngram, none, oracle"),
    (["mode=serial"], "mode", "serial", "did you mean serial_decode?"),
    (["experiment=nope"], "experiment", "nope", "block_sweep"),
    (["spec.block=1,2"], "command line", "spec.block=1,2", "-m"),
    (["workload.prompt=f(n)"], "command line", "workload.prompt=f(n)", "quotes"),
    (["workload.prompt=[]"], "workload.prompt", "[]", "a text or a list"),
    (["workload.file=missing.txt"], "workload.file", "missing.txt", "No such file"),
    (["mode=forced_rejection", "spec=ngram"], "spec", "ngram", "oracle"),
    (["spec=none"], "spec", "none", "mode=serial_decode"),
    (["mode.name=turbo"], "mode.name", "turbo", "one of serial_decode"),
    (["backend=hf_static"], "backend.cache", "static", "mode=serial_decode"),
    (["spec.min_n=3", "spec.max_n=2"], "spec.max_n", "2", "3 to 8"),
    (["sampling.temperature=inf"], "sampling.temperature", "inf", "finite"),
    (["sampling.logit_bias={a: 1}"], "sampling.logit_bias", "{'a': 1}", "whole ids"),
    (["sampling.stop_token_ids=[1,2,3,4,5,6,7,8,9]"], "sampling.stop_token_ids", "9 ids", "at most 8"),
    (["model=hf"], "model.path", "null", "a folder"),
    (["backend=persistent", "backend.threads=2"], "backend.threads", "2", "no such key of backend=persistent"),
    (["run.json=maybe"], "run.json", "maybe", "bool"),
    (["+foo=1"], "foo", "1", "no such group"),
    (["~spec.block"], "spec.block", "", "deletion"),
    (["spec=3"], "command line", "Config group override", "--help"),
    (["+experiment=quickstart"], "command line", "Multiple values", "without a leading +"),
]
ALSO_REFUSED = [
    (["spec.block=17"], "spec.block", "17", "1 to 16"),
    (["workload.prompt="], "workload.prompt", "", "at least one character"),
    (["workload.requests=0"], "workload.requests", "0", "1 to 1000000"),
    (["mode=forced_rejection", "spec.mismatch_stride=0"], "spec.mismatch_stride", "0", "at least 1"),
    (["mode=serial_decode", "spec=oracle"], "spec", "oracle", "mode=speculative_decode"),
    (["mode=serial_decode", "acceptance=forced"], "acceptance", "forced", "keyed or greedy"),
    (["mode.name=quality"], "quality.measure", "false", "true in mode=quality"),
    (["mode=quality", "spec=ngram"], "spec", "ngram", "mode=quality drafts nothing"),
    (["mode=quality", "model=llama_1b_shape"], "quality.measure", "true", "no tokenizer"),
    (["quality.window=1"], "quality.window", "1", "2 to"),
    (["quality.stride=513"], "quality.stride", "513", "1 to quality.window=512"),
    (["quality.tokens=0"], "quality.tokens", "0", "1 to"),
    (["quality.reference=exact"], "quality.reference", "exact", "one of numpy, transformers"),
    (["backend=hf", "mode=forced_rejection"], "spec", "oracle", "ngram"),
    (["backend=hf", "acceptance=forced"], "acceptance", "forced", "keyed"),
    (["backend=hf", "mode=serial_decode", "backend.compile=true"], "backend.compile", "true", "cache=dynamic"),
    (["backend=hf", "backend.device=tpu"], "backend.device", "tpu", "one of auto, cpu, cuda"),
    (["spec.name=oracle"], "spec.name", "oracle", "one of ngram"),
    (["spec.min_n=0"], "spec.min_n", "0", "1 to 8"),
    (["spec.max_n=9"], "spec.max_n", "9", "1 to 8"),
    (["acceptance=forced", "acceptance.stride=0"], "acceptance.stride", "0", "1 to"),
    (["spec=oracle", "spec.mismatch_stride=-1"], "spec.mismatch_stride", "-1", "0 to"),
    (["sampling.temperature=-0.5"], "sampling.temperature", "-0.5", "at least 1e-05"),
    (["sampling.temperature=1e-38"], "sampling.temperature", "1e-38", "at least 1e-05"),
    (["model.seed=3"], "model.seed", "3", "tiny"),
    (["model.path=somewhere"], "model.path", "somewhere", "model=hf"),
    (["workload.requests=1000000000000"], "workload.requests", "1000000000000", "1 to 1000000"),
    (["sampling.top_k=-1"], "sampling.top_k", "-1", "0 to"),
    (["sampling.top_p=0"], "sampling.top_p", "0.0", "above 0"),
    (["sampling.min_p=1.5"], "sampling.min_p", "1.5", "0 to 1"),
    (["sampling.repetition_penalty=0"], "sampling.repetition_penalty", "0.0", "above 0"),
    (["sampling.presence_penalty=3"], "sampling.presence_penalty", "3.0", "-2 to 2"),
    (["sampling.frequency_penalty=nan"], "sampling.frequency_penalty", "nan", "-2 to 2"),
    (["sampling.logit_bias={5: inf}"], "sampling.logit_bias.5", "inf", "-10000 to 10000"),
    (["sampling.logit_bias=[1]"], "sampling.logit_bias", "[1]", "whole ids"),
    (["sampling.logprobs=21"], "sampling.logprobs", "21", "0 to 20"),
    (["sampling.stop=['']"], "sampling.stop", "''", "at least one character"),
    (["sampling.max_new_tokens=0"], "sampling.max_new_tokens", "0", "at least 1"),
    (["kv.dtype=int8"], "kv.dtype", "int8", "auto, bf16, fp32"),
    (["model.dtype=fp8"], "model.dtype", "fp8", "auto, bf16, fp16, fp32"),
    (["backend.orchestration=graph"], "backend.orchestration", "graph", "persistent, launched"),
    (["backend.threads=-1"], "backend.threads", "-1", "0 to"),
    (["backend=persistent", "backend.lease_ms=-1"], "backend.lease_ms", "-1.0", "0 (never) or 1 to"),
    (["backend=persistent", "backend.heartbeat_ms=nan"], "backend.heartbeat_ms", "nan", "0 (never) or 1 to"),
    (["backend=launched", "backend.sync=row"], "backend.sync", "row", "one of step, phase"),
    (["backend=graph", "backend.weight_layout=8x8"], "backend.weight_layout", "8x8", "one of rows, tiles"),
    (["backend=graph", "backend.device=-1"], "backend.device", "-1", "0 to"),
    (["run.deadline_s=0"], "run.deadline_s", "0.0", "1 to 1000000 s"),
    (["tracking.timeout_s=0"], "tracking.timeout_s", "0.0", "above 0"),
    (["run.outputs="], "run.outputs", "''", "a folder"),
    (["+spec.foo=1"], "spec.foo", "1", "no such key of spec=ngram"),
    (["workload=synthetic", "workload.prompt=x"], "workload.prompt", "x", "no such key of workload=synthetic"),
]


@pytest.mark.parametrize(
    ("overrides", "field", "value", "allowed"),
    [*REFUSED, *(pytest.param(*case, marks=pytest.mark.heavy) for case in ALSO_REFUSED)],
)
def test_refused_by_name(overrides: list[str], field: str, value: str, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        composed(*overrides)
    text = str(caught.value)
    assert caught.value.field == field
    assert value in str(caught.value.value)
    assert allowed in text
    assert "\n" not in text
    assert len(text) < 220
    assert caught.value.exit_code == 2
