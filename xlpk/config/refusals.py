"""Hydra's and OmegaConf's refusals as one InputError, which names field, value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from xlpk import launchers
from xlpk.config.schema import groups
from xlpk.errors import InputError, shown

# The last three: Hydra on a list or a number where a group's option belongs, and on an override without a key.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, TypeError, AssertionError, AttributeError)
UNKNOWN = "..."  # a value that Hydra does not hand on


def explain(error: Exception, argv: Iterable[str] = ()) -> InputError:
    """Hydra's own refusals (unknown key or option, wrong type, syntax) as one InputError; `argv` has what was typed."""
    refused = _explain(error)
    if not refused.field:  # `=` alone
        refused = InputError("command line", refused.value or "''", refused.allowed)
    if refused.value == UNKNOWN:
        typed = [text.partition("=")[2] for text in argv if text.partition("=")[0].lstrip("+~") == refused.field]
        return InputError(refused.field, short(typed[-1]) if typed else UNKNOWN, refused.allowed)
    return refused


def _explain(error: Exception) -> InputError:
    if isinstance(error, OverrideParseException):
        hint = "key=value; spaces, commas and brackets go in quotes, as in 'workload.prompt=\"def f(n):\"'"
        return InputError("command line", short(error.override), hint)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group == "hydra/launcher" and option in launchers.PLUGIN_OF:
            return InputError(group, option, launchers.install(launchers.PLUGIN_OF[option]))
        return InputError(group or "config", option, _suggest(option, [o for o in error.options or [] if o]))
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OmegaConfBaseException):
        return from_omegaconf(cause)
    text = str(error)
    if "Multiple values for" in text:
        return InputError("command line", short(text.splitlines()[0]), "one value a group, without a leading +")
    if "looks like a config group override" in text or "Could not override" in text:
        key = text.split("'")[1] if "'" in text else text
        return InputError(key, UNKNOWN, _suggest(key, groups()))
    if "Ambiguous value" in text or "requires --multirun" in text:
        typed = text.split("'")[1] if "'" in text else text
        return InputError("command line", short(typed), "one value, or -m for a sweep; a list goes in [ ]")
    return InputError("command line", short(text or "an override without a key"), "see python -m xlpk.run --help")


def from_omegaconf(error: OmegaConfBaseException) -> InputError:
    key = str(error.full_key or error.key or "config")
    parent = error.parent_node
    message = str(error.msg or error).splitlines()[0]
    if "not in" in message and isinstance(parent, DictConfig):
        known = [str(name) for name in parent if name != "hydra"]
        where = key.rpartition(".")[0]
        title = f"{where}={parent.name}" if where and "name" in known else where or "the config"
        hint = _suggest(key.rpartition(".")[2], [name for name in known if name != "name"])
        return InputError(key, UNKNOWN, f"no such key of {title}; {hint}")
    if "Missing mandatory value" in message:
        return InputError(key, "???", f"a value is needed: {key}=...")
    return InputError(key, short(error.value) if error.value is not None else UNKNOWN, short(message))


def _suggest(typed: str, known: list[str]) -> str:
    close = difflib.get_close_matches(typed, known, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}one of {', '.join(sorted(known))}"


def short(value: object) -> str:
    return shown(" ".join(str(value).split()), 80)
