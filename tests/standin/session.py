"""Tests whose bodies run in processes of their own on the stand-in driver: an error may stick to its process."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache as memoize
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cubins import record

from xlpk.toolchain import NVCC_FLAGS, Build, find_nvcc, kernels_folder, parse_ptxas

from .hook import CACHE, environment
from .library import Kernels

SOURCE = Path(__file__).parent / "echo.cu"
THREADS = 64  # the launch bounds of its kernels
BODIES: dict[str, Callable[[], None]] = {}
KEPT: list[Any] = []  # what must not be freed before the process ends: it would wait for a kernel that does not


def build_echo() -> Build:
    """The cubin of echo.cu."""
    flags = [*NVCC_FLAGS, "-arch=sm_90a", f"-I{kernels_folder()}"]
    text = SOURCE.read_bytes() + b"".join(path.read_bytes() for path in sorted(kernels_folder().rglob("*.h")))
    target = CACHE / "standin" / f"echo-{hashlib.sha256(text).hexdigest()[:20]}.cubin"
    report = target.with_suffix(".ptxas")
    if not report.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [find_nvcc() or "nvcc", *flags, str(SOURCE), "-o", str(target)]
        report.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
    record(SOURCE.name, CACHE, arch="sm_90a", defines={})
    return Build(target, "nvcc", "", 0.0, True, parse_ptxas(report.read_text()))


@memoize
def child_environment() -> dict[str, str]:
    """Of a process on the stand-in, with the cubin's path in ECHO_CUBIN. Skips where it cannot be."""
    if find_nvcc() is None:
        pytest.skip("there is no nvcc: docs/cuda.md")
    if importlib.util.find_spec("pycuda") is None:
        pytest.skip("PyCUDA is not installed: python tests/standin/build_pycuda.py")
    echo = build_echo()
    Kernels(CACHE).add(echo, SOURCE.name, {})
    return environment() | {"ECHO_CUBIN": str(echo.path), "CUDA_MODULE_LOADING": "EAGER"}


def on_standin(**settings: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """The body as a test: run in a child on the stand-in, with XLPK_STANDIN_<NAME> (or CUDA_<NAME>) from `settings`.

    The file of the test ends with `if __name__ == "__main__": run_body()`.
    """
    named = {name if name.startswith("CUDA_") else f"XLPK_STANDIN_{name}": value for name, value in settings.items()}

    def decorate(body: Callable[[], None]) -> Callable[[], None]:
        BODIES[body.__name__] = body

        def test() -> None:
            command = [sys.executable, body.__code__.co_filename, body.__name__]
            own = child_environment() | named
            done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stdout + done.stderr

        test.__doc__ = body.__doc__
        return test

    return decorate


def run_body() -> None:
    """In the child: the body that is named on the command line. Ends the process, and with it what still runs."""
    BODIES[sys.argv[1]]()
    os._exit(0)


class Session:
    """A context, a non-blocking stream and the kernels of echo.cu. Kept until the process ends."""

    def __init__(self) -> None:
        import pycuda.driver as cuda

        cuda.init()
        self.cuda = cuda
        self.context = cuda.Device(0).make_context()
        self.cubin = Path(os.environ["ECHO_CUBIN"]).read_bytes()
        self.module = cuda.module_from_buffer(self.cubin)
        self.stream = cuda.Stream(1)
        KEPT.append(self)

    def launch(self, name: str, *arguments: Any, blocks: int = 1, shared: int = 0, stream: Any = None) -> None:
        function = self.module.get_function(name)
        if shared > 48 << 10:
            function.set_attribute(self.cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        function(*arguments, grid=(blocks, 1), block=(THREADS, 1, 1), shared=shared, stream=stream or self.stream)

    def mapped(self, n: int) -> tuple[np.ndarray[Any, Any], np.uint64]:
        """[n] uint32 zeros in mapped page-locked memory, and their device address."""
        flags = self.cuda.host_alloc_flags
        words = self.cuda.pagelocked_zeros(n, np.uint32, mem_flags=flags.DEVICEMAP | flags.PORTABLE)
        KEPT.append(words)
        return words, np.uint64(words.base.get_device_pointer())

    def resident_echo(self) -> np.ndarray[Any, Any]:
        """Launches an echo that has begun when this returns and ends when words[0] becomes 2."""
        words, address = self.mapped(2)
        self.launch("echo", address, np.uint32(2))
        words[0] = 1
        wait_until(lambda: bool(words[1] == 1))
        return words

    def census(self, blocks: int, shared: int = 0) -> int:
        """How many of `blocks` blocks were seen at once."""
        words = self.cuda.mem_alloc(16)
        self.cuda.memset_d8_async(int(words), 0, 16, self.stream)
        self.launch("census", words, blocks=blocks, shared=shared)
        seen = np.zeros(2, np.uint64)
        self.stream.synchronize()
        self.cuda.memcpy_dtoh(seen, words)
        return int(seen[1])


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it never came"


def refused(error: type[Exception], words: str) -> Any:
    return pytest.raises(error, match=words)
