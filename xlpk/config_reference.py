"""`python -m xlpk.config_reference` writes docs/reference.md: each key with type, default, allowed values, meaning.

Everything is read from the schema: names, types and defaults from its classes, meanings from the comments beside the
fields, and what is allowed from the validator itself, which is asked with values that cannot be right.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import sys
import textwrap
import tokenize
import types
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from xlpk import config
from xlpk.config import node_name
from xlpk.errors import InputError
from xlpk.model import SHAPES
from xlpk.settings import Mode
from xlpk.speculation import Ngram
from xlpk.workload import Prompts

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
ABSURD: dict[type, tuple[Any, ...]] = {int: (-(1 << 62), 1 << 62), float: (float("nan"), -1e300, 1e300), str: ("?",)}
GLOBAL = "# @package _global_"


@dataclass(frozen=True)
class Key:
    """One key of the config."""

    name: str  # group.key
    kind: str  # int | float | bool | str | list of str | any, with " or null"
    default: Any
    meaning: str
    node: type
    asked: type | None  # the type of values that the validator may be asked with

    @property
    def allowed(self) -> str:
        """In the validator's words; "" where any value of the type will do."""
        group, _, name = self.name.partition(".")
        return _allowed(self.node, group, name, self.asked)

    @property
    def choices(self) -> list[str]:
        """The values, where there are few."""
        if self.kind.startswith("bool"):
            return ["true", "false"]
        allowed = self.allowed
        return allowed.removeprefix("one of ").split(", ") if allowed.startswith("one of ") else []


@dataclass(frozen=True)
class Option:
    """`group=option`: a file of conf/."""

    group: str  # hydra/launcher for nested ones
    name: str
    meaning: str
    node: str  # `name` of the schema's class that it takes; "" where the group has one class
    sets: tuple[str, ...]  # what it picks, as overrides


def nodes(group: str) -> tuple[type, ...]:
    """The classes that a group's node may have."""
    return (config.WHOLE[group],) if group in config.WHOLE else config.GROUPS.get(group, ())


def keys(node: type, group: str) -> list[Key]:
    """The keys of a class, but for `name`, which the option gives."""
    return [key(node, group, item) for item in fields(node) if item.name != "name"]


def key(node: type, group: str, item: Field[Any]) -> Key:
    kind, inner = _kind(get_type_hints(node)[item.name])
    default = getattr(node(), item.name)
    name = f"{group}.{item.name}"
    return Key(name, kind, default, comments(node).get(item.name, ""), node, inner)


def _kind(hint: Any) -> tuple[str, type | None]:
    """(words, the type that the validator may be asked with)."""
    if hint is Any:
        return "any", None
    if get_origin(hint) in (Union, types.UnionType):
        inner = [one for one in get_args(hint) if one is not type(None)]
        words, asked = _kind(inner[0])
        return f"{words} or null", asked
    if get_origin(hint) is list:
        return f"list of {get_args(hint)[0].__name__}", None
    return str(hint.__name__), hint


@cache
def comments(node: type) -> dict[str, str]:
    """Field -> the comment on its line, else the comment lines above it, else what the class it comes from says."""
    source = textwrap.dedent(inspect.getsource(node))
    found = {
        token.start[0]: (token.string.lstrip("# ").strip(), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (declared,) = ast.parse(source).body
    assert isinstance(declared, ast.ClassDef)
    out = {name: text for base in node.__bases__ if is_dataclass(base) for name, text in comments(base).items()}
    for item in declared.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        beside = [found[line][0] for line in range(item.lineno, (item.end_lineno or item.lineno) + 1) if line in found]
        above: list[str] = []
        line = item.lineno - 1
        while line in found and found[line][1]:
            above.insert(0, found[line][0])
            line -= 1
        out[item.target.id] = " ".join(beside or above) or out.get(item.target.id, "")
    return out


def _allowed(node: type, group: str, name: str, kind: type | None) -> str:
    """What the validator says is allowed when it is asked with absurd values."""
    for value in ABSURD.get(kind, ()) if kind else ():
        cfg = OmegaConf.structured(config.Config(**_sound(node, group)))
        cfg[group][name] = value
        try:
            config.validate(cfg)
        except InputError as error:
            if error.field == f"{group}.{name}" and (kind is not str or error.allowed.startswith("one of ")):
                return error.allowed
    return ""


def _sound(node: type, group: str) -> dict[str, Any]:
    """Nodes of a config that is right in all else."""
    chosen = {name: classes[0]() for name, classes in config.GROUPS.items()}
    chosen |= {"spec": Ngram(), "workload": Prompts(prompt="a prompt"), group: node()}
    for needed, value in (("prompt", "a prompt"), ("file", "FILE")):
        if group == "workload" and hasattr(chosen[group], needed):
            setattr(chosen[group], needed, value)
            break
    if group == "model":
        chosen[group].name = next(iter(SHAPES))  # hash weights take a seed
    if chosen["spec"].name == "none":
        chosen["mode"] = Mode("serial_decode")
    return chosen


@cache
def options() -> dict[str, list[Option]]:
    """group -> its options, for every group of conf/."""
    found: dict[str, list[Option]] = {}
    for group, name, text in _files(resources.files(config.PACKAGE), ""):
        lines = [line for line in text.splitlines() if line.startswith("#") and line.strip() != GLOBAL]
        meaning = " ".join(re.sub(r"(python -m .*)", r"`\1`", line.lstrip("# ")) for line in lines)
        node = re.search(r"/schema/\w+/(\w+)@", text)
        option = Option(group, name, meaning, node[1] if node else "", tuple(_sets(_yaml(text), group)))
        found.setdefault(group, []).append(option)
    return found


def key_groups() -> list[str]:
    """The groups that have keys."""
    return [*config.GROUPS, *(name for name in config.WHOLE if len(fields(config.WHOLE[name])) > 1)]


def chosen_nodes(overrides: Sequence[str]) -> dict[str, str]:
    """group -> `name` of the class that its node has under `overrides`; "" where they sweep over several."""
    main = _yaml(resources.files(config.PACKAGE).joinpath("config.yaml").read_text(encoding="utf-8"))
    chosen: dict[str, str] = {}
    for entry in main["defaults"]:
        chosen |= {name: str(option) for name, option in (entry.items() if isinstance(entry, dict) else [])}
    typed = {
        key: value for key, _, value in (text.lstrip("+").partition("=") for text in overrides) if key in options()
    }
    for overlay in ("mode", "experiment"):
        picked = typed.get(overlay, chosen.get(overlay))
        for option in options()[overlay]:
            if option.name == picked:
                chosen |= {key: value for key, _, value in (text.partition("=") for text in option.sets)}
    chosen |= typed
    return {
        group: next((option.node for option in found if option.name == chosen.get(group)), "")
        for group, found in options().items()
    }


def _files(folder: Any, group: str) -> Iterator[tuple[str, str, str]]:
    for entry in sorted(folder.iterdir(), key=lambda one: str(one.name)):
        if entry.is_dir() and not entry.name.startswith("_"):
            yield from _files(entry, f"{group}/{entry.name}" if group else entry.name)
        elif group and entry.name.endswith(".yaml"):
            yield group, entry.name.removesuffix(".yaml"), entry.read_text(encoding="utf-8")


def _yaml(text: str) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    return {str(name): value for name, value in content.items()} if isinstance(content, dict) else {}


def _sets(content: dict[str, Any], group: str) -> Iterator[str]:
    """What a file picks beyond the schema's defaults, as overrides."""
    overlay = group in ("mode", "experiment")
    for entry in content.get("defaults", []):
        for name, option in entry.items() if isinstance(entry, dict) else []:
            if name.startswith("override "):
                yield f"{name.removeprefix('override ').lstrip('/')}={option}"
    values = {name: value for name, value in content.items() if name != "defaults"}
    for name, value in _flat(values, "" if overlay else f"{group.replace('/', '.')}."):
        if not name.endswith(".name"):
            yield f"{name.removeprefix('hydra.sweeper.params.')}={value}"


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", r"\|") for cell in cells) + " |"

    return [line(headings), "|" + "---|" * len(headings), *map(line, rows), ""]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return repr(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def _of(group: str, node: type) -> str:
    return f"{group}={node_name(node)}" if len(nodes(group)) > 1 else group


def render() -> str:
    """The page."""
    out = [
        "# Config reference",
        "",
        "Every group, option and key of a run, as `python -m xlpk.config_reference` reads them from the schema; a test",
        "refuses a stale page. `group=option` chooses, `group.key=value` sets, `-m` and commas sweep. What is allowed",
        "stands in the validator's own words; an empty cell means any value of the type.",
        "",
        "## Options",
        "",
    ]
    rows = []
    for group, found in options().items():
        for option in found:
            sets = ", ".join(_code(text if len(text) <= 60 else text[:57] + "...") for text in option.sets)
            rows.append((_code(f"{group}={option.name}"), option.meaning, sets))
    out += _table(("option", "what it is", "sets"), rows)
    out += ["## Keys", ""]
    for group in (*config.GROUPS, *(name for name in config.WHOLE if name != "mode")):
        for node in nodes(group):
            found_keys = keys(node, group)
            out += [f"### {_of(group, node)}", "", (inspect.getdoc(node) or "").split("\n\n")[0].replace("\n", " "), ""]
            cells = [
                (
                    _code(one.name),
                    one.kind,
                    _code(_shown(one.default)),
                    one.allowed or ", ".join(one.choices),
                    one.meaning,
                )
                for one in found_keys
            ]
            out += _table(("key", "type", "default", "allowed", "meaning"), cells) if cells else ["No keys.", ""]
    return "\n".join(out).rstrip() + "\n"


def main() -> int:
    """Writes docs/reference.md of the checkout."""
    if not PAGE.parent.is_dir():
        print("xlpk: docs/ is part of a checkout, not of an installed package", file=sys.stderr)
        return 2
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
