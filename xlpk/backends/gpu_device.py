"""One GPU through PyCUDA: its context, its stream, and the calls that a backend makes of it, counted where made.

Imports PyCUDA when a device is opened, never before. Everything is allocated here before the loop starts and freed
here, in order, after it has stopped; in between a guard refuses allocations, which would wait for the resident kernel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from xlpk.backend import BackendReport
from xlpk.backends import driver
from xlpk.errors import BackendError, HangError, InputError, ToolError
from xlpk.units import format_bytes

INSTALL = "pip install 'xlpk[cuda]' (docs/cuda.md)"
Call = tuple[Any, bytes]  # a kernel and its parameters
SPIN_S = 0.005
_ALLOCATORS = ("mem_alloc", "mem_alloc_pitch", "managed_empty", "pagelocked_empty", "pagelocked_zeros")


def import_driver() -> Any:
    """pycuda.driver, initialised. ToolError in one line: what is missing and what to do."""
    if importlib.util.find_spec("pycuda") is None:
        raise ToolError(f"PyCUDA is not installed: {INSTALL}, or use backend=cpu")
    driver.apply_settings()
    try:
        import pycuda.driver as cuda
    except ImportError as error:
        raise ToolError(
            f"the NVIDIA driver library cannot be loaded ({error}): install the driver, or use backend=cpu"
        ) from None
    try:
        cuda.init()
        count = cuda.Device.count()
    except cuda.Error as error:
        raise ToolError(f"the NVIDIA driver does not start ({error}): see `xlpk doctor`, or use backend=cpu") from None
    if count == 0:
        raise ToolError("the NVIDIA driver has no device: see `xlpk doctor`, or use backend=cpu")
    return cuda


def free_device_memory(ordinal: int) -> int:
    """Bytes that are free on a device, by a context that is gone afterwards."""
    cuda = import_driver()
    context = cuda.Device(ordinal).make_context()
    try:
        free, _ = cuda.mem_get_info()
        return int(free)
    finally:
        context.pop()
        context.detach()


class Device:
    """A context on one GPU, current in the thread that made it. Calls of any other thread fail."""

    def __init__(self, ordinal: int = 0) -> None:
        self.cuda = cuda = import_driver()
        device = cuda.Device(ordinal)
        attribute = cuda.device_attribute
        self.name: str = device.name()
        self.compute_capability: tuple[int, int] = device.compute_capability()
        self.multiprocessors: int = device.get_attribute(attribute.MULTIPROCESSOR_COUNT)
        self.shared_bytes: int = device.get_attribute(attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        self.memory_bytes: int = device.total_memory()
        self.counts = BackendReport()
        self._allocations: list[Any] = []  # device memory, in order
        self._pinned: list[Any] = []  # arrays of page-locked host memory
        self._mapped: list[Any] = []  # arrays that are mapped into the device
        self._resident = False
        self._context: Any = None
        self.stream: Any = None
        self.copies: Any = None
        with self.errors("no context on the device"):
            self._context = device.make_context(cuda.ctx_flags.SCHED_AUTO | cuda.ctx_flags.MAP_HOST)
            # 1: non-blocking, so that nothing on the default stream waits for the resident kernel.
            self.stream, self.copies = cuda.Stream(1), cuda.Stream(1)

    @property
    def arch(self) -> str:
        """What nvcc compiles for: with the instructions that only this architecture has, where there are some."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}" + ("a" if major >= 9 and major in (9, 10, 11, 12) else "")

    @contextlib.contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Driver errors as BackendError."""
        try:
            yield
        except (self.cuda.Error, driver.DriverError) as error:
            cause = self.sick() or error
            raise BackendError(f"{doing}: {' '.join(str(cause).split())} ({self.name})") from error

    def sick(self) -> BackendError | None:
        """The error that the context will return from now on; None: it is well."""
        error = driver.stream_error(self.stream.handle) if self.stream is not None else None
        return error if error is not None and error.sticky else None

    # ------------------------------------------------------------------------------------------ memory

    def allocate(self, size: int, what: str) -> int:
        """Zeroed device memory, its address. InputError if it does not fit."""
        if self._resident:
            raise BackendError(f"{what}: device memory was to be allocated while the loop is resident")
        try:
            allocation = self.cuda.mem_alloc(max(size, 1))
        except self.cuda.MemoryError:
            free, _ = self.cuda.mem_get_info()
            allowed = f"what fits the device: {format_bytes(free)} are free of {format_bytes(self.memory_bytes)}"
            raise InputError(what, format_bytes(size), allowed) from None
        self._allocations.append(allocation)
        with self.errors("device memory could not be cleared"):
            self.cuda.memset_d8_async(int(allocation), 0, max(size, 1), self.stream)
        return int(allocation)

    def free(self, address: int) -> None:
        """Gives device memory back before the end; waits for what uses it."""
        for allocation in [kept for kept in self._allocations if int(kept) == address]:
            self._allocations.remove(allocation)
            allocation.free()

    def map_host(self, memory: np.ndarray[Any, Any]) -> int:
        """Locks page-aligned host memory and maps it into the device's address space: its address there."""
        address = driver.register_host(memory.ctypes.data, memory.nbytes)
        self._mapped.append(memory)
        return address

    def locked(self, size: int) -> np.ndarray[Any, Any]:
        """Page-locked host memory for copies, [size] bytes of zeros."""
        with self.errors("no page-locked host memory"):
            array: np.ndarray[Any, Any] = self.cuda.pagelocked_zeros(
                max(size, 1), np.uint8, mem_flags=self.cuda.host_alloc_flags.PORTABLE
            )
        self._pinned.append(array)
        return array

    def release(self, array: np.ndarray[Any, Any]) -> None:
        """Gives locked memory back before the end."""
        self._pinned = [kept for kept in self._pinned if kept is not array]
        array.base.free()  # type: ignore[union-attr]

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """Refuses allocations, PyCUDA's own ones included, until left."""
        with contextlib.ExitStack() as stack:
            for name in _ALLOCATORS:
                stack.callback(setattr, self.cuda, name, getattr(self.cuda, name))
                setattr(self.cuda, name, _refuse)
            self._resident = True
            stack.callback(setattr, self, "_resident", False)
            yield

    # ------------------------------------------------------------------------------------------ counted calls

    def launch(self, function: Any, teams: int, threads: int, arguments: bytes, shared_bytes: int) -> None:
        """One kernel onto the stream; returns at once. `arguments`: laid out as the kernel's parameters."""
        function._launch_kernel((teams, 1), (threads, 1, 1), arguments, shared_bytes, self.stream)
        self.counts.launches += 1

    def launch_all(self, calls: Sequence[Call], teams: int, threads: int, shared_bytes: int) -> None:
        """Many kernels onto the stream, with as little of Python in between as there can be."""
        grid, block, stream = (teams, 1), (threads, 1, 1), self.stream
        for function, arguments in calls:
            function._launch_kernel(grid, block, arguments, shared_bytes, stream)
        self.counts.launches += len(calls)

    def copy_in(self, to: int, array: np.ndarray[Any, Any]) -> None:
        """Page-locked host memory -> device, on the stream."""
        self.cuda.memcpy_htod_async(to, array, self.stream)
        self.counts.h2d_copies += 1
        self.counts.h2d_bytes += array.nbytes

    def copy_out(self, array: np.ndarray[Any, Any], source: int, stream: Any = None) -> None:
        """Device -> page-locked host memory, on the stream."""
        self.cuda.memcpy_dtoh_async(array, source, stream or self.stream)
        self.counts.d2h_copies += 1
        self.counts.d2h_bytes += array.nbytes

    def synchronize(self, within_s: float) -> None:
        """Waits until the stream is empty. HangError: it was not in time. The wait spins, as the driver's own does, so
        that a step's end is seen at once; only a wait that is long already sleeps."""
        self.counts.syncs += 1
        begin_s = time.monotonic()
        while not self.stream.is_done():
            waited_s = time.monotonic() - begin_s
            if waited_s > within_s:
                raise HangError(f"HANG: the device did not finish a step in {within_s:g} s ({self.name})")
            if waited_s > SPIN_S:
                time.sleep(0.0002)

    def read(self, array: np.ndarray[Any, Any], source: int) -> None:
        """Device -> any host memory, beside a resident kernel; not counted: for tests and the end of a session."""
        self.cuda.memcpy_dtoh_async(array, source, self.copies)
        self.copies.synchronize()

    # ------------------------------------------------------------------------------------------ end

    def wait(self, within_s: float) -> bool:
        """Whether the stream became empty in time."""
        give_up = time.monotonic() + within_s
        while not self.stream.is_done():
            if time.monotonic() > give_up:
                return False
            time.sleep(0.0002)
        return True

    def close(self, *, lost: bool = False, keep: Any = None) -> None:
        """Frees everything and the context. `lost`: a kernel still runs or the context died; what frees would wait for
        ever or fail, so all is left to the end of the process, `keep` with it."""
        if self._context is None:
            return
        context, self._context = self._context, None
        if lost:
            _LOST.append((keep, self._allocations, self._pinned, self._mapped))
            _LOST.append((self.stream, self.copies, context))
            context.pop()
            return
        for allocation in reversed(self._allocations):
            allocation.free()
        for array in reversed(self._pinned):
            array.base.free()
        for array in reversed(self._mapped):
            driver.unregister_host(array.ctypes.data)
        self._allocations, self._pinned, self._mapped = [], [], []
        self.stream = self.copies = None
        context.pop()
        context.detach()


_LOST: list[Any] = []  # what could not be freed; the garbage collector would wait for the kernel


def lost() -> bool:
    """Whether this process holds a device that it cannot free: it must leave by os._exit."""
    return bool(_LOST)


def _refuse(*_: Any, **__: Any) -> Any:
    raise BackendError("memory was to be allocated while the loop is resident: it would wait for the kernel")
