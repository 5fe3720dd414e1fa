"""Nodes of the config that no other module owns, and `Settings`: a composed, checked config as typed objects.

Plain data without Hydra, so that the engine, tracking and reports can take it; `config.py` composes and validates.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from xlpk import layout
from xlpk.dtypes import ELEMENT_BYTES
from xlpk.errors import InputError, shown
from xlpk.generation import GenerationConfig
from xlpk.hardware import Hardware
from xlpk.kv import KV
from xlpk.slo import Slo
from xlpk.speculation import Acceptance, Forced, Ngram, NoSpec, Proposer
from xlpk.workload import Sampling, Workload

MODES = ("serial_decode", "speculative_decode", "forced_rejection", "kv_pressure", "mega_kernel_sim", "quality")
ORCHESTRATIONS = ("persistent", "launched")
MAX_TRACE_SPANS = 1 << 26  # 1.5 GiB
WEIGHT_LAYOUTS = tuple(item.name.lower() for item in layout.WeightLayout)


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
    weight_layout: str = "rows"  # rows | tiles: how matrices lie in device memory; the same bits

    @property
    def orchestration(self) -> str:
        return self.name


@dataclass
class LaunchedBackend:
    """One kernel a phase on a GPU, launched by the host (`backend=launched`)."""

    name: str = "launched"
    device: int = 0  # ordinal of the GPU
    sync: str = "step"  # step | phase: how often the host waits
    weight_layout: str = "rows"  # rows | tiles

    @property
    def orchestration(self) -> str:
        return self.name


@dataclass
class GraphBackend:
    """The launches of a step as one CUDA graph (`backend=graph`)."""

    name: str = "graph"
    device: int = 0  # ordinal of the GPU
    weight_layout: str = "rows"  # rows | tiles

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


@dataclass
class HfBackend:
    """Hugging Face transformers, the peer (`backend=hf`): the same requests, sampler and event log."""

    name: str = "hf"
    device: str = "auto"  # auto (cuda if torch sees a GPU, else cpu) | cpu | cuda
    threads: int = 0  # of torch on the CPU; 0: the cores that this process may use
    dtype: str = "auto"  # auto (the checkpoint's) | bf16 | fp16 | fp32: of weights, activations, K and V
    cache: str = "dynamic"  # dynamic: grows by concatenation | static: of fixed size, one request at a time
    compile: bool = False  # torch.compile of the decode step (CUDA graphs on a GPU); wants the static cache

    @property
    def orchestration(self) -> str:
        return "transformers"

    def check(self, spec: Proposer, acceptance: Acceptance) -> None:
        """What transformers has no equal of. Raises InputError."""
        for key, value, allowed in (
            ("device", self.device, ("auto", "cpu", "cuda")),
            ("dtype", self.dtype, ("auto", *ELEMENT_BYTES)),
            ("cache", self.cache, ("dynamic", "static")),
        ):
            if value not in allowed:
                raise InputError(f"backend.{key}", shown(value), f"one of {', '.join(allowed)}")
        if not 0 <= self.threads <= 1024:
            raise InputError("backend.threads", self.threads, "0 to 1024")
        if self.compile and self.cache != "static":
            raise InputError(
                "backend.compile", "true", "false with backend.cache=dynamic, whose shapes change each step"
            )
        if isinstance(spec, NoSpec):
            return
        if not isinstance(spec, Ngram):
            raise InputError("spec", spec.name, "ngram (prompt lookup) or none with backend=hf")
        if spec.min_n != 1:
            raise InputError("spec.min_n", spec.min_n, "1 with backend=hf: transformers' prompt lookup goes down to 1")
        if self.cache == "static":
            why = "transformers drafts with backend.cache=dynamic only"
            raise InputError("backend.cache", "static", f"mode=serial_decode, which drafts nothing: {why}")
        if isinstance(acceptance, Forced):
            raise InputError("acceptance", acceptance.name, "keyed with backend=hf")

    def note(self, spec: Proposer) -> str:
        """How it serves several requests, where that is not as one batch; else empty."""
        if self.cache == "dynamic" and isinstance(spec, NoSpec):
            return ""
        what = "backend.cache=static" if self.cache == "static" else f"spec={spec.name}"
        return f"backend=hf with {what} serves one request at a time, as transformers does"


@dataclass
class SimulatedBackend:
    """The control plane on a virtual clock (`backend=simulated`): nothing is computed, answers are synthetic."""

    name: str = "simulated"
    orchestration: str = "persistent"  # persistent | launched | graph: what drives the steps
    control: str = "python"  # python | compiled: who runs the control plane
    prefill_workers: int = 0  # loops that give first tokens; 0, with decode_workers=0: one loop does both
    decode_workers: int = 0  # loops that go on with them once their K and V have moved over the link
    costs: str | None = None  # a file of `xlpk calibrate`; null: calculated from the `hardware` group
    outcomes: str | None = None  # the folder of a run that had the same requests: its answers; null: synthetic ones
    acceptance_rate: float | None = None  # each draft holds with this probability; null: if it is the answer's token
    hit_rate: float = 1.0  # with acceptance_rate: the share of verifications for which there are drafts
    lease_ms: float = 1000.0  # of persistent: a launch leaves after this long; 0: never

    @property
    def answers(self) -> str:
        """Where output tokens come from."""
        return "synthetic" if self.outcomes is None else f"recorded by {self.outcomes}"

    def check(self, spec: Proposer, kv: KV, sampling: Sampling, measures: bool) -> None:
        """What has no meaning without a model's arithmetic. Raises InputError."""
        for name, value, allowed in (
            ("orchestration", self.orchestration, ("persistent", "launched", "graph")),
            ("control", self.control, ("python", "compiled")),
        ):
            if value not in allowed:
                raise InputError(f"backend.{name}", shown(value), f"one of {', '.join(allowed)}")
        for name in ("prefill_workers", "decode_workers"):
            if not 0 <= getattr(self, name) <= 1024:
                raise InputError(f"backend.{name}", getattr(self, name), "0 to 1024")
        if (self.prefill_workers > 0) != (self.decode_workers > 0):
            name = "decode_workers" if self.prefill_workers else "prefill_workers"
            raise InputError(f"backend.{name}", 0, "at least 1 where the other kind has some, or both 0: one loop")
        if self.decode_workers and kv.preemption == "swap":
            raise InputError("kv.preemption", "swap", "recompute with backend.decode_workers")
        if self.prefill_workers > 1 and kv.pinned is not None:
            why = "null with several backend.prefill_workers, each of which has pages of its own"
            raise InputError("kv.pinned", shown(str(kv.pinned)), why)
        for name in ("acceptance_rate", "hit_rate"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:  # nan compares false
                raise InputError(f"backend.{name}", share, "0 to 1")
        if self.hit_rate != 1 and self.acceptance_rate is None:
            raise InputError("backend.hit_rate", self.hit_rate, "1 without backend.acceptance_rate")
        if self.acceptance_rate is not None and (isinstance(spec, NoSpec) or self.outcomes is not None):
            why = (
                "drafts: spec=ngram or oracle" if self.outcomes is None else "backend.outcomes=null: a run has its own"
            )
            raise InputError("backend.acceptance_rate", self.acceptance_rate, f"null, or {why}")
        if not (self.lease_ms == 0 or 1 <= self.lease_ms <= 86_400_000):
            raise InputError("backend.lease_ms", self.lease_ms, "0 (never) or 1 to 86400000 ms")
        if measures:
            raise InputError("quality.measure", "true", "false with backend=simulated, which computes nothing")
        if sampling.logprobs is not None:
            raise InputError("sampling.logprobs", sampling.logprobs, "null with backend=simulated, which has no logits")


AnyBackend = (
    CpuBackend | PersistentBackend | LaunchedBackend | GraphBackend | AutoBackend | HfBackend | SimulatedBackend
)


@dataclass
class Quality:
    """How far a backend's next-token distributions are from a float32 reference's (`quality` group)."""

    measure: bool = False  # before the workload, untimed, in a session of its own; mode=quality sets it
    file: str | None = None  # a text in UTF-8; null: the held-out text that ships with the tiny model
    tokens: int | None = 2048  # tokens that are scored at most; null: all of the text
    window: int = 512  # tokens of a sequence, which sees nothing of the text before it
    stride: int | None = None  # tokens that a sequence scores, its last ones; null: half of the window
    reference: str = "numpy"  # numpy | transformers: whose float32 arithmetic

    def check(self) -> None:
        """What needs no model. Raises InputError."""
        if self.tokens is not None and not 1 <= self.tokens <= 10_000_000:
            raise InputError("quality.tokens", self.tokens, "1 to 10000000, or null")
        if not 2 <= self.window <= 1 << 20:
            raise InputError("quality.window", self.window, f"2 to {1 << 20}")
        if self.stride is not None and not 1 <= self.stride <= self.window:
            raise InputError("quality.stride", self.stride, f"1 to quality.window={self.window}, or null")
        if self.reference not in ("numpy", "transformers"):
            raise InputError("quality.reference", shown(self.reference), "one of numpy, transformers")


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
    max_waiting: int = 256  # requests that the loop holds back; more wait at the host, which sees the ring full
    policy: str = "fcfs"  # who is admitted first: fcfs, priority (the lowest number) or shortest_prompt
    planner: str = "auto"  # who takes arrivals beside a step: team (one of its own), inline (nobody), auto
    ageing_steps: int = 64  # steps of waiting that are worth one level of priority, or 16 prompt tokens


@dataclass
class MlflowTracking:
    """A mirror of each run in MLflow (`tracking=mlflow`)."""

    name: str = "mlflow"
    uri: str | None = None  # null: MLFLOW_TRACKING_URI, else OUTPUTS/mlflow.db
    experiment: str = "xlpk"  # of MLflow; made if there is none
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
    repeat: int = 1  # how often each point is measured; the repeats of compared points are interleaved (A B A B)
    repetition: int = 0  # which of them a point is; set by run.repeat
    sweep: str | None = None  # a sweep's folder, OUTPUTS/sweeps/NAME; null: DATE/TIME-ID
    report: bool = True  # a sweep of moderate size ends with its report, as by `xlpk report`
    trace: bool = False  # keep phases, decisions and pages: a timeline for Perfetto, trace.json.gz
    trace_spans: int = 1 << 20  # phases that a trace keeps, the last ones of all teams together; 24 bytes each
    resume: bool = False  # a sweep goes on: that of run.sweep, else the last one of the same overrides


@dataclass(frozen=True)
class Settings:
    """A checked config. `spec` is what runs; what was asked for stands in `requested_*` and in `resolved`."""

    mode: str
    backend: AnyBackend
    spec: Proposer
    acceptance: Acceptance
    kv: KV
    model: ModelChoice
    workload: Workload
    sampling: Sampling
    scheduler: Scheduler
    tracking: MlflowTracking | NoTracking
    run: Run
    requested_block: int
    quality: Quality = field(default_factory=Quality)
    slo: Slo = field(default_factory=Slo)
    hardware: Hardware = field(default_factory=Hardware)
    hardware_named: bool = False  # it was chosen, so its peaks are those of the machine that a real run is on
    keep_logits: bool = False  # of prompts, by position: of a session that is not timed
    notes: tuple[str, ...] = ()  # one line each: where a request was answered by something else
    resolved: dict[str, Any] = field(default_factory=dict)  # the whole config, interpolations resolved

    def stored_dtype(self, checkpoint: str) -> str:
        """What weights of a checkpoint in that dtype are held in while they are used."""
        wanted = self.backend.dtype if isinstance(self.backend, HfBackend) else "auto"
        return checkpoint if wanted == "auto" else wanted

    @property
    def lossless(self) -> bool:
        return self.acceptance.lossless(self.sampling.values().temperature)

    def for_model(self, generation: GenerationConfig) -> Settings:
        """With the sampling values that the config leaves to the model, and a note that names them."""
        if self.model.generation_config == "none":
            return self
        sampling, note = self.sampling.filled(generation)
        return replace(self, sampling=sampling, notes=(*self.notes, note) if note else self.notes)
