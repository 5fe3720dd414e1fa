"""Builds the stand-in driver, and beside each cubin the CPU build of its kernels.

`libcuda(cache)` is a folder to put on LD_LIBRARY_PATH; `Kernels(cache)` makes the builds that a launch runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from xlpk import layout
from xlpk.toolchain import Build, build_shared

from .toolkit import driver_symbols, toolkit_root

SOURCES = Path(__file__).parent / "driver"
FLAGS = ("-std=c++17", "-O2", "-g", "-fPIC", "-pthread", "-Wall", "-Wextra", "-fvisibility=default")
COUNTERS = (
    "launches",
    "graph_launches",
    "graph_kernels",
    "syncs",
    "waits",
    "h2d_copies",
    "d2h_copies",
    "h2d_bytes",
    "d2h_bytes",
    "allocations",
    "frees",
    "module_loads",
    "resident_allocations",
    "resident_frees",
    "resident_module_loads",
    "resident_default_stream",
)


def counters() -> dict[str, int]:
    """What was really called in this process, which runs on the stand-in; fields as in driver/standin.h."""
    library = ctypes.CDLL("libcuda.so.1")
    words = (ctypes.c_uint64 * len(COUNTERS)).in_dll(library, "xlpk_standin_counters")
    return dict(zip(COUNTERS, words, strict=True))


def _error_cases(include: Path) -> str:
    """Names and words of all CUresult codes, from cuda.h."""
    enum = re.search(r"typedef enum cudaError_enum \{(.*?)\} CUresult;", (include / "cuda.h").read_text(), re.DOTALL)
    assert enum is not None
    names = re.findall(r"^\s+(CUDA_\w+)\s*=", enum[1], re.MULTILINE)
    return "\n".join(
        f'STANDIN_ERROR({name}, "{name.removeprefix("CUDA_").removeprefix("ERROR_").replace("_", " ").lower()}")'
        for name in names
    )


def libcuda(cache: Path) -> Path:
    """The folder of libcuda.so.1, built if the cache lacks it: every symbol of cuda.h, most of them stubs."""
    root = toolkit_root()
    include = root / "include"
    sources = sorted(SOURCES.iterdir())
    text = "\0".join(path.read_text() for path in (*sources, Path(__file__), include / "cuda.h"))
    folder = cache / "standin" / hashlib.sha256(text.encode()).hexdigest()[:20]
    if (folder / "libcuda.so.1").exists():
        return folder
    work = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    work.mkdir(parents=True)
    try:
        (work / "errors.inc").write_text(_error_cases(include))
        compiled = [path for path in sources if path.suffix == ".cpp"]
        compile_ = ["g++", *FLAGS, f"-I{include}", f"-I{work}", "-c", *map(str, compiled)]
        subprocess.run(compile_, cwd=work, check=True)
        objects = [f"{path.stem}.o" for path in compiled]
        nm = ["nm", "--defined-only", *objects]
        defined = subprocess.run(nm, cwd=work, capture_output=True, text=True, check=True).stdout
        ours = set(re.findall(r" T (cu\w+)$", defined, re.MULTILINE))
        stubs = [name for name in driver_symbols(include) if name not in ours]
        (work / "stubs.cpp").write_text(
            "".join(f'extern "C" int {name}() {{ return 801; }}  // CUDA_ERROR_NOT_SUPPORTED\n' for name in stubs)
        )
        shared = ["-shared", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1"]
        subprocess.run(["g++", *FLAGS, *objects, "stubs.cpp", "-ldl", *shared], cwd=work, check=True)
        folder.mkdir(exist_ok=True)
        (work / "libcuda.so.1").replace(folder / "libcuda.so.1")
    finally:
        shutil.rmtree(work)
    return folder


def _pointers(record: layout.Record) -> str:
    fields = record.dtype.fields or {}
    return ",".join(str(fields[name][1]) for name, kind, _ in record.fields if kind.endswith("*"))


class Kernels:
    """The CPU builds of cubins, in a folder that XLPK_STANDIN_KERNELS names: NAME.cubin and NAME.so."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.folder = cache / "standin" / "kernels"
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, cubin: Build, source: str, defines: Mapping[str, str]) -> Path:
        """Builds the kernels of `cubin`, nvcc's of `source` with `defines`, for the CPU; the shared library."""
        entries = "".join(f"entry({kernel.name})" for kernel in cubin.kernels)
        flags = [f"-D{key}={value}" for key, value in sorted(defines.items())]
        pointers = {"XL_PARAMS_POINTERS": layout.PARAMS, "XL_LAYER_POINTERS": layout.LAYER_WEIGHTS}
        flags += [f"-DXL_CUBIN={cubin.path.stem}", f'-DXL_SOURCE="{source}"', f"-DXL_KERNELS(entry)={entries}"]
        flags += [f"-D{name}={_pointers(record)}" for name, record in pointers.items()]
        here = Path(__file__).parent
        build = build_shared(here / "kernels.cpp", self.cache, extra_flags=["-DXL_NO_AMX", *flags, f"-I{here}"])
        for target, suffix in ((cubin.path, ".cubin"), (build.path, ".so")):
            link = self.folder / (cubin.path.stem + suffix)
            unfinished = link.with_name(f".{link.name}.{os.getpid()}")
            unfinished.symlink_to(target.resolve())
            unfinished.replace(link)
        return build.path
