"""The resident loop's comings and goings: leases, idle exits, heartbeat, guard; and what the host counts."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import kinds
import numpy as np
import pytest
from drive import Output, finish, gather, run

from xlpk import layout
from xlpk.backend import Token
from xlpk.backends.gpu_memory import Mirror
from xlpk.errors import BackendError, HangError
from xlpk.kv import KV, KVPlan
from xlpk.model import Model, load_model
from xlpk.speculation import Ngram
from xlpk.workload import Request

RESIDENT = pytest.mark.parametrize("kind", ["cpu", *kinds.HEAVY_GPU[:1]], indirect=True)
PERSISTENT = pytest.mark.parametrize("kind", kinds.HEAVY_GPU[:1], indirect=True)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("tiny")


def requests(count: int, n: int = 60) -> list[Request]:
    return [Request(i, tuple(range(3 + i, 20 + i)), n, temperature=0.8, seed=i, ignore_eos=True) for i in range(count)]


@contextmanager
def session(model: Model, **options: Any) -> Iterator[Any]:
    backend = kinds.make(max_num_seqs=4, max_step_rows=32, **options)
    try:
        backend.open(model, KVPlan.make(KV(budget="128pages"), model.config, model.weights.dtype, 256))
        yield backend
    finally:
        backend.close()


def wait(condition: Any, within_s: float = 120.0) -> None:
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


@RESIDENT
def test_leases_change_nothing_but_launches(model: Model, kind: str) -> None:
    """The state stays: barriers count on, requests in flight go on where they were."""
    endless = run(model, requests(9), max_num_seqs=4, spec=Ngram(block=4), lease_s=0.0)
    with session(model, lease_s=0.003, spec=Ngram(block=4)) as backend:
        result = finish(backend, requests(9))
        report = backend.close()
    assert result.tokens == endless.tokens
    assert [step.step for step in result.steps] == list(range(1, len(result.steps) + 1))
    assert report.launches > 1


@PERSISTENT
def test_an_idle_loop_leaves_and_wakes(model: Model, kind: str) -> None:
    with session(model, idle_s=0.05, lease_s=0.0) as backend:
        expected = finish(backend, requests(1, 5)).tokens[0]
        wait(lambda: backend.library.dll.xl_left(backend._params) == backend._report.launches)
        assert backend._mailbox["leave"][0] == layout.LeaveReason.IDLE
        launches = backend._report.launches
        time.sleep(0.1)
        assert backend.poll() == []
        assert backend._report.launches == launches, "nothing to do, nothing launched"
        again = replace(requests(1, 5)[0], request_id=7)
        assert finish(backend, [again]).tokens[7] == expected
        assert backend._report.launches == launches + 1


@PERSISTENT
def test_no_wake_up_is_lost(model: Model, kind: str) -> None:
    """Another thread submits around the moment in which the loop leaves."""
    rng = random.Random(1)
    with session(model, idle_s=0.002, lease_s=0.0) as backend:
        for number in range(60):
            outputs = {number: Output()}
            time.sleep(rng.uniform(0.0, 0.006))
            request = replace(requests(1, 2)[0], request_id=number)
            thread = threading.Thread(target=backend.submit, args=(request,))
            thread.start()
            wait(lambda outputs=outputs: gather(backend.poll(), outputs, []) or outputs[number].reason)  # noqa: B023
            thread.join()
        assert backend._report.launches > 5


@PERSISTENT
def test_the_loop_leaves_when_the_host_is_silent(model: Model, kind: str) -> None:
    with session(model, heartbeat_s=1.0, idle_s=0.0, lease_s=0.0) as backend:
        library = backend.library.dll
        time.sleep(2.5)
        assert library.xl_left(backend._params) == 0, "the heartbeat keeps it"
        library.xl_heartbeat_end(backend._heartbeat)
        backend._heartbeat = None
        wait(lambda: library.xl_left(backend._params) == 1)
        assert backend._mailbox["leave"][0] == layout.LeaveReason.HEARTBEAT
        assert len(finish(backend, requests(1, 5)).tokens[0]) == 5, "a host that goes on is served again"


@PERSISTENT
def test_nothing_is_allocated_while_the_loop_is_resident(model: Model, kind: str) -> None:
    with session(model, idle_s=0.0, lease_s=0.0) as backend:
        device = backend.device
        for allocate in (
            lambda: device.allocate(16, "test"),
            lambda: device.cuda.mem_alloc(16),
            device.cuda.pagelocked_empty,
        ):
            with pytest.raises(BackendError, match="while the loop is resident"):
                allocate()
        assert len(finish(backend, requests(1, 5)).tokens[0]) == 5
        assert device.cuda.mem_alloc.__name__ == "_refuse"
    assert device.cuda.mem_alloc.__name__ != "_refuse"


@PERSISTENT
def test_more_teams_than_fit_are_refused(model: Model, kind: str) -> None:
    with pytest.raises(BackendError, match="teams cannot run at once"), session(model, threads=4096):
        pass


@PERSISTENT
def test_the_device_clock_is_asked(model: Model, kind: str) -> None:
    with session(model, idle_s=0.0) as backend:
        before, asked, after = backend.clock_ns(), backend.clock_ns(), backend.clock_ns()
        assert 0 < before < asked < after
        step = finish(backend, requests(1, 3)).steps[0]
        assert after < step.values["begin_ns"] < backend.clock_ns()


@pytest.mark.parametrize("kind", kinds.HEAVY_GPU, indirect=True)
def test_counters_are_those_of_the_driver(model: Model, kind: str) -> None:
    """Counted by us where the calls are made, and by the stand-in where they arrive."""
    if kinds.real_driver():
        pytest.skip("a driver counts for nobody")
    from standin.library import counters

    with session(model) as backend:
        finish(backend, requests(1, 2))
        before = counters()
        report = replace(backend._report)
        finish(backend, requests(6))
        seen = {name: value - before[name] for name, value in counters().items()}
        now = backend._report
        ours = {name: getattr(now, name) - getattr(report, name) for name in ("launches", "h2d_copies", "d2h_copies")}
        ours |= {name: getattr(now, name) - getattr(report, name) for name in ("h2d_bytes", "d2h_bytes")}
    launches = seen["graph_launches"] if kind == "graph" else seen["launches"]
    assert ours["launches"] == launches
    assert {name: seen[name] for name in ours if name != "launches"} == {
        n: v for n, v in ours.items() if n != "launches"
    }
    assert seen["allocations"] == seen["frees"] == 0
    assert all(value == 0 for name, value in counters().items() if name.startswith("resident_"))


@pytest.mark.heavy
def test_the_three_give_the_same_bits(model: Model) -> None:
    """Tokens and logprobs, with everything that a request can ask for."""
    batch = [
        *requests(3, 30),
        Request(3, (4, 5, 6, 4, 5, 6, 4, 5), 30, temperature=1.1, top_k=40, top_p=0.9, logprobs=3, ignore_eos=True),
        Request(
            4, (9, 8, 7), 30, temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.2, seed=5, ignore_eos=True
        ),
        Request(
            5, (1, 2), 20, logit_bias=((5, 3.0), (6, -9.0)), logprobs=0, min_p=0.1, temperature=0.7, ignore_eos=True
        ),
    ]
    seen = {}
    for kind in kinds.GPU:
        with kinds.on(kind), session(model, spec=Ngram(block=4)) as backend:
            tokens: list[Token] = []
            poll = backend.poll
            backend.poll = lambda poll=poll, tokens=tokens: keep(poll(), tokens)
            finish(backend, batch)
        seen[kind] = sorted((t.request_id, t.output_index, t.token, t.logprob, t.top_logprobs) for t in tokens)
    assert seen["launched"] == seen["persistent"]
    assert seen["graph"] == seen["persistent"]
    assert any(logprob is not None for *_, logprob, _ in seen["graph"])


def keep(events: list[Any], tokens: list[Token]) -> list[Any]:
    tokens += [event for event in events if isinstance(event, Token)]
    return events


@pytest.mark.heavy
def test_waiting_after_each_phase(model: Model) -> None:
    with kinds.on("launched"), session(model) as backend:
        expected = finish(backend, requests(2)).tokens
        report = backend.close()
    with kinds.on("launched"), session(model, sync="phase") as backend:
        result = finish(backend, requests(2))
        naive = backend.close()
    assert result.tokens == expected
    phases = 2 + 5 * model.config.num_hidden_layers
    assert naive.launches == report.launches
    assert naive.syncs == len(result.steps) * (phases + 1) + 1


@PERSISTENT
def test_weights_arrive_whole(model: Model, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through buffers much smaller than a matrix; each byte is compared."""
    from xlpk.backends import upload

    monkeypatch.setattr(upload, "STAGING_BYTES", 10_000)
    said: list[tuple[int, int]] = []
    with session(model, progress=lambda done, total: said.append((done, total))) as backend:
        for name, address in (("embed_tokens", backend._memory.params["embed_tokens"]),):
            matrix = model.weights.matrix(f"model.{name}.weight").base
            copy = np.zeros_like(matrix)
            backend.device.read(copy, int(address))
            np.testing.assert_array_equal(copy, matrix)
        table = np.zeros(model.config.num_hidden_layers, layout.LAYER_WEIGHTS.dtype)
        backend.device.read(table, int(backend._memory.params["layers"]))
        for index, row in enumerate(table):
            for field, part in (("q_proj", "self_attn"), ("down_proj", "mlp")):
                matrix = model.weights.matrix(f"model.layers.{index}.{part}.{field}.weight").base
                copy = np.zeros_like(matrix)
                backend.device.read(copy, int(row[field]))
                np.testing.assert_array_equal(copy, matrix)
            norm = model.weights.vector(f"model.layers.{index}.input_layernorm.weight")
            copy = np.zeros_like(norm)
            backend.device.read(copy, int(row["input_layernorm"]))
            np.testing.assert_array_equal(copy, norm)
    done = [count for count, _ in said]
    assert done == sorted(done)
    assert len(done) > 500
    assert said[-1][0] == said[-1][1] > model.weights.nbytes


def cancel_many(backend: Any) -> None:
    """More than the ring holds, of requests that there are not."""
    for number in range(600):
        backend.cancel(10_000 + number)


@PERSISTENT
def test_more_cancellations_than_the_ring_holds(model: Model, kind: str) -> None:
    """The loop has left, so nobody would read them: it is launched again."""
    with session(model, idle_s=0.02) as backend:
        wait(lambda: backend.library.dll.xl_left(backend._params) == 1)
        cancel_many(backend)
        again = replace(requests(1, 5)[0], request_id=7)
        assert len(finish(backend, [again]).tokens[7]) == 5


@PERSISTENT
def test_cancel_ends_when_the_watchdog_saw_a_hang(model: Model, kind: str) -> None:
    with session(model, idle_s=0.02) as backend:
        wait(lambda: backend.library.dll.xl_left(backend._params) == 1)
        backend._mailbox["hang"] = 1
        with pytest.raises(HangError, match="HANG"):
            cancel_many(backend)


@PERSISTENT
def test_the_clock_of_a_loop_that_keeps_leaving(model: Model, kind: str) -> None:
    """A launch that leaves between a question and its answer costs one short wait and another launch."""
    rng = random.Random(2)
    with session(model, idle_s=0.001, lease_s=0.0) as backend:
        clocks = []
        for _ in range(60):
            time.sleep(rng.uniform(0.0004, 0.002))
            clocks.append(backend.clock_ns())
        assert clocks == sorted(clocks)
        assert backend._report.launches > 5


@PERSISTENT
def test_without_a_flight_recorder(model: Model, kind: str) -> None:
    """The same tokens; nothing is recorded."""
    written = []
    tokens = []
    for flight in (True, False):
        with session(model, flight=flight) as backend:
            tokens.append(finish(backend, requests(3, 10)).tokens)
            written.append(bool(backend._memory["flight"]["clock_ns"].any()))
    assert tokens[0] == tokens[1]
    assert written == [True, False]


@PERSISTENT
def test_a_watchdog_that_dies_is_noticed(model: Model, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xlpk.backends import watchdog

    monkeypatch.setattr(watchdog.sys, "executable", "/bin/false")
    batch = [replace(requests(1, 200)[0], request_id=number) for number in range(1000)]  # so long that it has died
    with pytest.raises(BackendError, match="watchdog process has ended"), session(model, watch=True) as backend:
        finish(backend, batch)


@pytest.mark.parametrize("kind", kinds.HEAVY_GPU[1:], indirect=True)
def test_no_view_of_freed_memory_stays(model: Model, kind: str) -> None:
    with session(model) as backend:
        finish(backend, requests(2, 5))
        pinned = [(array.ctypes.data, array.nbytes) for array in backend.device._pinned]
        assert pinned
        backend.close()
        seen = [*backend.__dict__.values(), *backend._memory.host.values()]
        arrays = [value for value in seen if isinstance(value, np.ndarray)]
        assert arrays
        for array in arrays:
            assert not any(begin <= array.ctypes.data < begin + nbytes for begin, nbytes in pinned)
        assert not any(isinstance(value, Mirror) for value in seen)
