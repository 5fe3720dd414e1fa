"""PyCUDA's SourceModule over our content-hash cache: a miss compiles with nvcc, a hit loads the cubin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pycuda.compiler import SourceModule
from pycuda.driver import module_from_buffer

from xlpk.toolchain import Build, build_cubin


class CachedSourceModule(SourceModule):  # type: ignore[misc]
    """`kernels/<source>` with a model's dimensions as constants, loaded into the current context.

    PyCUDA's own cache runs the preprocessor each time (285 ms) and looks for the toolkit; ours hashes the sources, so
    a machine with a cached cubin needs no nvcc. `get_function`, `get_global` are SourceModule's.
    """

    def __init__(self, source: str, cache: Path, *, arch: str, defines: Mapping[str, str]) -> None:
        self.build: Build = build_cubin(source, cache, arch=arch, defines=defines)
        self.cubin = self.build.path.read_bytes()
        self.module = module_from_buffer(self.cubin)
        self._bind_module()
