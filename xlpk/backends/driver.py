"""What PyCUDA lacks of the CUDA driver API: graphs, occupancy, module loading, device UUID.

A typed ctypes layer on the libcuda that PyCUDA has loaded. The alternative, cuda-bindings, is one more compiled package
whose major version must fit the driver, with handle and error types of its own beside PyCUDA's, for twenty functions.
ctypes releases the GIL in each call, which PyCUDA's launches do not.

Addresses and handles are plain integers. Every call that fails raises a DriverError.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import uuid
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

from xlpk.errors import BackendError, ToolError

# Read by the driver when it starts. Eager: a kernel that is brought to the device at its first launch may wait for the
# kernel that runs there. Connections: streams share no hardware queue.
SETTINGS = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}

# cuda.h of such errors: "any further CUDA work will return the same error. To continue using CUDA, the process must be
# terminated and relaunched."
STICKY = frozenset({214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721})

_EAGER = 1  # CU_MODULE_EAGER_LOADING
_PORTABLE, _MAPPED = 1, 2  # CU_MEMHOSTREGISTER_PORTABLE, _DEVICEMAP
_CAPTURE_THREAD_LOCAL = 1  # only this thread's unsafe calls fail while a stream is captured
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_FUNCTION_ATTRIBUTES = {"max_threads": 0, "shared_bytes": 1, "local_bytes": 3, "registers": 4}

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetUuid_v2": (c_void_p, c_int),
    "cuModuleGetLoadingMode": (POINTER(c_int),),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncGetAttribute": (POINTER(c_int), c_int, c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuOccupancyMaxActiveBlocksPerMultiprocessor": (POINTER(c_int), c_void_p, c_int, c_size_t),
    "cuStreamQuery": (c_void_p,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_void_p), c_void_p, c_uint),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphGetNodes": (c_void_p, c_void_p, POINTER(c_size_t)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphUpload": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
}
_NOT_READY = 600  # CUDA_ERROR_NOT_READY


class DriverError(BackendError):
    """A call of the driver API failed.

    Attributes:
        code: the CUresult.
        name: of the code, for instance CUDA_ERROR_LAUNCH_FAILED.
        sticky: the context is lost; every later call of this process fails with the same error.
    """

    def __init__(self, call: str, code: int, name: str, text: str) -> None:
        self.code, self.name, self.sticky = code, name, code in STICKY
        lost = "; the context is lost, only a new process can use the device" if self.sticky else ""
        super().__init__(f"{call} failed: {name} ({code}), {text}{lost}")


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ToolError(f"the NVIDIA driver library cannot be loaded ({error}): install the driver") from None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            raise ToolError(f"the NVIDIA driver is too old (it has no {name}): install one for CUDA 12 or newer")
        function.argtypes, function.restype = list(arguments), c_int
    return library


def _error_words(function: str, code: int) -> str:
    words = c_char_p()
    known = getattr(_library(), function)(code, byref(words)) == 0 and words.value is not None
    return (words.value or b"").decode() if known else "unknown error"


def _error(call: str, code: int) -> DriverError:
    return DriverError(call, code, _error_words("cuGetErrorName", code), _error_words("cuGetErrorString", code))


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_library(), name)(*arguments)
    if code:
        raise _error(name, code)


def apply_settings() -> None:
    """Puts SETTINGS into the environment, where the user has set nothing else. Before the driver is initialised."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def driver_version() -> tuple[int, int]:
    """(major, minor) of the newest CUDA that the driver supports."""
    version = c_int()
    _call("cuDriverGetVersion", byref(version))
    return version.value // 1000, version.value % 1000 // 10


def loads_eagerly() -> bool:
    """Whether modules are brought to the device when they are loaded, and not kernel by kernel at first launches."""
    mode = c_int()
    _call("cuModuleGetLoadingMode", byref(mode))
    return mode.value == _EAGER


def device_uuid(ordinal: int) -> str:
    """The device's UUID as nvidia-smi shows it."""
    raw = ctypes.create_string_buffer(16)
    _call("cuDeviceGetUuid_v2", raw, ordinal)
    return f"GPU-{uuid.UUID(bytes=raw.raw)}"


def stream_error(stream: int) -> DriverError | None:
    """The asynchronous error that the context has met, None while it is well; does not wait.

    PyCUDA's exceptions carry no code, so this tells whether one of them means that the context is lost.
    """
    code = _library().cuStreamQuery(stream)
    return None if code in (0, _NOT_READY) else _error("cuStreamQuery", code)


def register_host(address: int, nbytes: int) -> int:
    """Locks the host's pages there and maps them into the device: their address on it. Page-aligned.

    PyCUDA 2026.1's own register_host_memory drops a reference too many and crashes.
    """
    mapped = c_void_p()
    _call("cuMemHostRegister_v2", address, nbytes, _PORTABLE | _MAPPED)
    try:
        _call("cuMemHostGetDevicePointer_v2", byref(mapped), address, 0)
    except DriverError:
        unregister_host(address)
        raise
    return mapped.value or 0


def unregister_host(address: int) -> None:
    _call("cuMemHostUnregister", address)


@dataclass(frozen=True)
class FunctionResources:
    """What one kernel takes of a multiprocessor."""

    registers: int  # a thread
    shared_bytes: int  # static, a block
    local_bytes: int  # a thread: spills and arrays on the stack
    max_threads: int  # a block, by the kernel's launch bounds
    blocks_per_multiprocessor: int  # resident at once


def function_resources(cubin: bytes, name: str, *, threads: int, dynamic_shared_bytes: int) -> FunctionResources:
    """Resources and occupancy of kernel `name` in the current context, for blocks of this shape.

    PyCUDA's Function gives its handle to nobody, so the cubin is loaded a second time for the question. Not while a
    kernel is resident.
    """
    module, function = c_void_p(), c_void_p()
    _call("cuModuleLoadData", byref(module), cubin)
    try:
        _call("cuModuleGetFunction", byref(function), module, name.encode())
        _call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, dynamic_shared_bytes)
        values = {}
        for attribute, number in _FUNCTION_ATTRIBUTES.items():
            value = c_int()
            _call("cuFuncGetAttribute", byref(value), number, function)
            values[attribute] = value.value
        blocks = c_int()
        _call("cuOccupancyMaxActiveBlocksPerMultiprocessor", byref(blocks), function, threads, dynamic_shared_bytes)
    finally:
        _call("cuModuleUnload", module)
    return FunctionResources(**values, blocks_per_multiprocessor=blocks.value)


class Graph:
    """Work that was captured from a stream once, to be launched again and again; see `capture`.

    Arguments are those of the capture; what addresses point to is read at each launch.
    """

    def __init__(self) -> None:
        self._executable = c_void_p()
        self.n_nodes = 0  # kernels, copies and fills

    def launch(self, stream: int) -> None:
        """One launch of all its work, in order behind what the stream already has; returns at once."""
        _call("cuGraphLaunch", self._executable, stream)

    def upload(self, stream: int) -> None:
        """Brings the graph to the device, so that its first launch costs what any other does."""
        _call("cuGraphUpload", self._executable, stream)

    def close(self) -> None:
        """Frees it. Idempotent; its last launch must be over."""
        executable, self._executable = self._executable, c_void_p()
        if executable:
            _call("cuGraphExecDestroy", executable)

    def _instantiate(self, captured: c_void_p) -> None:
        count = c_size_t()
        _call("cuGraphGetNodes", captured, None, byref(count))
        self.n_nodes = count.value
        _call("cuGraphInstantiateWithFlags", byref(self._executable), captured, 0)


@contextlib.contextmanager
def capture(stream: int) -> Iterator[Graph]:
    """What the body puts on the stream is recorded instead of run; the graph can be launched when the body has ended.

    The body may launch kernels and make asynchronous copies and fills on this stream. It must not allocate, synchronise
    or use the default stream. After an error in it the stream is as before and there is no graph.
    """
    graph, captured = Graph(), c_void_p()
    _call("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD_LOCAL)
    try:
        yield graph
    except BaseException:
        _library().cuStreamEndCapture(stream, byref(captured))  # its own error would hide the body's
        if captured:
            _library().cuGraphDestroy(captured)
        raise
    _call("cuStreamEndCapture", stream, byref(captured))
    try:
        graph._instantiate(captured)
    finally:
        _call("cuGraphDestroy", captured)
