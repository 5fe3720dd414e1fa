"""Overrides from a grammar of keys and values: settings, or one line that names what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fuzz.profile import cases, fixed
from hydra import compose, initialize_config_module
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from xlpk import config
from xlpk.errors import InputError, one_line
from xlpk.settings import Settings

# fmt: off
VALUES = [
    "0", "1", "-1", "2", "16", "17", "1e3", "-1e3", "1e400", "nan", "inf", "-inf", ".5", "1_0", "0x10", "007",
    "null", "true", "false", "", "''", "' '", "'", "???", "none", "auto", "bf16", "fp32", "cpu",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "9" * 30, "[]", "{}", "[1,2]", "[-1]",
    "[null]", "[a,b]", "{a:1}", "{1:2}", "{-1:1.5}", "{5:nan}", "[[1]]", "[1.5]", "1MiB", "64pages", "-1MiB",
    "1e9GiB", "5%", "MiB", "nanMiB", "\u00e9", "\u2028", "x\\ny", "../x", "/proc/x", "~", "${model.name}",
    "${nowhere}", "${oc.env:NOWHERE}", "${xlpk_id:}", "keyed", "greedy", "forced", "ngram", "oracle", "prompts",
    "synthetic", "tiny", "hf",
]
# fmt: on
MODES = ["serial_decode", "speculative_decode", "forced_rejection"]
STRANGE = [
    "x",
    "spec",
    "spec.x",
    "spec.block.x",
    "mode",
    "mode.name.x",
    "run",
    "workload",
    "a.b.c",
    "",
    ".",
    "sampling.",
]


@pytest.fixture(autouse=True, scope="module")
def _hydra() -> Iterator[None]:
    config.register()
    with initialize_config_module("xlpk.conf", version_base="1.3"):
        yield


def settings_or_line(overrides: list[str], make: Any) -> None:
    """As `xlpk.run.compose_and_run` has it: these exceptions become a line, any other is a traceback."""
    try:
        assert isinstance(config.validate(make()), Settings)
        return
    except InputError as error:
        refused = error
    except (*config.COMPOSITION_ERRORS, ValueError, OSError) as error:
        refused = config.explain(error, overrides)
    text = one_line(refused)
    assert text
    assert text.isprintable(), ascii(text)
    assert len(text) < 1000
    assert refused.field


def keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return [prefix[:-1]]
    return [key for name, value in node.items() for key in keys(value, f"{prefix}{name}.")]


def known_keys() -> list[str]:
    bases = [compose("config", overrides=[f"mode={mode}"]) for mode in MODES]
    bases.append(compose("config", overrides=["workload=synthetic", "tracking=mlflow", "acceptance=greedy"]))
    return sorted({key for base in bases for key in keys(OmegaConf.to_container(base))})


def values() -> Any:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    return st.sampled_from(VALUES) | st.integers().map(str) | st.floats().map(repr) | text


@cases(20)
def test_overrides_through_hydra(cases: int) -> None:
    key = st.sampled_from([*known_keys(), *config.groups(), *STRANGE])
    override = st.builds(
        lambda sign, key, value: f"{sign}{key}={value}", st.sampled_from(["", "", "", "+", "++", "~"]), key, values()
    )
    groups = st.sampled_from(
        [f"{group}={option}" for group in config.groups() for option in config.options(group)]
        + [f"{group}=no_such" for group in config.groups()]
    )

    @fixed(cases)
    @given(st.lists(override | groups, min_size=1, max_size=3))
    def check(overrides: list[str]) -> None:
        settings_or_line(overrides, lambda: compose("config", overrides=overrides))

    check()


@cases(250)
def test_values_of_known_keys(cases: int) -> None:
    """Without Hydra's half of the work, which takes most of the time."""
    bases = [compose("config", overrides=[f"mode={mode}"]) for mode in MODES]
    bases.append(compose("config", overrides=["workload=synthetic", "tracking=mlflow", "acceptance=greedy"]))
    known = [keys(OmegaConf.to_container(base)) for base in bases]
    texts = st.text(max_size=6) | st.sampled_from([*VALUES, "\ud800", "\udcff", "\0", "x" * 3000])
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
    value = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.integers() | st.text(max_size=3), scalars)
    case = st.integers(0, len(bases) - 1).flatmap(
        lambda index: st.tuples(
            st.just(index), st.lists(st.tuples(st.sampled_from(known[index]), value), min_size=1, max_size=3)
        )
    )

    @fixed(cases)
    @given(case)
    def check(case: tuple[int, list[tuple[str, Any]]]) -> None:
        def make() -> DictConfig:
            made = bases[case[0]].copy()
            for key, value in case[1]:
                OmegaConf.update(made, key, value)
            return made

        settings_or_line([], make)

    check()
