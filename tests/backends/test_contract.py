"""What every backend promises to the engine: the CPU's two orchestrations, and the GPU's three backends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import kinds
import pytest
from drive import CACHE, Output, finish, gather

from xlpk.backend import StepDone
from xlpk.backends.cpu import CpuBackend
from xlpk.backends.submitter import Submitter
from xlpk.errors import BackendError, InputError
from xlpk.kv import KV, KVPlan
from xlpk.model import Model, load_model
from xlpk.workload import Request


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("tiny")


@pytest.fixture(params=["cpu-persistent", "cpu-launched", *kinds.HEAVY_GPU])
def backend(request: pytest.FixtureRequest, model: Model) -> Iterator[Submitter]:
    kind, _, orchestration = request.param.partition("-")
    with kinds.on(kind):
        # A resident loop leaves for no reason of time: launches are counted.
        stays = {"lease_s": 0.0, "idle_s": 0.0} if kind == "persistent" else {}
        made = kinds.make(orchestration=orchestration, max_num_seqs=4, max_step_rows=16, prefill_chunk=8, **stays)
        try:
            made.open(model, KVPlan.make(KV(budget="64pages"), model.config, model.weights.dtype, 512))
            yield made
        finally:
            made.close()


@pytest.mark.parametrize("kind", ["cpu", *kinds.HEAVY_GPU[:1]], indirect=True)
def test_100_tokens_arrive_while_python_sleeps(model: Model, kind: str) -> None:
    """The loop needs no host between submission and completion: nobody calls into it until all is done."""
    backend = kinds.make(orchestration="persistent")
    backend.open(model, KVPlan.make(KV(), model.config, model.weights.dtype, 512))
    try:
        assert backend.submit(Request(0, (10, 20, 30), 100, ignore_eos=True))
        give_up = time.monotonic() + 300
        while int(backend._mailbox["event_tail"][0]) < 102:  # admitted, 100 tokens, finished
            assert time.monotonic() < give_up
            time.sleep(0.01)  # a look at memory; no call
        asleep_until_ns = time.monotonic_ns()
        outputs, steps = {0: Output()}, []
        events = backend.poll()
        gather(events, outputs, steps)
        assert len(outputs[0].tokens) == 100
        assert outputs[0].reason == "length"
        assert max(event.device_ns for event in events if hasattr(event, "device_ns")) < asleep_until_ns
    finally:
        backend.close()


def test_counts_of_launches_and_syncs(backend: Submitter, model: Model) -> None:
    result = finish(backend, [Request(0, (1, 2, 3), 20, ignore_eos=True)])
    report = backend.close()
    steps, phases = len(result.steps), 2 + 5 * model.config.num_hidden_layers
    patched = 1  # the second page of 16 tokens changes the page table; the first one is page 0, as in a table of zeros
    launches = {
        ("cpu", "persistent"): 1,
        ("cpu", "launched"): steps * phases,
        ("persistent", "persistent"): 1,
        ("launched", "launched"): steps * phases + patched,
        ("graph", "graph"): steps,
    }
    resident = backend.orchestration == "persistent"
    assert report.launches == launches[backend.name, backend.orchestration]
    assert report.syncs == (1 if resident else steps + 1)
    copies = 0 if resident or backend.name == "cpu" else steps
    assert (report.h2d_copies, report.d2h_copies) == (copies, copies)
    assert (report.h2d_bytes > 0) == (report.d2h_bytes > 0) == (copies > 0)


def test_many_requests_each_ends_once(backend: Submitter) -> None:
    requests = [Request(i, tuple(range(1, 3 + i % 20)), 1 + i % 9, seed=i, temperature=0.5) for i in range(300)]
    result = finish(backend, requests)
    assert all(output.reason in ("length", "eos") for output in result.outputs.values())
    admitted = [result.outputs[i].admitted_step for i in range(300)]
    assert admitted == sorted(admitted), "first come, first served"
    numbers = [step.step for step in result.steps]
    assert numbers == list(range(1, len(numbers) + 1))


def test_two_threads(model: Model, kind: str) -> None:
    """One submits while another polls."""
    backend = kinds.make(max_num_seqs=4, max_step_rows=16)
    backend.open(model, KVPlan.make(KV(budget="64pages"), model.config, model.weights.dtype, 256))
    requests = [Request(i, (5, 6, 7, 8 + i % 7), 6, ignore_eos=True) for i in range(60)]
    outputs, steps = {i: Output() for i in range(60)}, []

    def submit() -> None:
        for request in requests:
            while not backend.submit(request):
                time.sleep(0.001)

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        give_up = time.monotonic() + 300
        while not all(output.reason for output in outputs.values()):
            assert time.monotonic() < give_up
            gather(backend.poll(), outputs, steps)
            time.sleep(0.0005)
    finally:
        thread.join()
        backend.close()
    assert {len(output.tokens) for output in outputs.values()} == {6}


def test_cancel(backend: Submitter) -> None:
    requests = [
        Request(i, (3, 4, 5), 400, ignore_eos=True) for i in range(7)
    ]  # 4 slots; 64 pages hold two of 403 tokens
    outputs, steps = {i: Output() for i in range(7)}, []
    for request in requests:
        assert backend.submit(request)
    for request_id in (6, 0, 3, 99):
        backend.cancel(request_id)
    give_up = time.monotonic() + 300
    while not all(output.reason for output in outputs.values()):
        assert time.monotonic() < give_up
        gather(backend.poll(), outputs, steps)
        time.sleep(0.0005)
    reasons = [outputs[i].reason for i in range(7)]
    assert reasons == ["cancelled", "length", "length", "cancelled", "length", "length", "cancelled"]
    backend.close()
    assert backend.free_pages() == 64


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(1, (), 4), "prompt"),
        (Request(1, (1,), 0), "max_new_tokens=0: at least 1"),
        (Request(1, (1,) * 500, 13), "prompt + max_new_tokens=513: at most 512"),
        (Request(1, (2048,), 4), "token id=2048: 0 to 2047"),
        (Request(1, (-1,), 4), "token id=-1: 0 to 2047"),
        (Request(1, (1,), 4, stop_token_ids=tuple(range(9))), "stop_token_ids=9: at most 8"),
        (Request(1, (1,), 4, oracle=(5000,)), "token id=5000"),
    ],
)
def test_refused_requests_leave_the_loop_well(backend: Submitter, request_: Request, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        backend.submit(request_)
    assert finish(backend, [Request(2, (1, 2), 3, ignore_eos=True)]).outputs[2].reason == "length"


def test_more_than_the_budget_is_refused(model: Model, kind: str) -> None:
    backend = kinds.make()
    backend.open(model, KVPlan.make(KV(budget="4pages"), model.config, model.weights.dtype, 512))
    try:
        with pytest.raises(InputError, match=r"kv\.budget=4 pages: request 0 needs 5 pages of 16 tokens"):
            backend.submit(Request(0, (1,) * 60, 5))
        assert finish(backend, [Request(1, (1,) * 60, 4, ignore_eos=True)]).outputs[1].reason == "length"
    finally:
        backend.close()


def test_close_is_idempotent_and_stops_a_running_request(backend: Submitter) -> None:
    backend.submit(Request(0, (1, 2, 3), 500))
    backend.poll()
    running = len(os.listdir("/proc/self/task"))
    backend.close()
    assert backend.close() is backend.close()
    if isinstance(backend, CpuBackend):
        give_up = time.monotonic() + 60  # a joined thread is listed a moment longer
        while len(os.listdir("/proc/self/task")) > running - backend.threads:
            assert time.monotonic() < give_up
            time.sleep(0.001)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orchestration": "graph"}, "backend.orchestration=graph: one of persistent, launched"),
        ({"max_num_seqs": 8, "max_step_rows": 4}, "scheduler.max_step_rows=4: at least scheduler.max_num_seqs=8"),
    ],
)
def test_refused_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        CpuBackend(cache=CACHE, **options)  # type: ignore[arg-type]
    assert str(refused.value) == message


@pytest.mark.parametrize("kind", ["cpu", *kinds.HEAVY_GPU[1:]], indirect=True)
def test_a_broken_invariant_ends_the_loop_with_its_name(model: Model, kind: str) -> None:
    """A page that is owned already is about to be given away: the loop stops and says so."""
    backend = kinds.make(orchestration="launched")
    backend.open(model, KVPlan.make(KV(budget="64pages"), model.config, model.weights.dtype, 512))
    try:
        assert backend._memory is not None
        backend._memory["pages"]["refs"] = 1
        backend.submit(Request(0, (1, 2, 3), 5))
        gather(backend.poll(), {0: Output()}, [])  # what was published before comes first
        with pytest.raises(BackendError, match="page_double_allocation"):
            backend.poll()
    finally:
        backend.close()


def test_steps_account_for_every_page_and_token(backend: Submitter) -> None:
    result = finish(backend, [Request(i, tuple(range(1 + i, 30 + i)), 20, ignore_eos=True) for i in range(6)])
    for step in result.steps:
        assert isinstance(step, StepDone)
        values = step.values
        kinds_of_page = ("free", "cached", "active", "draft")
        assert sum(values[f"pages_{kind}"] for kind in kinds_of_page) == values["pages_total"] == 64
        assert values["n_rows"] == values["n_prefill_rows"] + values["n_decode_rows"] + values["n_draft_rows"]
        assert values["end_ns"] > values["begin_ns"]
        assert sum(step.phase_ns.values()) > 0
    assert sum(step.values["n_tokens"] for step in result.steps) == 120
    assert sum(step.values["n_prefill_rows"] for step in result.steps) == 6 * 29
    assert sum(step.values["n_finished"] for step in result.steps) == 6
