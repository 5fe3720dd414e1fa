"""The config: its schema in Hydra's ConfigStore, and what refuses one, `validate` and `explain`, one line each.

conf/*.yaml picks values; classes in schema.py and in the layers below own fields, types, defaults and units. Nothing is
instantiated by name from a file: `OmegaConf.to_object` turns the nodes into the objects that the engine takes.
"""

from __future__ import annotations

from xlpk.config.refusals import COMPOSITION_ERRORS, explain
from xlpk.config.schema import GROUPS, PACKAGE, WHOLE, Config, groups, node_name, options, register
from xlpk.config.validation import validate

__all__ = [
    "COMPOSITION_ERRORS",
    "GROUPS",
    "PACKAGE",
    "WHOLE",
    "Config",
    "explain",
    "groups",
    "node_name",
    "options",
    "register",
    "validate",
]
