"""backend=hf: requests come, go and end as in the other backends; pages and steps add up; what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends.hf_sessions import STATIC, gqa_in_float32, opened, ours, served
from backends.test_sampling import make_requests
from drive import CACHE, Output, finish, gather

from xlpk import layout
from xlpk.backend import StepDone
from xlpk.backends.hf import HfBackend
from xlpk.errors import InputError
from xlpk.kv import KV
from xlpk.model import Model, load_model
from xlpk.settings import HfBackend as Choice
from xlpk.settings import Scheduler
from xlpk.speculation import Forced, Greedy, Ngram, Oracle
from xlpk.workload import Request

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch", reason="needs the extra `peers`")
pytest.importorskip("transformers", reason="needs the extra `peers`")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return gqa_in_float32(tmp_path_factory.mktemp("gqa"))


def test_requests_come_and_go(model: Model) -> None:
    """Of many lengths, some late, three places: each has the tokens that it has alone."""
    rng = np.random.default_rng(2)
    requests = [
        Request(i, tuple(rng.integers(0, 1031, 1 + 5 * (i % 4)).tolist()), 2 + 7 * (i % 3), seed=i, temperature=0.9)
        for i in range(10)
    ]
    backend = opened(model, max_num_seqs=3)
    outputs, steps = {i: Output() for i in range(10)}, []
    for request in requests:
        assert backend.submit(request)
        gather(backend.poll(), outputs, steps)
        gather(backend.poll(), outputs, steps)
    give_up = time.monotonic() + 60
    while not all(output.reason for output in outputs.values()):
        assert time.monotonic() < give_up
        gather(backend.poll(), outputs, steps)
    backend.close()
    assert {i: output.tokens for i, output in outputs.items()} == ours(model, requests)
    admitted = [outputs[i].admitted_step for i in range(10)]
    assert admitted == sorted(admitted), "first come, first served"
    assert max(step.values["n_decode"] for step in steps) == 3
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    tight = served(model, requests, max_num_seqs=8, kv=KV(budget="256pages", dtype="fp32"))
    assert tight.tokens == {i: output.tokens for i, output in outputs.items()}


def test_pages_decide_how_many_run(model: Model) -> None:
    """What all of them take, padded to the longest, fits the budget."""
    requests = [Request(0, (1,) * 40, 8, ignore_eos=True), *(Request(i, (i,), 8, ignore_eos=True) for i in range(1, 6))]
    backend = opened(model, kv=KV(budget="8pages", dtype="fp32"))
    try:
        result = finish(backend, requests)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"kv\.budget=8 pages: request 9 needs 9 pages"):
            backend.submit(Request(9, (1,) * 130, 8))
    finally:
        backend.close()
    assert {len(output.tokens) for output in result.outputs.values()} == {8}
    assert max(step.values["n_decode"] for step in result.steps) > 2, "more, once the long one has gone"
    assert all(step.values["n_decode"] <= 2 for step in result.steps if step.values["context_tokens"] > 45)


@pytest.mark.parametrize("spec", [None, Ngram(block=4)], ids=["serial", "ngram"])
def test_every_way_to_end(model: Model, spec: Ngram | None) -> None:
    (request,) = make_requests({"temperature": 1.0}, 1)
    plain = served(model, [request]).tokens[0]

    def ended(**options: Any) -> tuple[str, int]:
        output = served(model, [replace(request, **options)], spec=spec).outputs[0]
        assert output.tokens == plain[: len(output.tokens)]
        return output.reason, len(output.tokens)

    assert ended() == ("length", 40)
    assert ended(stop_token_ids=(plain[20], plain[9])) == (
        "stop",
        1 + min(plain.index(plain[20]), plain.index(plain[9])),
    )
    assert ended(target=tuple(plain[4:7])) == ("target", 7)
    config = replace(model.config, eos_token_ids=(plain[11],))
    twin = replace(model, config=config)
    output = served(twin, [replace(request, ignore_eos=False)], spec=spec).outputs[0]
    assert (output.reason, len(output.tokens)) == ("eos", plain.index(plain[11]) + 1)


def test_nan_ends_a_request(model: Model) -> None:
    backend = opened(model)
    backend._passes.net.model.norm.weight.data[:] = float("nan")
    for options in ({}, {"temperature": 1.0}):
        output = finish(backend, [Request(0, (1, 2), 4, **options)]).outputs[0]  # type: ignore[arg-type]
        assert (output.reason, output.tokens) == ("error", [])
    backend.close()


def test_cancel(model: Model) -> None:
    backend = opened(model, max_num_seqs=2)
    requests = [Request(i, (3, 4, 5 + i), 30, ignore_eos=True) for i in range(5)]
    outputs, steps = {i: Output() for i in range(5)}, []
    for request in requests:
        assert backend.submit(request)
    gather(backend.poll(), outputs, steps)  # the prompt of 0; 1 waits for its own step
    for request_id in (4, 1, 99):
        backend.cancel(request_id)
    for _ in range(8):
        gather(backend.poll(), outputs, steps)
    backend.cancel(0)
    give_up = time.monotonic() + 60
    while not all(output.reason for output in outputs.values()):
        assert time.monotonic() < give_up
        gather(backend.poll(), outputs, steps)
    backend.close()
    assert [outputs[i].reason for i in range(5)] == ["cancelled", "cancelled", "length", "length", "cancelled"]
    assert 0 < len(outputs[0].tokens) < 30
    assert not outputs[1].tokens
    alone = ours(model, requests)
    assert {i: outputs[i].tokens for i in (2, 3)} == {i: alone[i] for i in (2, 3)}
    assert backend.close() is backend.close()


def test_the_ring_is_full(model: Model) -> None:
    backend = opened(model, max_num_seqs=1)
    for i in range(Scheduler.max_waiting):
        assert backend.submit(Request(i, (1,), 1))
    assert not backend.submit(Request(Scheduler.max_waiting, (1,), 1))
    backend.poll()
    assert backend.submit(Request(Scheduler.max_waiting, (1,), 1))
    backend.close()


def test_refused_requests_leave_the_loop_well(model: Model) -> None:
    backend = opened(model)
    for request in (Request(1, (), 4), Request(1, (1,) * 500, 13), Request(1, (2048,), 4), Request(1, (1,), 0)):
        with pytest.raises(InputError):
            backend.submit(request)
    assert finish(backend, [Request(2, (1, 2), 3, ignore_eos=True)]).outputs[2].reason == "length"  # type: ignore[arg-type]
    backend.close()


@pytest.mark.parametrize("choice", [None, STATIC], ids=["dynamic", "static"])
def test_steps_account_for_every_page_and_token(model: Model, choice: Choice | None) -> None:
    requests = [Request(i, tuple(range(1, 10 + 5 * i)), 12 - i, ignore_eos=True) for i in range(4)]
    result = served(model, requests, choice)
    fields = {name for name, _, _ in layout.STEP_RECORD.fields} - {"phase_ns"}
    for step in result.steps:
        assert isinstance(step, StepDone)
        values = step.values
        assert set(values) == fields
        assert values["pages_free"] + values["pages_active"] + values["pages_draft"] == values["pages_total"] == 256
        assert values["n_rows"] == values["n_prefill_rows"] + values["n_decode_rows"] + values["n_draft_rows"]
        assert values["end_ns"] > values["begin_ns"]
        assert sum(step.phase_ns.values()) == values["end_ns"] - values["begin_ns"]
        assert values["live_tokens"] <= 16 * values["live_pages"]
    totals = {name: sum(step.values[name] for step in result.steps) for name in ("n_tokens", "n_finished")}
    assert totals == {"n_tokens": 12 + 11 + 10 + 9, "n_finished": 4}
    assert sum(step.values["n_prefill_rows"] for step in result.steps) == sum(len(r.prompt) for r in requests)
    if choice is STATIC:
        assert {step.values["pages_active"] for step in result.steps} == {32}, "512 positions, all the time"


@pytest.mark.parametrize(
    ("choice", "options", "message"),
    [
        (Choice(), {"spec": Oracle()}, "spec=oracle: ngram"),
        (Choice(), {"spec": Ngram(min_n=2)}, "spec.min_n=2: 1 with"),
        (Choice(), {"spec": Ngram(), "acceptance": Forced()}, "acceptance=forced: keyed"),
        (Choice(cache="static"), {"spec": Ngram()}, "backend.cache=static: mode=serial_decode"),
        (Choice(compile=True), {}, "backend.compile=true: false with backend.cache=dynamic"),
        (Choice(cache="paged"), {}, "backend.cache=paged: one of dynamic, static"),
        (Choice(dtype="int8"), {}, "backend.dtype=int8: one of auto, bf16"),
        (Choice(device="tpu"), {}, "backend.device=tpu: one of auto, cpu, cuda"),
        (Choice(threads=-1), {}, "backend.threads=-1: 0 to 1024"),
    ],
)
def test_refused_options(choice: Choice, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        HfBackend(choice, cache=CACHE, **options)
    assert str(refused.value).startswith(message)


def test_refused_when_it_opens_or_submits(model: Model) -> None:
    with pytest.raises(InputError, match=r"kv\.dtype=bf16: auto"):
        opened(model, kv=KV(dtype="bf16"))
    backend = opened(model, spec=Ngram(), acceptance=Greedy())
    assert backend.submit(Request(0, (1,), 1))
    with pytest.raises(InputError, match="acceptance=greedy: keyed"):
        backend.submit(Request(1, (1,), 1, temperature=0.5))
    backend.close()


def test_the_command_line(tmp_path: Path) -> None:
    """One override compares: the same log, the same keys but for what nobody counts, a stop string cut off."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "cache").symlink_to(CACHE)
    options = ["tracking=none", "workload.requests=2", "sampling.max_new_tokens=60", "kv.dtype=auto"]
    command = [sys.executable, "-m", "xlpk.run", "-m", "backend=cpu,hf", "mode=serial_decode", *options]
    done = subprocess.run([*command, "sampling.stop=['file-like']"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    points = sorted((tmp_path / "outputs" / "sweeps").glob("*/*/[01]"))
    cpu, peer = (json.loads((point / "metrics.json").read_text()) for point in points)
    for metrics in (cpu, peer):
        assert metrics["requests/finished_stop"] >= 1
        assert metrics["requests/overrun_tokens"] >= 0
        assert metrics["device_latency/itl_ms.n"] > 0
        assert metrics["kv/active_bytes.peak"] > 0
    counted = {
        key
        for key in cpu
        if key.startswith(("host/", "phase/", "kv/prefix_", "kv/hit_rate")) or key == "loop/device_idle_share"
    }
    phases = {f"phase/{name}_{what}" for name in ("forward", "control") for what in ("ms.mean", "share")}
    assert cpu.keys() - peer.keys() == counted - phases
    assert peer.keys() - cpu.keys() == {
        "phase/forward_ms.mean", "phase/forward_share", "phase/forward_bytes", "phase/forward_gb_per_s",
    }  # fmt: skip
    assert peer["phase/forward_bytes"] > peer["loop/steps"] * load_model("tiny").config.bytes_per_token("bf16")
    text = (points[1] / "text.txt").read_text()
    assert "file-like" not in text.split("completion\n")[1]
    build = json.loads((points[1] / "build.json").read_text())["backend"]
    assert (build["device"], build["cache"], build["dtype"]) == ("cpu", "dynamic", "bf16")
    assert "not counted" not in done.stderr


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xlpk.run", "backend=hf", "backend.device=cuda", "tracking=none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert done.returncode == 3
    assert "backend.device=cuda: this torch sees no GPU" in done.stderr
