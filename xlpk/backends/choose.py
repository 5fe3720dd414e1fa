"""The backend that a config names, made now; and what `backend=auto` comes to on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xlpk.backend import Backend
from xlpk.errors import ToolError
from xlpk.settings import (
    AnyBackend,
    AutoBackend,
    CpuBackend,
    GraphBackend,
    HfBackend,
    LaunchedBackend,
    PersistentBackend,
    SimulatedBackend,
)
from xlpk.toolchain import find_nvcc


def usable_gpu(cache: Path) -> str:
    """The name of the device that `backend=auto` would take. ToolError: there is none, and why."""
    from xlpk.backends.gpu_device import import_driver

    cuda = import_driver()
    if find_nvcc() is None and not any((cache / "build").glob("*.cubin")):
        raise ToolError("nvcc is not on PATH, and no kernels were compiled here before")
    return str(cuda.Device(0).name())


def resolve(backend: AnyBackend, cache: Path) -> tuple[AnyBackend, str]:
    """(`backend`, "") or, for auto, (what it comes to, one line that says so). ToolError: hf without its libraries."""
    if isinstance(backend, HfBackend):
        from xlpk.backends.hf_model import require

        require("backend=hf")
    if not isinstance(backend, AutoBackend):
        return backend, ""
    try:
        name = usable_gpu(cache)
    except ToolError as error:
        reason = str(error).removesuffix(", or use backend=cpu")
        return CpuBackend(), f"backend=auto takes cpu: {reason}"
    return PersistentBackend(), f"backend=auto takes persistent: {name}"


def make(backend: AnyBackend, **options: Any) -> Backend:
    """`options`: as of Submitter. ToolError in one line if the machine lacks something."""
    match backend:
        case CpuBackend():
            from xlpk.backends.cpu import CpuBackend as Cpu

            return Cpu(threads=backend.threads, orchestration=backend.orchestration, **options)
        case PersistentBackend():
            from xlpk.backends.persistent import PersistentBackend as Persistent

            times = {f"{name}_s": getattr(backend, f"{name}_ms") / 1e3 for name in ("lease", "idle", "heartbeat")}
            return Persistent(ordinal=backend.device, weight_layout=backend.weight_layout, **times, **options)
        case LaunchedBackend():
            from xlpk.backends.launched import LaunchedBackend as Launched

            options["weight_layout"] = backend.weight_layout
            return Launched(ordinal=backend.device, sync=backend.sync, **options)
        case GraphBackend():
            from xlpk.backends.graph import GraphBackend as Graph

            return Graph(ordinal=backend.device, weight_layout=backend.weight_layout, **options)
        case HfBackend():
            from xlpk.backends.hf import HfBackend as Hf

            return Hf(backend, **options)
        case SimulatedBackend():
            from xlpk.backends.simulated import SimulatedBackend as Simulated

            return Simulated(backend, **options)
        case _:
            return make(resolve(backend, options["cache"])[0], **options)
