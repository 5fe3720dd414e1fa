"""A run's settings as the config's defaults have them, for tests that call the engine."""

from __future__ import annotations

from typing import Any

from xlpk.kv import KV
from xlpk.settings import AnyBackend, ModelChoice, NoTracking, Run, Scheduler, Settings
from xlpk.speculation import Keyed, NoSpec, Proposer
from xlpk.workload import Prompts, Sampling


def run_settings(backend: AnyBackend, spec: Proposer | None = None, *, warmup_steps: int, **limits: Any) -> Settings:
    """`limits`: of the scheduler, where they are not its defaults."""
    spec = spec or NoSpec()
    return Settings(
        mode="serial_decode" if isinstance(spec, NoSpec) else "speculative_decode",
        backend=backend,
        spec=spec,
        acceptance=Keyed(),
        kv=KV(),
        model=ModelChoice(),
        workload=Prompts(),
        sampling=Sampling(),
        scheduler=Scheduler(**limits),
        tracking=NoTracking(),
        run=Run(warmup_steps=warmup_steps),
        requested_block=spec.block,
    )
