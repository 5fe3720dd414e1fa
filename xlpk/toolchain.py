"""Builds the kernels: the CPU library with the host's C++ compiler, cubins with nvcc, in a content-hash cache.

A cache entry's name covers the kernels' text, the compiler and its version, the flags and the CPU's features, so a
stale one is never used. What a build took and what ptxas said comes back in a `Build`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.errors import ToolError

# Rule 3 of the design: equal bits need no contraction and no fast-math; FMA only where the source calls it.
CXX_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",  # g++ 12 on its own AVX-512 headers
    "-Wno-uninitialized",
)
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-cubin", "-Xptxas", "-v", "-lineinfo")


@dataclass(frozen=True)
class KernelResources:
    """What ptxas reports of one kernel."""

    name: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_bytes: int  # static; what a launch asks for comes on top


@dataclass(frozen=True)
class Build:
    """A compiled file and how it came about."""

    path: Path
    compiler: str  # command and version line
    flags: str
    seconds: float  # 0 when it was in the cache
    cached: bool
    kernels: tuple[KernelResources, ...] = field(default=())


def kernels_folder() -> Path:
    """Where the C++ sources are installed."""
    return Path(next(iter(importlib.import_module("xlpk.kernels").__path__)))


def find_cxx() -> str:
    """$CXX, g++, clang++ or the compiler of the ziglang wheel, in this order. ToolError if there is none."""
    wanted = os.environ.get("CXX")
    for command in [wanted] if wanted else ["g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]):
            return command
    if not wanted and importlib.util.find_spec("ziglang"):
        return shlex.join([sys.executable, "-m", "ziglang", "c++"])
    named = f"CXX={wanted} was not found" if wanted else "no C++ compiler was found (g++, clang++, ziglang)"
    how = "Debian: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install"
    raise ToolError(f"{named}: install one ({how}; anywhere: pip install 'xlpk[compiler]')")


def find_nvcc() -> str | None:
    """The CUDA compiler: on PATH, or of the wheels that the extra `nvcc` brings. None if there is none."""
    wheels = importlib.util.find_spec("nvidia")
    folders = [Path(root) for root in (wheels.submodule_search_locations or () if wheels else ())]
    of_wheels = (path for folder in folders for path in sorted(folder.glob("cu*/bin/nvcc")))
    return shutil.which("nvcc") or next(map(str, of_wheels), None)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def version_line(command: str) -> str:
    """The release that a compiler says it is."""
    lines = [line for line in _run([*shlex.split(command), "--version"]).stdout.splitlines() if line.strip()]
    release = next((line for line in lines if "release" in line), lines[0] if lines else "unknown version")
    return release.strip()


def _cpu_features() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    match = re.search(r"^(flags|Features)\s*:.*$", text, re.MULTILINE)
    return match[0] if match else platform.machine()


def amx_flags() -> tuple[str, ...]:
    """What keeps AMX out of a build for this machine: nothing where Linux grants this process its tile registers.

    Compilers look at the processor alone; the kernel may still refuse (ARCH_REQ_XCOMP_PERM, Linux 5.16).
    """
    if platform.machine() != "x86_64":
        return ()
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    granted = sys.platform == "linux" and ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0
    return () if granted else ("-DXL_NO_AMX",)


def _content_hash(folder: Path, *facts: str) -> str:
    digest = hashlib.sha256("\0".join(facts).encode())
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".h", ".cpp", ".cu"}:
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def _compile(command: Sequence[str], target: Path) -> tuple[str, float]:
    """Runs a compiler that writes `target` by its last two arguments `-o PATH`; atomic. (its messages, seconds)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    begin = time.perf_counter()
    try:
        done = _run([*command, "-o", str(unfinished)])
    except BaseException:  # interrupted
        unfinished.unlink(missing_ok=True)
        raise
    seconds = time.perf_counter() - begin
    if done.returncode != 0:
        unfinished.unlink(missing_ok=True)
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:])
        raise ToolError(f"{command[0]} failed (exit {done.returncode}): {first}")
    unfinished.replace(target)
    return done.stderr, seconds


def build_cpu_library(cache: Path, *, extra_flags: Sequence[str] = (), folder: Path | None = None) -> Build:
    """The shared library of `kernels/cpu.cpp`, built if the cache lacks it.

    Args:
        cache: folder of finished builds.
        extra_flags: appended to CXX_FLAGS, for instance `-DXL_RACE -fsanitize=thread`.
        folder: another copy of the kernels (tests of planted faults).
    """
    kernels = folder or kernels_folder()
    return build_shared(kernels / "cpu.cpp", cache, extra_flags=extra_flags, folder=kernels)


def build_shared(source: Path, cache: Path, *, extra_flags: Sequence[str] = (), folder: Path | None = None) -> Build:
    """A shared library of one C++ file that includes the kernels' headers; arguments as of `build_cpu_library`."""
    kernels = folder or kernels_folder()
    cxx = find_cxx()
    version = version_line(cxx)
    flags = [*CXX_FLAGS, *(flag for flag in amx_flags() if flag not in extra_flags), *extra_flags]
    content = _content_hash(kernels, cxx, version, " ".join(flags), _cpu_features(), source.name, source.read_text())
    target = cache / "build" / f"libxlpk-{source.stem}-{content}.so"
    compiler = f"{cxx} ({version})"
    if target.exists():
        return Build(target, compiler, " ".join(flags), 0.0, True)
    _, seconds = _compile([*shlex.split(cxx), *flags, f"-I{kernels}", str(source)], target)
    return Build(target, compiler, " ".join(flags), seconds, False)


def parse_ptxas(text: str) -> tuple[KernelResources, ...]:
    """Registers, stack, spills and static shared memory of each kernel from `ptxas -v`."""
    found = []
    for block in re.split(r"Compiling entry function ", text)[1:]:
        name = re.match(r"'([^']+)'", block)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        registers = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)  # not said of a kernel that has none
        if name and frame and registers:
            stack, stores, loads = map(int, frame.groups())
            static = int(shared[1]) if shared else 0
            found.append(KernelResources(name[1], int(registers[1]), stores, loads, stack, static))
    return tuple(found)


def dims_defines(dims: np.ndarray[Any, Any], weight: str, cache: str, weight_layout: str = "rows") -> dict[str, str]:
    """A Dims record, storage types (bf16, fp16, fp32) and the layout of weights as -D definitions of `ModelDims`."""
    types = {"bf16": "bf16", "fp16": "f16", "fp32": "float"}
    defines = {"XL_WEIGHT_TYPE": types[weight], "XL_CACHE_TYPE": types[cache]}
    defines["XL_WEIGHT_LAYOUT"] = str(int(layout.WeightLayout[weight_layout.upper()]))
    for name in dims.dtype.names or ():
        value = dims[name].item()
        defines[f"XL_{name.upper()}"] = f"{value!r}f" if isinstance(value, float) else str(value)
    return defines


def build_cubin(source: str, cache: Path, *, arch: str, defines: Mapping[str, str]) -> Build:
    """A cubin of `kernels/<source>` with the model's dimensions as compile-time constants.

    Without nvcc one that another compiler made of the same sources and flags will do; ToolError if there is none.
    """
    nvcc = find_nvcc()
    folder = kernels_folder()
    flags = [*NVCC_FLAGS, f"-arch={arch}", *[f"-D{key}={value}" for key, value in sorted(defines.items())]]
    stem = f"{Path(source).stem}-{_content_hash(folder, source, ' '.join(flags))}"
    if nvcc is None:
        for target in sorted((cache / "build").glob(f"{stem}-*.cubin")):
            report = target.with_suffix(".ptxas")
            if report.exists():
                return Build(target, "cached", " ".join(flags), 0.0, True, parse_ptxas(report.read_text()))
        raise ToolError("nvcc was not found: put the bin folder of a CUDA toolkit on PATH, or pip install 'xlpk[nvcc]'")
    version = version_line(nvcc)
    compiler = f"{nvcc} ({version})"
    target = cache / "build" / f"{stem}-{hashlib.sha256(version.encode()).hexdigest()[:8]}.cubin"
    report = target.with_suffix(".ptxas")
    if target.exists() and report.exists():
        return Build(target, compiler, " ".join(flags), 0.0, True, parse_ptxas(report.read_text()))
    messages, seconds = _compile([nvcc, *flags, f"-I{folder}", str(folder / source)], target)
    report.write_text(messages)
    return Build(target, compiler, " ".join(flags), seconds, False, parse_ptxas(messages))
