"""The stand-in driver is as strict as docs/cuda.md says, and its faults do what they say."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from standin.hook import CACHE
from standin.library import counters
from standin.session import (
    KEPT,
    THREADS,
    Session,
    on_standin,
    refused,
    run_body,
    wait_until,
)

pytestmark = pytest.mark.heavy


@on_standin()
def test_what_a_resident_kernel_forbids_is_counted() -> None:
    session = Session()
    cuda = session.cuda
    words = session.resident_echo()
    allocation = cuda.mem_alloc(100)
    cuda.memset_d8(int(allocation), 0, 100)
    KEPT.append(cuda.module_from_buffer(session.cubin))
    words[0] = 2
    session.stream.synchronize()
    called = counters()
    assert called["resident_allocations"] == called["resident_default_stream"] == called["resident_module_loads"] == 1
    assert called["resident_frees"] == 0


@on_standin()
def test_freeing_waits_for_the_running_kernel() -> None:
    """And a call on the default stream for a blocking stream, not for a non-blocking one."""
    session = Session()
    cuda = session.cuda
    allocation, device = cuda.mem_alloc(100), cuda.mem_alloc(100)
    counts = cuda.mem_alloc(16)
    cuda.memset_d8(int(counts), 0, 16)
    session.launch("census", counts, blocks=200)  # not all at once: the first wait half a second for the last
    cuda.memset_d8(int(device), 0, 100)
    assert not session.stream.is_done()
    allocation.free()
    assert session.stream.is_done()
    blocking = cuda.Stream()
    cuda.memset_d8(int(counts), 0, 16)
    session.launch("census", counts, blocks=200, stream=blocking)
    cuda.memcpy_htod(device, np.zeros(25, np.float32))
    assert blocking.is_done()


@on_standin(SMS="3")
def test_as_many_blocks_are_resident_as_fit() -> None:
    session = Session()
    assert session.census(3, shared=200 << 10) == 3
    assert session.census(4, shared=200 << 10) == 3
    assert session.census(6, shared=100 << 10) == 6
    assert session.census(7, shared=100 << 10) == 6


@on_standin(FAULT="missing_team")
def test_fault_a_team_that_never_arrives() -> None:
    assert Session().census(4) == 3


@on_standin(FAULT="sticky:2")
def test_fault_a_sticky_error_at_a_synchronisation() -> None:
    session = Session()
    session.stream.synchronize()
    with refused(session.cuda.Error, "illegal address"):
        session.stream.synchronize()
    with refused(session.cuda.Error, "illegal address"):
        session.cuda.mem_get_info()


@on_standin(FAULT="sticky:2")
def test_fault_a_sticky_error_met_by_asking_whether_work_is_done() -> None:
    session = Session()
    device = session.cuda.mem_alloc(40)
    arguments = ("scale", device, np.int32(10), np.float32(0), np.float64(5))
    session.launch(*arguments)
    wait_until(session.stream.is_done)
    assert session.stream.is_done()  # nothing new: not a second time
    session.launch(*arguments)
    with refused(session.cuda.Error, "illegal address"):
        wait_until(session.stream.is_done)
    assert counters()["waits"] == 2


@on_standin(FAULT="stuck")
def test_fault_a_kernel_that_never_ends() -> None:
    session = Session()
    words, address = session.mapped(2)
    words[0] = 1
    session.launch("echo", address, np.uint32(1))
    time.sleep(0.2)
    assert not session.stream.is_done()
    assert words[1] == 0


@on_standin(FAULT="freeze:300")
def test_fault_a_kernel_that_stands_still() -> None:
    session = Session()
    words, address = session.mapped(2)
    session.launch("echo", address, np.uint32(1000000000))
    answered = 0
    for i in range(1, 1000000000):
        words[0] = i
        give_up = time.monotonic() + 2
        while words[1] != i and time.monotonic() < give_up:
            pass
        if words[1] != i:
            break
        answered = i
    assert answered > 0
    assert not session.stream.is_done()


@on_standin(MEMORY=str(1 << 20))
def test_device_memory_is_limited_and_accounted() -> None:
    cuda = Session().cuda
    big = cuda.mem_alloc(900 << 10)
    assert cuda.mem_get_info() == (124 << 10, 1 << 20)
    with refused(cuda.MemoryError, "out of memory"):
        cuda.mem_alloc(200 << 10)
    big.free()
    cuda.mem_alloc(1000 << 10)


@on_standin()
def test_fresh_memory_holds_garbage() -> None:
    cuda = Session().cuda
    values = np.zeros(100, np.float32)
    cuda.memcpy_dtoh(values, cuda.mem_alloc(400))
    assert np.isnan(values).all()


@on_standin()
def test_copies_stay_within_allocations_and_on_their_side() -> None:
    session = Session()
    cuda = session.cuda
    device, host = cuda.mem_alloc(400), np.zeros(101, np.float32)
    for call in (
        lambda: cuda.memcpy_htod(device, host),
        lambda: cuda.memcpy_htod(host.ctypes.data, host[:10]),
        lambda: cuda.memcpy_dtoh(host[:10], host.ctypes.data),
        lambda: cuda.memset_d32(int(device) + 4, 0, 100),
    ):
        with refused(cuda.Error, "invalid value"):
            call()
    cuda.memcpy_htod(device, host[:100])


@on_standin()
def test_a_thread_without_a_context_is_refused() -> None:
    session = Session()
    errors: list[str] = []

    def other() -> None:
        from xlpk.backends import driver

        error = driver.stream_error(session.stream.handle)
        errors.append(error.name if error else "")

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert errors == ["CUDA_ERROR_INVALID_CONTEXT"]


@on_standin()
def test_a_launch_must_fit_the_kernel() -> None:
    session = Session()
    cuda, stream = session.cuda, session.stream
    device = cuda.mem_alloc(40)
    scale = session.module.get_function("scale")
    good = (device, np.int32(10), np.float32(0), np.float64(5))
    scale(*good, grid=(1, 1), block=(THREADS, 1, 1), stream=stream)
    with refused(cuda.Error, "invalid value"):
        scale(*good[:-1], grid=(1, 1), block=(THREADS, 1, 1), stream=stream)
    with refused(cuda.Error, "invalid value"):
        scale(*good, grid=(1, 1), block=(THREADS // 2, 1, 1), stream=stream)
    with refused(cuda.Error, "out of resources"):
        scale(*good, grid=(1, 1), block=(2 * THREADS, 1, 1), stream=stream)
    with refused(cuda.Error, "invalid value"):
        scale(*good, grid=(1, 1), block=(THREADS, 1, 1), shared=49 << 10, stream=stream)


@on_standin()
def test_a_kernel_behind_its_memory_loses_the_context() -> None:
    session = Session()
    device = session.cuda.mem_alloc(400)
    session.launch("scale", device, np.int32(1 << 16), np.float32(0), np.float64(5))
    with refused(session.cuda.Error, "illegal address"):
        session.stream.synchronize()


@on_standin()
def test_a_kernel_behind_its_shared_memory_loses_the_context() -> None:
    session = Session()
    session.launch("fill_shared", np.int32(1024), shared=1024)
    session.stream.synchronize()
    session.launch("fill_shared", np.int32(1028), shared=1024)
    with refused(session.cuda.Error, "illegal address"):
        session.stream.synchronize()


@on_standin()
def test_a_pointer_to_pageable_memory_loses_the_context() -> None:
    """In Params or in LayerWeights; a GPU would fault when it comes to it."""
    from xlpk import layout
    from xlpk.backends.gpu_module import CachedSourceModule
    from xlpk.backends.memory import dims_record
    from xlpk.kv import KV, KVPlan
    from xlpk.model import load_model
    from xlpk.toolchain import dims_defines

    session = Session()
    cuda, stream = session.cuda, session.stream
    model = load_model("tiny")
    plan = KVPlan.make(KV(), model.config, model.weights.dtype, 512)
    defines = dims_defines(dims_record(model.config, plan), model.weights.dtype, "bf16")
    embed = CachedSourceModule("launched.cu", CACHE, arch="sm_90a", defines=defines).get_function("xl_phase_embed")
    nothing = cuda.mem_alloc(1 << 16)  # a step without rows
    cuda.memset_d8(int(nothing), 0, 1 << 16)
    layers = np.zeros(model.config.num_hidden_layers, layout.LAYER_WEIGHTS.dtype)
    params = np.zeros((), layout.PARAMS.dtype)
    for name, kind, _ in layout.PARAMS.fields:
        if kind.endswith("*"):
            params[name] = int(nothing)
    params["spans"] = 0  # no ring of the right size is here
    table = cuda.mem_alloc(layers.nbytes)
    params["layers"] = int(table)

    def launch() -> None:
        cuda.memcpy_htod(table, layers)
        arguments = params.tobytes() + np.int32(0).tobytes()
        embed._launch_kernel((4, 1), (256, 1, 1), arguments, 0, stream)
        stream.synchronize()

    launch()
    pageable = np.zeros(100, np.float32)
    layers["q_proj"][-1] = pageable.ctypes.data
    with refused(cuda.Error, "illegal address"):
        launch()


if __name__ == "__main__":
    run_body()
