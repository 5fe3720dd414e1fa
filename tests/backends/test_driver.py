"""xlpk.backends.driver and real PyCUDA, on the stand-in driver. Each test runs in a process of its own."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from standin.library import counters
from standin.session import KEPT, THREADS, Session, build_echo, on_standin, refused, run_body, wait_until

from xlpk.backends import driver
from xlpk.errors import ToolError

pytestmark = pytest.mark.heavy


@on_standin(SMS="6")
def test_the_stand_in_names_itself() -> None:
    cuda = Session().cuda
    device = cuda.Device(0)
    assert "stand-in" in device.name()
    assert device.compute_capability() == (9, 0)
    attributes = device.get_attributes()
    assert attributes[cuda.device_attribute.MULTIPROCESSOR_COUNT] == 6
    assert attributes[cuda.device_attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN] == 232448
    assert driver.driver_version() == (13, 0)
    assert bytes.fromhex(driver.device_uuid(0).removeprefix("GPU-").replace("-", "")).startswith(b"xlpk stand-in")
    assert driver.loads_eagerly()


@on_standin(CUDA_MODULE_LOADING="LAZY")
def test_lazy_loading_is_seen_and_its_loads_beside_a_resident_kernel_counted() -> None:
    session = Session()
    assert not driver.loads_eagerly()
    floats = session.cuda.mem_alloc(64)
    words = session.resident_echo()
    other = session.cuda.Stream(1)
    session.launch("scale", floats, np.int32(1), np.float32(1), np.float64(0), stream=other)
    words[0] = 2
    session.stream.synchronize()
    assert counters()["resident_module_loads"] == 1


@on_standin()
def test_mailbox_round_trips_and_copies_while_a_kernel_is_resident() -> None:
    session = Session()
    cuda = session.cuda
    words, address = session.mapped(2)
    device = cuda.mem_alloc(4000)
    sent = cuda.pagelocked_empty(1000, np.float32)
    back = cuda.pagelocked_zeros(1000, np.float32)
    sent[:] = np.arange(1000)
    session.launch("echo", address, np.uint32(100))
    for i in range(1, 100):
        words[0] = i
        wait_until(lambda i=i: int(words[1]) == i)  # type: ignore[misc]
    copies = cuda.Stream(1)
    cuda.memcpy_htod_async(device, sent, copies)
    cuda.memcpy_dtoh_async(back, device, copies)
    copies.synchronize()
    assert np.array_equal(sent, back)
    assert not session.stream.is_done()
    words[0] = 100
    session.stream.synchronize()
    assert int(words[1]) == 100
    called = counters()
    assert (called["launches"], called["syncs"]) == (1, 2)
    assert (called["h2d_copies"], called["h2d_bytes"], called["d2h_copies"], called["d2h_bytes"]) == (1, 4000, 1, 4000)
    assert [called[name] for name in called if name.startswith("resident_")] == [0, 0, 0, 0]


@on_standin()
def test_streams_keep_order_and_events_tell_time() -> None:
    session = Session()
    cuda = session.cuda
    values = cuda.pagelocked_zeros(500, np.float32)
    device = cuda.mem_alloc(2000)
    begin, end = cuda.Event(), cuda.Event()
    begin.record(session.stream)
    cuda.memcpy_htod_async(device, values, session.stream)
    for _ in range(20):
        session.launch("scale", device, np.int32(500), np.float32(1), np.float64(1), blocks=7)
    cuda.memcpy_dtoh_async(values, device, session.stream)
    end.record(session.stream)
    end.synchronize()
    assert np.array_equal(values, np.full(500, 20, np.float32))
    assert end.time_since(begin) > 0
    other = cuda.Stream(1)
    session.launch("scale", device, np.int32(500), np.float32(2), np.float64(0), blocks=3)
    end.record(session.stream)
    other.wait_for_event(end)
    cuda.memcpy_dtoh_async(values, device, other)
    other.synchronize()
    assert np.array_equal(values, np.full(500, 40, np.float32))


@on_standin()
def test_a_graph_replays_with_what_memory_holds_then() -> None:
    session = Session()
    cuda, stream = session.cuda, session.stream
    values, results = cuda.pagelocked_zeros(300, np.float32), cuda.pagelocked_zeros(300, np.float32)
    device = cuda.mem_alloc(1200)
    addend = np.float64(3)
    with driver.capture(stream.handle) as graph:
        cuda.memcpy_htod_async(device, values, stream)
        session.launch("scale", device, np.int32(300), np.float32(2), addend, blocks=4)
        cuda.memset_d32_async(int(device), 0, 10, stream)
        session.launch("scale", device, np.int32(20), np.float32(1), np.float64(1), blocks=2)
        cuda.memcpy_dtoh_async(results, device, stream)
    assert graph.n_nodes == 5
    stream.synchronize()
    assert not results.any()
    assert counters()["launches"] == 0  # a captured launch is none
    graph.upload(stream.handle)
    for value in (1, 10, 100):
        values[:] = value
        graph.launch(stream.handle)
        stream.synchronize()
        expected = np.full(300, 2 * value + 3, np.float32)
        expected[:10] = 0
        expected[:20] += 1
        assert np.array_equal(results, expected)
    graph.close()
    graph.close()
    called = counters()
    assert (called["graph_launches"], called["graph_kernels"], called["launches"]) == (3, 6, 0)
    assert (called["h2d_copies"], called["d2h_bytes"]) == (3, 3600)


@on_standin()
def test_a_capture_forbids_allocation_and_waiting_and_leaves_the_stream_usable() -> None:
    session = Session()
    cuda, stream = session.cuda, session.stream
    device = cuda.mem_alloc(40)
    forbidden: list[Callable[[], Any]] = [
        lambda: cuda.mem_alloc(100),
        stream.synchronize,
        session.context.synchronize,
        lambda: cuda.memcpy_htod(device, np.zeros(10, np.float32)),
    ]
    for call in forbidden:
        with refused(cuda.Error, "captur"), driver.capture(stream.handle):
            call()
        session.launch("scale", device, np.int32(10), np.float32(0), np.float64(5))
        stream.synchronize()
    with refused(driver.DriverError, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"), driver.capture(0):
        pass


@on_standin()
def test_host_memory_is_registered_for_the_device() -> None:
    session = Session()
    page = 4096
    raw = np.zeros(3 * page, np.uint8)
    skip = -raw.ctypes.data % page
    values = raw[skip : skip + page].view(np.float32)
    address = driver.register_host(values.ctypes.data, values.nbytes)
    session.launch("scale", np.uint64(address), np.int32(values.size), np.float32(0), np.float64(7))
    session.stream.synchronize()
    assert np.array_equal(values, np.full(values.size, 7, np.float32))
    with refused(driver.DriverError, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"):
        driver.register_host(values.ctypes.data, values.nbytes)
    driver.unregister_host(values.ctypes.data)
    with refused(driver.DriverError, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"):
        driver.unregister_host(values.ctypes.data)


@on_standin()
def test_a_broken_capture_yields_no_graph_and_other_threads_may_allocate() -> None:
    session = Session()
    cuda, stream = session.cuda, session.stream
    device = cuda.mem_alloc(40)
    with refused(driver.DriverError, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"), driver.capture(stream.handle):
        session.launch("scale", device, np.int32(10), np.float32(0), np.float64(5))
        with refused(cuda.Error, "capture unsupported"):  # swallowed, but too late
            cuda.mem_alloc(40)
    allocated = []

    def allocate() -> None:
        session.context.push()
        allocated.append(cuda.mem_alloc(40))
        cuda.Context.pop()

    with driver.capture(stream.handle) as graph:
        session.launch("scale", device, np.int32(10), np.float32(0), np.float64(5))
        session.context.pop()  # PyCUDA's contexts are current in one thread at a time
        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join()
        session.context.push()
    assert len(allocated) == 1
    assert graph.n_nodes == 1


def test_a_machine_without_a_driver_or_with_an_old_one_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    open_library = driver._library.__wrapped__
    libc = ctypes.CDLL(None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    with refused(ToolError, r"the NVIDIA driver is too old \(it has no cu\w+\): install"):
        open_library()

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with refused(ToolError, r"cannot be loaded \(libcuda.so.1: cannot open shared object file\): install the driver"):
        open_library()


@on_standin()
def test_resources_and_occupancy_of_a_kernel() -> None:
    session = Session()
    kernels = {kernel.name: kernel for kernel in build_echo().kernels}
    for shared, blocks in ((0, 32), (50 << 10, 4), (100 << 10, 2), (227 << 10, 1)):
        found = driver.function_resources(session.cubin, "echo", threads=THREADS, dynamic_shared_bytes=shared)
        assert found.blocks_per_multiprocessor == blocks
    assert (found.registers, found.max_threads) == (kernels["echo"].registers, THREADS)
    with refused(driver.DriverError, r"cuModuleGetFunction failed: CUDA_ERROR_NOT_FOUND \(500\)") as raised:
        driver.function_resources(session.cubin, "nobody", threads=THREADS, dynamic_shared_bytes=0)
    assert not raised.value.sticky
    with refused(driver.DriverError, "CUDA_ERROR_INVALID_VALUE"):
        driver.function_resources(session.cubin, "echo", threads=THREADS, dynamic_shared_bytes=228 << 10)
    with refused(driver.DriverError, "CUDA_ERROR_INVALID_IMAGE"):
        driver.function_resources(b"not a cubin" * 20, "echo", threads=THREADS, dynamic_shared_bytes=0)


@on_standin(FAULT="launch:2")
def test_fault_a_kernel_that_dies_loses_the_context() -> None:
    session = Session()
    cuda, stream = session.cuda, session.stream
    device = cuda.mem_alloc(40)
    session.launch("scale", device, np.int32(10), np.float32(0), np.float64(5))
    stream.synchronize()
    assert driver.stream_error(stream.handle) is None
    session.launch("scale", device, np.int32(10), np.float32(0), np.float64(5))  # the error comes later, as on a GPU
    with refused(cuda.Error, "launch failed"):
        stream.synchronize()
    error = driver.stream_error(stream.handle)
    assert error is not None
    assert (error.name, error.code, error.sticky) == ("CUDA_ERROR_LAUNCH_FAILED", 719, True)
    assert "only a new process can use the device" in str(error)
    for call in (lambda: cuda.mem_alloc(40), lambda: cuda.Stream(1), lambda: cuda.memset_d8(int(device), 0, 4)):
        with refused(cuda.Error, "launch failed"):
            call()


@on_standin(FAULT="launch_refused:2,oom:3")
def test_faults_that_pass() -> None:
    session = Session()
    cuda, stream = session.cuda, session.stream
    device = cuda.mem_alloc(40)
    with driver.capture(stream.handle) as graph:
        session.launch("scale", device, np.int32(10), np.float32(0), np.float64(5))
    graph.launch(stream.handle)
    with refused(driver.DriverError, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES") as raised:
        graph.launch(stream.handle)
    assert not raised.value.sticky
    graph.launch(stream.handle)
    stream.synchronize()
    assert driver.stream_error(stream.handle) is None
    KEPT.append(cuda.mem_alloc(40))
    with refused(cuda.MemoryError, "out of memory"):
        cuda.mem_alloc(40)
    cuda.memset_d8(int(device), 0, 40)


if __name__ == "__main__":
    run_body()
