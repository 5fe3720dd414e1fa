"""The schema in Hydra's ConfigStore: the classes of each group, and the options that conf/ has for it."""

from __future__ import annotations

import secrets
from dataclasses import MISSING, dataclass, field, fields
from importlib import resources
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from xlpk import launchers
from xlpk.hardware import Hardware
from xlpk.kv import KV
from xlpk.settings import (
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
    SimulatedBackend,
)
from xlpk.slo import Slo
from xlpk.speculation import Forced, Greedy, Keyed, Ngram, NoSpec, Oracle
from xlpk.workload import WORKLOADS, Sampling

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
