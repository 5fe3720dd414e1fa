"""Fleets of compiled control planes behind a router, and what a simulation refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stages.simulations import COSTS, LIMITS, PLAN, arrivals, mixed, run

from xlpk.backends import simulate as sim
from xlpk.backends.memory import Limits
from xlpk.errors import BackendError, InputError
from xlpk.speculation import Ngram
from xlpk.toolchain import kernels_folder


def of_instance(done: sim.Simulation, instance: int) -> tuple[sim.Requests, np.ndarray[Any, Any]]:
    mine = done.outcomes["instance"] == instance
    return sim.Requests(done.requests.table[mine], block_tokens=done.requests.block_tokens), done.outcomes[mine]


def test_the_same_again_byte_by_byte() -> None:
    for router in sim.ROUTERS:
        one, two = (
            run(mixed(500, 8000.0), instances=3, router=router, spec=Ngram(), acceptance_rate=0.5) for _ in range(2)
        )
        assert one.outcomes.tobytes() == two.outcomes.tobytes()
        assert one.totals.tobytes() == two.totals.tobytes()
        assert (one.end_ns, one.rounds) == (two.end_ns, two.rounds)
    other = run(mixed(500, 8000.0), instances=3, router=router, spec=Ngram(), acceptance_rate=0.5, seed=1)
    assert other.outcomes.tobytes() != one.outcomes.tobytes()


@pytest.mark.parametrize("router", list(sim.ROUTERS))
def test_each_instance_of_a_fleet_does_what_it_would_do_alone(router: str) -> None:
    """Its requests alone, on one instance: the same times, whatever the others do. A fleet of one is that instance."""
    workload = sim.requests(arrivals(900, 20000.0, 5), 64, 16, share=False)
    fleet = run(workload, instances=4, router=router, limits=Limits(8, 64, 32, 1024))
    assert set(fleet.outcomes["instance"]) == set(range(4))
    for instance in range(4):
        requests, outcomes = of_instance(fleet, instance)
        alone = run(requests, limits=Limits(8, 64, 32, 1024))
        for name in ("seen_ns", "admitted_ns", "first_token_ns", "last_token_ns", "finished_ns", "n_output"):
            assert (alone.outcomes[name] == outcomes[name]).all(), (instance, name)
        assert alone.total("busy_ns") == fleet.totals["busy_ns"][instance]
    one, same = (run(workload, router=name) for name in (router, "round_robin"))
    assert one.outcomes.tobytes() == same.outcomes.tobytes()


def test_routers_do_what_they_are_for() -> None:
    """Least outstanding waits less than in turn where lengths differ; prefix affinity finds more than either."""
    rng = np.random.default_rng(0)
    count, shared = 4000, 256
    workload = sim.requests(
        arrivals(count, 12000.0, 1),
        shared + rng.integers(1, 64, count),
        rng.geometric(1 / 40, count).clip(1, 400),
        blocks=rng.integers(0, 24, count),
        n_blocks=1,
        block_tokens=shared,
    )
    plan, limits = replace(PLAN, pages=400), Limits(8, 128, 64, 4096)
    done = {router: run(workload, limits=limits, plan=plan, instances=4, router=router) for router in sim.ROUTERS}
    waits = {router: float((one.outcomes["admitted_ns"] - workload.arrival_ns).mean()) for router, one in done.items()}
    hits = {router: one.total("cached_tokens") for router, one in done.items()}
    assert waits["least_outstanding"] < 0.6 * waits["round_robin"]
    assert hits["prefix_affinity"] > 1.25 * max(hits["least_outstanding"], hits["round_robin"])
    turns = np.arange(count) % 4
    assert (done["round_robin"].outcomes["instance"] == turns).all()
    # One prefix alone would all go to one instance; the bound on its load spreads them.
    same = sim.requests(arrivals(1000, 12000.0, 2), 300, 20, blocks=np.zeros(1000), n_blocks=1, block_tokens=shared)
    loads = run(same, limits=limits, plan=plan, instances=4, router="prefix_affinity").totals["requests"]
    assert loads.min() > 0
    unbounded = run(same, limits=limits, plan=plan, instances=4, router="prefix_affinity", affinity_percent=10**6)
    assert sorted(unbounded.totals["requests"]) == [0, 0, 0, 1000]


@pytest.mark.heavy
def test_a_million_requests_are_served_in_bounded_memory() -> None:
    """128 in, 64 out over a fleet of 8: all of them, and what the process holds is little beside their prompts."""
    import resource

    count = 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    workload = sim.requests(arrivals(count, 20000.0, 0), 128, 64)
    done = run(workload, instances=8, plan=replace(PLAN, max_len=256))
    assert (done.total("rows"), done.total("tokens")) == (count * 191, count * 64)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 3 * 128 * count / 2**20  # prompts alone are 488 MiB


def refused(message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message):
        run(options.pop("workload", sim.requests([0], 8, 8)), **options)


def test_what_cannot_run_is_refused() -> None:
    refused("instances=0: 1 to", instances=0)
    refused("router=random: one of round_robin", router="random")
    refused("acceptance_rate=1.5: 0 to 1", acceptance_rate=1.5)
    refused("affinity_blocks=0", affinity_blocks=0)
    refused("affinity_percent=99", affinity_percent=99)
    refused("requests=1032 tokens: at most 1024", workload=sim.requests([0], 1024, 8))
    refused("requests=96 tokens: at most 64", workload=sim.requests([0], 88, 8), plan=replace(PLAN, pages=4))
    refused("requests=0 tokens", workload=sim.requests([0], 8, 0))
    for columns in ({"arrival_ns": [5, 4]}, {"arrival_ns": []}, {"arrival_ns": [-1]}):
        with pytest.raises(InputError, match="by arrival"):
            sim.requests(prompt_len=8, max_new_tokens=8, **columns)
    with pytest.raises(InputError, match="tokens=3: as many as"):
        sim.requests([0], 8, 8, tokens=np.zeros(3, np.int32))
    with pytest.raises(InputError, match="blocks=0: as many as"):
        sim.requests([0], 8, 8, n_blocks=2)


@pytest.mark.heavy
def test_an_abort_names_instance_and_reason(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(kernels_folder(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    pages = (folder / "stages" / "pages.h").read_text()
    broken = pages.replace("  --state.n_refs;\n", "")
    assert broken != pages
    (folder / "stages" / "pages.h").write_text(broken)
    with pytest.raises(BackendError, match=r"simulated instance 0 at .* ns: page_conservation"):
        sim.simulate(tmp_path, sim.requests([0], 40, 8), COSTS.record(), PLAN, LIMITS, folder=folder)
