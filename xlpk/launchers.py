"""What Hydra's launchers need: the extras that bring them, and how many points fit on this machine's cores."""

from __future__ import annotations

import importlib.util
import os

from xlpk.errors import InputError

EXTRAS = {  # module of a launcher's plugin -> the extra that installs it
    "hydra_plugins.hydra_joblib_launcher": "joblib",
    "hydra_plugins.hydra_submitit_launcher": "submitit",
    "hydra_plugins.hydra_ray_launcher": "ray",
}
PLUGIN_OF = {  # options that a plugin adds -> the extra
    "joblib": "joblib",
    "submitit_local": "submitit",
    "submitit_slurm": "submitit",
    "ray": "ray",
    "ray_aws": "ray",
}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(threads: int) -> int:
    """Cores that a point takes; 0 threads mean all."""
    return min(threads, cores()) or cores()


def jobs_of(threads: int) -> int:
    """Points that run at once without sharing a core."""
    return max(1, cores() // threads_of(threads))


def install(extra: str) -> str:
    return f"it is not installed: python -m pip install 'xlpk[{extra}]', or -e '.[{extra}]' in a checkout"


def check(target: str) -> None:
    """Refuses a launcher whose plugin is not installed; `target` is its class."""
    module = ".".join(target.split(".")[:2])
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # not even the namespace
        found = None
    if found is None:
        name = EXTRAS.get(module, "")
        raise InputError("hydra/launcher", name or target, install(name) if name else "a launcher that is installed")
