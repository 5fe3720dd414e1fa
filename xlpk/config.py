"""The schema in Hydra's ConfigStore, and what refuses a config: `validate` and `explain`, one line each.

conf/*.yaml picks values; classes here and in the layers below own fields, types, defaults and units. Nothing is
instantiated by name from a file: `OmegaConf.to_object` turns the nodes into the objects that the engine takes.
"""

from __future__ import annotations

import difflib
import math
import secrets
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib import resources
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from xlpk import launchers, layout
from xlpk.dtypes import ELEMENT_BYTES, KV_DTYPES
from xlpk.errors import InputError, shown
from xlpk.hardware import Hardware
from xlpk.kv import EVICTIONS, KV, PREEMPTIONS
from xlpk.settings import (
    MAX_TRACE_SPANS,
    MODES,
    ORCHESTRATIONS,
    WEIGHT_LAYOUTS,
    AutoBackend,
    CpuBackend,
    GraphBackend,
    HfBackend,
    LaunchedBackend,
    MlflowTracking,
    Mode,
    ModelChoice,
    NoTracking,
    PersistentBackend,
    Quality,
    Run,
    Scheduler,
    Settings,
    SimulatedBackend,
)
from xlpk.slo import Slo
from xlpk.speculation import Forced, Greedy, Keyed, Ngram, NoSpec, Oracle
from xlpk.workload import WORKLOADS, Sampling, check_sampling, is_text

PACKAGE = "xlpk.conf"
GROUPS: dict[str, tuple[type, ...]] = {
    "backend": (
        AutoBackend,
        CpuBackend,
        PersistentBackend,
        LaunchedBackend,
        GraphBackend,
        HfBackend,
        SimulatedBackend,
    ),
    "spec": (NoSpec, Ngram, Oracle),
    "acceptance": (Keyed, Greedy, Forced),
    "workload": WORKLOADS,
    "tracking": (MlflowTracking, NoTracking),
}
WHOLE: dict[str, type] = {  # nodes of one class
    "mode": Mode, "kv": KV, "model": ModelChoice, "sampling": Sampling, "scheduler": Scheduler, "run": Run,
    "quality": Quality, "slo": Slo, "hardware": Hardware,
}  # fmt: skip
MAX_NGRAM = 8  # tokens
PLANNERS = ("auto", "team", "inline")
UNKNOWN = "..."  # a value that Hydra does not hand on


@dataclass
class Config:
    """The composed config. Fields of type Any hold one of the group's classes."""

    backend: Any = None
    mode: Mode = field(default_factory=Mode)
    spec: Any = None
    acceptance: Any = None
    kv: KV = field(default_factory=KV)
    model: ModelChoice = field(default_factory=ModelChoice)
    workload: Any = None
    sampling: Sampling = field(default_factory=Sampling)
    scheduler: Scheduler = field(default_factory=Scheduler)
    tracking: Any = None
    quality: Quality = field(default_factory=Quality)
    slo: Slo = field(default_factory=Slo)
    hardware: Hardware = field(default_factory=Hardware)
    run: Run = field(default_factory=Run)


def register() -> None:
    """Schema nodes and resolvers; once a process, before Hydra composes."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, nodes in GROUPS.items():
        for node in nodes:
            store.store(group=f"schema/{group}", name=node_name(node), node=node)
    # Cached by Hydra for all jobs of a sweep; two runs started in one second do not share a folder.
    OmegaConf.register_new_resolver("xlpk_id", lambda: secrets.token_hex(2), use_cache=True, replace=True)
    OmegaConf.register_new_resolver("xlpk_groups", _groups_help, replace=True)
    OmegaConf.register_new_resolver("xlpk_jobs", launchers.jobs_of, replace=True)
    OmegaConf.register_new_resolver("xlpk_cores", launchers.threads_of, replace=True)


def node_name(node: Any) -> str:
    """The `name` that a group's class has by default: its option's name."""
    for item in fields(node):
        if item.name == "name" and item.default is not MISSING:
            return str(item.default)
    raise TypeError(f"{node.__name__} needs a name")


def options(group: str) -> list[str]:
    """The choices of a group: the YAML files of its folder."""
    folder = resources.files(PACKAGE).joinpath(group)
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def groups() -> list[str]:
    others = ("hydra",)  # Hydra's own groups; its launchers are named in config.yaml and docs/scale.md
    names = [entry.name for entry in resources.files(PACKAGE).iterdir() if entry.is_dir()]
    return sorted(name for name in names if not name.startswith("_") and name not in others)


def _groups_help() -> str:
    return "\n".join(f"{group + ':':12}{', '.join(options(group))}" for group in groups())


def validate(cfg: DictConfig) -> Settings:
    """Everything that can be refused without a model. Raises InputError naming field, value and what is allowed."""
    try:
        config = OmegaConf.to_object(cfg)
        resolved = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise _from_omegaconf(error) from None
    assert isinstance(resolved, dict)
    if not isinstance(config, Config):
        raise InputError("config", type(config).__name__, "the schema of xlpk, first in the defaults list")
    for name in resolved:
        if name not in {item.name for item in fields(Config)}:
            raise InputError(str(name), resolved[name], f"no such group; there are {', '.join(groups())}")
    _check_texts("", resolved)
    _check_nodes(config)
    _check_numbers(config)
    check_sampling(config.sampling, layout.MAX_STOP_IDS)
    spec, notes = _check_mode(config)
    if isinstance(config.backend, HfBackend):
        for field_, value, only in (
            ("scheduler.policy", config.scheduler.policy, "fcfs"),
            ("kv.pressure", config.kv.pressure, None),
            ("kv.preemption", config.kv.preemption, "recompute"),
            ("kv.pinned", config.kv.pinned, None),
        ):
            if value != only:
                raise InputError(field_, value, f"{only or 'null'} with backend=hf, which neither ranks nor preempts")
        if config.run.trace:
            raise InputError("run.trace", "true", "false with backend=hf, whose phases and pages nobody sees")
        config.backend.check(spec, config.acceptance)
        notes += [note] if (note := config.backend.note(spec)) else []
    if isinstance(config.backend, SimulatedBackend):
        config.backend.check(spec, config.kv, config.sampling, config.quality.measure)
    config.quality.check()
    config.slo.check()
    config.hardware.check()
    return Settings(
        mode=config.mode.name,
        backend=config.backend,
        spec=spec,
        acceptance=config.acceptance,
        kv=replace(config.kv, prefix_sharing=False) if isinstance(config.backend, HfBackend) else config.kv,
        model=config.model,
        workload=config.workload,
        sampling=config.sampling,
        scheduler=config.scheduler,
        tracking=config.tracking,
        run=config.run,
        requested_block=config.spec.block,
        quality=config.quality,
        slo=config.slo,
        hardware=config.hardware,
        notes=tuple(notes),
        resolved={str(key): value for key, value in resolved.items()},
    )


def _check_texts(key: str, value: Any) -> None:
    """Bytes of the command line that are no UTF-8 arrive as lone surrogates, which no file of a run can hold."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_texts(f"{key}.{name}" if key else str(name), inner)
            _check_texts(key, name)
    elif isinstance(value, str) and not is_text(value):
        raise InputError(key, ascii(value), "a text in UTF-8")


def _check_nodes(config: Config) -> None:
    for name, whole in WHOLE.items():
        if not isinstance(getattr(config, name), whole):
            raise InputError(name, _short(getattr(config, name)), f"an option or keys: {name}.KEY=VALUE")
    for group, nodes in GROUPS.items():
        node: Any = getattr(config, group)
        if type(node) not in nodes:
            raise InputError(group, _short(node), f"one of {', '.join(map(node_name, nodes))}")
        _one_of(f"{group}.name", node.name, [node_name(type(node))])
        for extra in set(vars(node)) - {item.name for item in fields(type(node))}:
            raise InputError(f"{group}.{extra}", _short(vars(node)[extra]), f"no such key of {group}={node.name}")
    _one_of("mode.name", config.mode.name, MODES)
    if isinstance(config.backend, CpuBackend):
        _one_of("backend.orchestration", config.backend.orchestration, ORCHESTRATIONS)
    if isinstance(config.backend, LaunchedBackend):
        _one_of("backend.sync", config.backend.sync, ("step", "phase"))
    if isinstance(config.backend, PersistentBackend | LaunchedBackend | GraphBackend):
        _one_of("backend.weight_layout", config.backend.weight_layout, WEIGHT_LAYOUTS)
    if config.model.name == "hf" and not config.model.path:
        raise InputError("model.path", "null", "a folder with config.json and safetensors files: model.path=FOLDER")
    if config.model.name != "hf" and config.model.path:
        raise InputError(
            "model.path", config.model.path, f"model=hf takes a path; model={config.model.name} has its own"
        )
    if config.model.seed and config.model.name in ("hf", "tiny"):
        raise InputError(
            "model.seed", config.model.seed, f"hash weights take a seed; model={config.model.name} has none"
        )
    if config.quality.measure and config.model.name not in ("hf", "tiny"):
        raise InputError("quality.measure", "true", f"false: model={config.model.name} has no tokenizer and no text")
    _one_of("model.dtype", config.model.dtype, ("auto", *ELEMENT_BYTES))
    _one_of("model.generation_config", config.model.generation_config, ("auto", "none"))
    _one_of("kv.dtype", config.kv.dtype, ("auto", *KV_DTYPES))
    if not config.run.outputs:
        raise InputError("run.outputs", "''", "a folder")
    config.workload.check()


def _check_numbers(config: Config) -> None:
    if not 1 <= config.run.deadline_s <= 1e6:
        raise InputError("run.deadline_s", config.run.deadline_s, "1 to 1000000 s")
    if isinstance(config.backend, CpuBackend):
        _between("backend.threads", config.backend.threads, 0, 1024)
    if isinstance(config.backend, PersistentBackend):
        for name in ("lease_ms", "idle_ms", "heartbeat_ms"):
            _milliseconds(f"backend.{name}", getattr(config.backend, name))
    if isinstance(config.backend, PersistentBackend | LaunchedBackend | GraphBackend):
        _between("backend.device", config.backend.device, 0, 1023)
    _between("scheduler.max_num_seqs", config.scheduler.max_num_seqs, 1, 512)
    _between("scheduler.max_step_rows", config.scheduler.max_step_rows, 1, 512)
    _between("scheduler.prefill_chunk", config.scheduler.prefill_chunk, 1, 1 << 20)
    if config.kv.pressure is not None and not 0 < config.kv.pressure <= 1:  # nan compares false
        raise InputError("kv.pressure", config.kv.pressure, "above 0, at most 1")
    _between("scheduler.max_waiting", config.scheduler.max_waiting, 1, 1 << 16)
    _between("scheduler.ageing_steps", config.scheduler.ageing_steps, 1, 1 << 24)
    _one_of("scheduler.policy", config.scheduler.policy, [policy.name.lower() for policy in layout.Policy])
    _one_of("scheduler.planner", config.scheduler.planner, PLANNERS)
    resident = isinstance(config.backend, AutoBackend | CpuBackend | PersistentBackend)
    if config.scheduler.planner == "team" and not (resident and config.backend.orchestration in ("auto", "persistent")):
        allowed = "auto or inline where the host launches the steps: a team plans within the persistent loop"
        raise InputError("scheduler.planner", "team", allowed)
    config.kv.pinned_texts()
    _one_of("kv.eviction", config.kv.eviction, EVICTIONS)
    _one_of("kv.preemption", config.kv.preemption, PREEMPTIONS)
    _between("run.trace_spans", config.run.trace_spans, 0, MAX_TRACE_SPANS)
    _between("run.warmup_steps", config.run.warmup_steps, 0, 1 << 20)
    _between("model.seed", config.model.seed, 0, (1 << 63) - 1)
    if config.model.max_len is not None:
        _between("model.max_len", config.model.max_len, 2, 1 << 30)
    block, rows = config.spec.block, config.scheduler.max_step_rows
    limit = min(layout.MAX_BLOCK, rows)
    if not 1 <= block <= limit:
        why = f"the least of {layout.MAX_BLOCK} and scheduler.max_step_rows={rows}"
        raise InputError("spec.block", block, f"1 to {limit} ({why})")
    if rows < config.scheduler.max_num_seqs:
        allowed = f"at least scheduler.max_num_seqs={config.scheduler.max_num_seqs}, a row for each request"
        raise InputError("scheduler.max_step_rows", rows, allowed)
    if isinstance(config.spec, Ngram):
        _between("spec.min_n", config.spec.min_n, 1, MAX_NGRAM)
        _between("spec.max_n", config.spec.max_n, config.spec.min_n, MAX_NGRAM)
    if isinstance(config.spec, Oracle):
        _between("spec.mismatch_stride", config.spec.mismatch_stride, 0, (1 << 31) - 1)
    if isinstance(config.acceptance, Forced):
        _between("acceptance.stride", config.acceptance.stride, 1, (1 << 31) - 1)
    if isinstance(config.tracking, MlflowTracking):
        timeout_s = config.tracking.timeout_s
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise InputError("tracking.timeout_s", timeout_s, "a finite number of seconds above 0")
        if not config.tracking.experiment.strip():
            raise InputError("tracking.experiment", "''", "a name")


def _check_mode(config: Config) -> tuple[NoSpec | Ngram | Oracle, list[str]]:
    """The proposer that runs, and the notes. A contradiction is refused; `serial_decode` answers other blocks by 1."""
    mode, spec = config.mode.name, config.spec
    if mode == "kv_pressure":
        if config.kv.pressure is None:
            raise InputError("kv.pressure", "null", "a share of the working set in mode=kv_pressure: 0.25, 0.5, 0.75")
        return spec, []
    if mode == "mega_kernel_sim":
        _check_side_by_side(config)
        return spec, []
    if mode == "quality" and not config.quality.measure:
        raise InputError("quality.measure", "false", "true in mode=quality; mode=serial_decode is the one without")
    if mode in ("serial_decode", "quality"):
        if not isinstance(spec, NoSpec):
            drafting = "mode=speculative_decode" + (" quality.measure=true" if mode == "quality" else "")
            raise InputError("spec", spec.name, f"mode={mode} drafts nothing: none, or {drafting}")
        if isinstance(config.acceptance, Forced):
            raise InputError("acceptance", "forced", f"mode={mode} has no drafts to reject: keyed or greedy")
        if spec.block != 1:
            return NoSpec(), [f"spec.block={spec.block}: mode={mode} runs with an effective block of 1"]
        return spec, []
    if isinstance(spec, NoSpec):
        drafting = "ngram or oracle" if mode == "speculative_decode" else "oracle"
        raise InputError("spec", spec.name, f"mode={mode} drafts: {drafting}; mode=serial_decode is the one without")
    if mode == "forced_rejection":
        if not isinstance(spec, Oracle):
            raise InputError("spec", spec.name, "mode=forced_rejection takes oracle, mode=speculative_decode ngram")
        if spec.mismatch_stride == 0 and not isinstance(config.acceptance, Forced):
            raise InputError("spec.mismatch_stride", 0, "at least 1 in mode=forced_rejection: 0 rejects nothing")
        if (
            spec.mismatch_stride
            and spec.mismatch_stride % spec.block == 0
            and not isinstance(config.acceptance, Forced)
        ):
            why = "every mismatch but a request's first meets the token that no draft gives"
            return spec, [f"spec.block={spec.block} divides spec.mismatch_stride={spec.mismatch_stride}: {why}"]
    return spec, []


def _check_side_by_side(config: Config) -> None:
    """`mega_kernel_sim` simulates all orchestrations on costs that each of them has."""
    backend = config.backend
    if not isinstance(backend, SimulatedBackend):
        raise InputError("backend", backend.name, "simulated in mode=mega_kernel_sim, which chooses it")
    if backend.orchestration != "persistent":
        raise InputError(
            "backend.orchestration", backend.orchestration, "left out: mode=mega_kernel_sim runs all three"
        )
    if backend.costs is not None:
        why = "a fit is of one orchestration, and mode=mega_kernel_sim compares three on the `hardware` group"
        raise InputError("backend.costs", backend.costs, f"null: {why}")


def _between(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InputError(name, value, f"{least} to {most}")


def _milliseconds(name: str, value: float) -> None:
    if not (value == 0 or 1 <= value <= 86_400_000):  # nan compares false
        raise InputError(name, value, "0 (never) or 1 to 86400000 ms")


def _one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    if value not in tuple(allowed):
        raise InputError(name, _short(value), f"one of {', '.join(allowed)}")


def _short(value: object) -> str:
    return shown(" ".join(str(value).split()), 80)


def explain(error: Exception, argv: Iterable[str] = ()) -> InputError:
    """Hydra's own refusals (unknown key or option, wrong type, syntax) as one InputError; `argv` has what was typed."""
    refused = _explain(error)
    if not refused.field:  # `=` alone
        refused = InputError("command line", refused.value or "''", refused.allowed)
    if refused.value == UNKNOWN:
        typed = [text.partition("=")[2] for text in argv if text.partition("=")[0].lstrip("+~") == refused.field]
        return InputError(refused.field, _short(typed[-1]) if typed else UNKNOWN, refused.allowed)
    return refused


def _explain(error: Exception) -> InputError:
    if isinstance(error, OverrideParseException):
        hint = "key=value; spaces, commas and brackets go in quotes, as in 'workload.prompt=\"def f(n):\"'"
        return InputError("command line", _short(error.override), hint)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group == "hydra/launcher" and option in launchers.PLUGIN_OF:
            return InputError(group, option, launchers.install(launchers.PLUGIN_OF[option]))
        return InputError(group or "config", option, _suggest(option, [o for o in error.options or [] if o]))
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OmegaConfBaseException):
        return _from_omegaconf(cause)
    text = str(error)
    if "Multiple values for" in text:
        return InputError("command line", _short(text.splitlines()[0]), "one value a group, without a leading +")
    if "looks like a config group override" in text or "Could not override" in text:
        key = text.split("'")[1] if "'" in text else text
        return InputError(key, UNKNOWN, _suggest(key, groups()))
    if "Ambiguous value" in text or "requires --multirun" in text:
        typed = text.split("'")[1] if "'" in text else text
        return InputError("command line", _short(typed), "one value, or -m for a sweep; a list goes in [ ]")
    return InputError("command line", _short(text or "an override without a key"), "see python -m xlpk.run --help")


def _from_omegaconf(error: OmegaConfBaseException) -> InputError:
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
    return InputError(key, _short(error.value) if error.value is not None else UNKNOWN, _short(message))


def _suggest(typed: str, known: list[str]) -> str:
    close = difflib.get_close_matches(typed, known, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}one of {', '.join(sorted(known))}"


# The last three: Hydra on a list or a number where a group's option belongs, and on an override without a key.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, TypeError, AssertionError, AttributeError)
