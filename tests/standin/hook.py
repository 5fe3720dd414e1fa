"""Puts a process on the stand-in driver.

A new process: start it with `environment(cache)`; its children inherit it. The running one, before it imports PyCUDA:
`install(cache)`. From a shell: `python tests/standin/run.py -m xlpk.run backend=persistent ...`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

# .library imports xlpk.toolchain, whose import calls `hook`: so it is imported where it is used.

CACHE = Path(__file__).parents[2] / "outputs" / "cache"
_ELF_PADDING = slice(9, 16)  # of e_ident, from EI_PAD on


def environment(cache: Path = CACHE, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables with which a Python process finds the stand-in as its libcuda and builds its kernels for the CPU."""
    from .library import Kernels, libcuda

    site, tests = Path(__file__).parent / "site", Path(__file__).parents[1]

    def before(name: str, *folders: Path) -> str:
        return os.pathsep.join([*map(str, folders), *filter(None, [base.get(name, "")])])

    return {
        **base,
        "LD_LIBRARY_PATH": before("LD_LIBRARY_PATH", libcuda(cache)),
        "PYTHONPATH": before("PYTHONPATH", site, tests),
        "XLPK_STANDIN_KERNELS": str(Kernels(cache).folder),
    }


def hook(toolchain: Any) -> None:
    """From now on `toolchain.build_cubin` makes the CPU build of its kernels as well.

    nvcc compiles a source once for all models: a model's cubin is a copy of the carrier, told from others by the bytes
    of an ELF header that mean nothing.
    """
    build_cubin = toolchain.build_cubin

    @functools.wraps(build_cubin)
    def build_both(source: str, cache: Path, *, arch: str, defines: Mapping[str, str]) -> Any:
        from cubins import CARRIERS, record

        from .library import Kernels

        carrier = CARRIERS.get(source)
        if carrier is None:
            record(source, cache, arch=arch, defines=defines)
            cubin = build_cubin(source, cache, arch=arch, defines=defines)
        else:
            record(source, cache, arch=carrier.arch, defines=carrier.defines)
            built = build_cubin(source, cache, arch=carrier.arch, defines=carrier.defines)
            cubin = replace(built, path=_named(built.path, cache / "standin" / "carried", defines))
        Kernels(Path(os.environ["XLPK_STANDIN_KERNELS"]).parents[1]).add(cubin, source, defines)
        return cubin

    for module in list(sys.modules.values()):
        if getattr(module, "build_cubin", None) is build_cubin:
            module.build_cubin = build_both  # type: ignore[attr-defined]


def _named(carrier: Path, folder: Path, defines: Mapping[str, str]) -> Path:
    """A copy of a cubin that no other definitions have."""
    name = hashlib.sha256(repr(sorted(defines.items())).encode()).digest()[:7]
    image = bytearray(carrier.read_bytes())
    image[_ELF_PADDING] = name
    path = folder / f"{carrier.stem}-{name.hex()}.cubin"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(image)
    unfinished.replace(path)
    return path


def install(cache: Path = CACHE) -> None:
    """Puts the running process on the stand-in; PyCUDA, not yet imported, will find it as its libcuda."""
    assert "pycuda.driver" not in sys.modules
    from xlpk import toolchain

    from .library import Kernels, libcuda

    os.environ["XLPK_STANDIN_KERNELS"] = str(Kernels(cache).folder)
    ctypes.CDLL(str(libcuda(cache) / "libcuda.so.1"))  # whoever asks for libcuda.so.1 from now on gets this one
    hook(toolchain)
