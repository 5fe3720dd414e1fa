"""docs/reference.md is what the schema says, and says something of each key."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
from omegaconf import OmegaConf

from xlpk import config, config_reference
from xlpk.errors import InputError
from xlpk.settings import CpuBackend, ModelChoice

NODES = [(group, node) for group in (*config.GROUPS, *config.WHOLE) for node in config_reference.nodes(group)]


@pytest.fixture(scope="module")
def page() -> str:
    return config_reference.render()


@dataclass
class Node:
    """A node of a config."""

    name: str = "node"
    beside: int = 3  # tokens, beside
    # above, over
    # two lines
    above: float | None = None
    bare: str = "x"
    listed: list[int] | None = None


def test_the_page_is_not_stale(page: str) -> None:
    written = config_reference.PAGE.read_text(encoding="utf-8")
    assert written == page, "stale: python -m xlpk.config_reference"


def test_every_field_stands_in_the_page(page: str) -> None:
    for group, node in NODES:
        for item in fields(node):
            assert item.name == "name" or f"| `{group}.{item.name}` |" in page
    for group in config.groups():
        for option in config.options(group):
            assert f"| `{group}={option}` |" in page


@pytest.mark.parametrize(("group", "node"), NODES, ids=lambda one: one if isinstance(one, str) else one.__name__)
def test_every_key_has_a_meaning(group: str, node: type) -> None:
    assert not [key.name for key in config_reference.keys(node, group) if not key.meaning]


def test_comments_beside_and_above() -> None:
    found = config_reference.comments(Node)
    assert found["beside"] == "tokens, beside"
    assert found["above"] == "above, over two lines"
    assert found["bare"] == ""


def test_the_validator_is_asked_from_sound_ground() -> None:
    """Else all answers of a node would be about something else. Checks of files come after those of keys."""
    for group, node in NODES:
        try:
            config.validate(OmegaConf.structured(config.Config(**config_reference._sound(node, group))))
        except InputError as error:
            if (error.field, str(error.value)) != ("workload.file", "FILE"):
                raise


def test_what_is_allowed_is_what_the_validator_says() -> None:
    by_name = {key.name: key for key in config_reference.keys(CpuBackend, "backend")}
    assert by_name["backend.threads"].allowed == "0 to 1024"
    assert by_name["backend.orchestration"].choices == ["persistent", "launched"]
    by_name = {key.name: key for key in config_reference.keys(ModelChoice, "model")}
    assert by_name["model.seed"].allowed.startswith("0 to ")
    assert by_name["model.path"].allowed == ""


def test_options_say_what_they_set() -> None:
    (forced,) = (one for one in config_reference.options()["mode"] if one.name == "forced_rejection")
    assert {"spec=oracle", "spec.block=8"} <= set(forced.sets)
    (phase,) = (one for one in config_reference.options()["backend"] if one.name == "launched_phase")
    assert (phase.node, phase.sets) == ("launched", ("backend.sync=phase",))
