"""Nodes of the config that no other module owns, and `Settings`: a composed, checked config as typed objects.

Plain data without Hydra, so that the engine, tracking and reports can take it; `config.py` composes and validates.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from xlpk.generation import GenerationConfig
from xlpk.kv import KV
from xlpk.speculation import Acceptance, Proposer
from xlpk.workload import Prompts, Sampling, Synthetic

MODES = ("serial_decode", "speculative_decode", "forced_rejection")
ORCHESTRATIONS = ("persistent", "launched")


@dataclass
class CpuBackend:
    """The loop on the host's cores (`backend=cpu`)."""

    name: str = "cpu"
    threads: int = 0  # 0: the cores that this process may use
    orchestration: str = "persistent"  # persistent | launched


@dataclass
class PersistentBackend:
    """One resident kernel on a GPU (`backend=persistent`). Times: 0 means never."""

    name: str = "persistent"
    device: int = 0  # ordinal of the GPU
    lease_ms: float = 1000.0  # a launch leaves after this long, its state kept, and is launched again
    idle_ms: float = 500.0  # it leaves after this long without work, until there is some
    heartbeat_ms: float = 1000.0  # it leaves when the host gave no sign of life for this long

    @property
    def orchestration(self) -> str:
        return self.name


@dataclass
class LaunchedBackend:
    """One kernel a phase on a GPU, launched by the host (`backend=launched`)."""

    name: str = "launched"
    device: int = 0  # ordinal of the GPU
    sync: str = "step"  # step | phase: how often the host waits

    @property
    def orchestration(self) -> str:
        return self.name


@dataclass
class GraphBackend:
    """The launches of a step as one CUDA graph (`backend=graph`)."""

    name: str = "graph"
    device: int = 0  # ordinal of the GPU

    @property
    def orchestration(self) -> str:
        return self.name


@dataclass
class AutoBackend:
    """`persistent` if there is a usable GPU, else `cpu` (`backend=auto`); the run says which, and why."""

    name: str = "auto"

    @property
    def orchestration(self) -> str:
        return self.name


AnyBackend = CpuBackend | PersistentBackend | LaunchedBackend | GraphBackend | AutoBackend


@dataclass
class Mode:
    """What a run demonstrates; its file in conf/mode sets values of other groups."""

    name: str = "speculative_decode"


@dataclass
class ModelChoice:
    """Which model (`model` group)."""

    name: str = "tiny"
    path: str | None = None  # a folder in the Hugging Face layout
    dtype: str = "auto"  # auto | bf16 | fp16 | fp32
    max_len: int | None = None  # tokens of a sequence at most; null: the model's positions
    seed: int = 0  # of hash weights
    # auto: sampling values that are null come from the folder's generation_config.json; none: from xlpk.
    # End-of-sequence ids come from the file either way.
    generation_config: str = "auto"


@dataclass
class Scheduler:
    """Limits of a step (`scheduler` group)."""

    max_num_seqs: int = 16  # requests that run at once
    max_step_rows: int = 64  # rows of a step
    prefill_chunk: int = 32  # prompt tokens of one request in one step


@dataclass
class MlflowTracking:
    """A mirror of each run in MLflow (`tracking=mlflow`)."""

    name: str = "mlflow"
    uri: str | None = None  # null: MLFLOW_TRACKING_URI, else OUTPUTS/mlflow.db
    experiment: str = "xlpk"
    timeout_s: float = 20.0  # the most that a run waits for the server


@dataclass
class NoTracking:
    """Local files only (`tracking=none`)."""

    name: str = "none"


@dataclass
class Run:
    """How a run behaves (`run` group)."""

    json: bool = False  # the last line of stdout is one JSON object, the metrics
    outputs: str = "outputs"  # nothing is written outside this folder
    warmup_steps: int = 8  # output tokens of an untimed request before the measurement; 0: none
    deadline_s: float = 900.0  # a sweep's point on a GPU, a process of its own, is ended after this long


@dataclass(frozen=True)
class Settings:
    """A checked config. `spec` is what runs; what was asked for stands in `requested_*` and in `resolved`."""

    mode: str
    backend: AnyBackend
    spec: Proposer
    acceptance: Acceptance
    kv: KV
    model: ModelChoice
    workload: Prompts | Synthetic
    sampling: Sampling
    scheduler: Scheduler
    tracking: MlflowTracking | NoTracking
    run: Run
    requested_block: int
    notes: tuple[str, ...] = ()  # one line each: where a request was answered by something else
    resolved: dict[str, Any] = field(default_factory=dict)  # the whole config, interpolations resolved

    @property
    def lossless(self) -> bool:
        return self.acceptance.lossless(self.sampling.values().temperature)

    def for_model(self, generation: GenerationConfig) -> Settings:
        """With the sampling values that the config leaves to the model, and a note that names them."""
        if self.model.generation_config == "none":
            return self
        sampling, note = self.sampling.filled(generation)
        return replace(self, sampling=sampling, notes=(*self.notes, note) if note else self.notes)
