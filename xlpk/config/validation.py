"""`validate`: everything that can be refused without a model, and the Settings of what cannot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from xlpk import layout
from xlpk.config.refusals import from_omegaconf, short
from xlpk.config.schema import GROUPS, WHOLE, Config, groups, node_name
from xlpk.dtypes import ELEMENT_BYTES, KV_DTYPES
from xlpk.errors import InputError
from xlpk.kv import EVICTIONS, PREEMPTIONS
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
    PersistentBackend,
    Settings,
    SimulatedBackend,
)
from xlpk.speculation import Forced, Ngram, NoSpec, Oracle
from xlpk.workload import check_sampling, is_text

MAX_NGRAM = 8  # tokens
PLANNERS = ("auto", "team", "inline")


def validate(cfg: DictConfig) -> Settings:
    """Everything that can be refused without a model. Raises InputError naming field, value and what is allowed."""
    try:
        config = OmegaConf.to_object(cfg)
        resolved = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise from_omegaconf(error) from None
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
            raise InputError(name, short(getattr(config, name)), f"an option or keys: {name}.KEY=VALUE")
    for group, nodes in GROUPS.items():
        node: Any = getattr(config, group)
        if type(node) not in nodes:
            raise InputError(group, short(node), f"one of {', '.join(map(node_name, nodes))}")
        _one_of(f"{group}.name", node.name, [node_name(type(node))])
        for extra in set(vars(node)) - {item.name for item in fields(type(node))}:
            raise InputError(f"{group}.{extra}", short(vars(node)[extra]), f"no such key of {group}={node.name}")
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
        raise InputError(name, short(value), f"one of {', '.join(allowed)}")
