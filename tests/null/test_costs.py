"""What steps cost: the formula against sums by hand, parts against the whole, published figures against the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from xlpk import layout
from xlpk.costs import KNOTS, CostFile, StepCosts, at_knots, priced, read_costs, write_costs
from xlpk.errors import InputError
from xlpk.hardware import ORCHESTRATIONS, Hardware, calibrated, hardware_costs, phases_of_step
from xlpk.kv import KV, KVPlan
from xlpk.model import SHAPES

MODEL = SHAPES["llama_1b_shape"]
PLAN = KVPlan.make(KV(budget="1GiB"), MODEL, "bf16", 4096)
CURVE = tuple(float(10 * knot) for knot in KNOTS)
SMALL = StepCosts(
    fixed_ns=1000.0,
    row_ns=CURVE,
    sample_ns=(5.0, 5.0, 25.0, *[25.0] * 9),
    context_ns=2.0,
    attended_ns=0.25,
    move_ns=300.0,
    control_ns=70.0,
    control_row_ns=1.5,
)


def h200() -> Hardware:
    """By the figures of conf/hardware/h200.yaml."""
    import yaml

    text = (Path(__file__).parents[2] / "conf" / "hardware" / "h200.yaml").read_text()
    return Hardware(**yaml.safe_load(text))


def test_a_step_is_the_sum_by_hand() -> None:
    # 1000 + 30 + (5 + 20 / 2) + 2 x 40 + 0.25 x 50 + 300 x 2 + 70 + 1.5 x 3 = 1812
    assert SMALL.exact_ns(3, 3, 40, 50, 2) == 1000 + 30 + 15 + 80 + 12.5 + 600 + 70 + 4.5
    assert SMALL.step_ns(3, 3, 40, 50, 2) == 1812


def test_halves_round_up() -> None:
    assert StepCosts(fixed_ns=2.5).step_ns(1) == 3
    assert StepCosts(fixed_ns=2.49).step_ns(1) == 2


@pytest.mark.parametrize(
    ("n", "expected"), [(0, 0.0), (1, 5.0), (2, 5.0), (3, 15.0), (4, 25.0), (2048, 25.0), (5000, 25.0)]
)
def test_curves_are_linear_between_knots(n: int, expected: float) -> None:
    assert at_knots(SMALL.sample_ns, n) == expected


def test_curves_go_on_with_their_last_slope() -> None:
    values = (*[0.0] * 11, 1024.0)
    assert at_knots(values, 2048 + 512) == 1024.0 + 512.0


def test_sums_are_field_by_field() -> None:
    double = SMALL + SMALL
    assert double.step_ns(3, 3, 40, 50, 2) == 2 * 1812
    assert double.sample_ns[2] == 50.0


def test_the_record_is_the_layouts() -> None:
    record = SMALL.record()
    assert record.dtype == layout.STEP_COSTS.dtype
    assert float(record["move_ns"]) == 300.0
    assert np.array_equal(record["row_ns"], CURVE)


def test_files_come_back(tmp_path: Path) -> None:
    write_costs(tmp_path / "costs.yaml", CostFile(SMALL, "tiny", "persistent", {"fit": {"steps": 7}}))
    found = read_costs(tmp_path / "costs.yaml")
    assert (found.costs, found.model, found.orchestration) == (SMALL, "tiny", "persistent")
    assert found.facts == {"fit": {"steps": 7}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (("fixed_ns: 1000.0", "fixed_ns: -1"), "fixed_ns"),
        (("fixed_ns: 1000.0", "fixed_ns: .nan"), "fixed_ns"),
        (("fixed_ns: 1000.0", "fixed_ns: fast"), "fixed_ns"),
        (("fixed_ns: 1000.0", "fixed_us: 1"), "fixed_us"),
        (("  - 10.0\n", ""), "row_ns"),
        (("version: 1", "version: 2"), "version"),
        (("costs:", "prices:"), "backend.costs"),
        (("version: 1", "version: [1"), "backend.costs"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path: Path, change: tuple[str, str], field: str) -> None:
    path = tmp_path / "costs.yaml"
    write_costs(path, CostFile(SMALL, "tiny", "persistent", {}))
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change, 1))
    with pytest.raises(InputError) as caught:
        read_costs(path)
    assert field in caught.value.field
    assert "costs.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(InputError, match=r"backend\.costs=nowhere\.yaml"):
        read_costs(Path("nowhere.yaml"))


@pytest.mark.parametrize("orchestration", ORCHESTRATIONS)
@pytest.mark.parametrize("rows", [1, 8, 64, 512])
def test_parts_sum_to_the_whole(orchestration: str, rows: int) -> None:
    found = hardware_costs(MODEL, "bf16", PLAN, h200(), orchestration)
    step = {
        "n_rows": rows,
        "n_sample_rows": min(rows, 64),
        "context_tokens": 9000,
        "attended_tokens": 90_000,
        "n_moves": 3,
        "n_filter_rows": 5,
    }
    parts = [priced(part, step) for part in found.parts.values()]
    assert sum(parts) == pytest.approx(priced(found.costs, step), rel=1e-12)
    assert all(part > 0 for part in parts)


def test_one_row_reads_each_weight_once() -> None:
    """2.471 GB over 4.8 TB/s x 0.9 is 572 us, and a barrier for each of 82 phases and control's: 83 x 2.2 us."""
    found = hardware_costs(MODEL, "bf16", PLAN, h200(), "persistent")
    step = {"n_rows": 1, "n_sample_rows": 1}
    assert priced(found.parts["weights"], step) == pytest.approx(MODEL.bytes_per_token("bf16") / 4320, rel=1e-4)
    assert phases_of_step(16) == 82
    assert priced(found.parts["barrier"], step) == 83 * 2200
    assert found.parts["compute"].exact_ns(1, 1) == 0


def test_a_wide_step_is_bound_by_products() -> None:
    """512 rows: 2 operations a weight and row over 989.4 Tflop/s x 0.6, of the layers' matrices."""
    found = hardware_costs(MODEL, "bf16", PLAN, h200(), "persistent")
    layers = sum(size for name, size in MODEL.phase_bytes("bf16").items() if name != "lm_head")
    both = found.parts["weights"].exact_ns(512, 0) + found.parts["compute"].exact_ns(512, 0)
    assert both == pytest.approx(512 * layers / (989.4e3 * 0.6), rel=1e-9)


def test_context_costs_its_bytes() -> None:
    found = hardware_costs(MODEL, "bf16", PLAN, h200(), "persistent")
    assert PLAN.token_bytes == 16 * 2 * 8 * 64 * 2
    assert found.costs.context_ns == pytest.approx(PLAN.token_bytes / 4320)
    assert found.costs.attended_ns == pytest.approx(4 * 32 * 64 * 16 / (989.4e3 * 0.6))


def test_launches_hide_behind_a_busy_device_and_show_beside_an_idle_one() -> None:
    machine = h200()
    found = hardware_costs(MODEL, "bf16", PLAN, machine, "launched").parts["launch"]
    assert found.exact_ns(1) == pytest.approx(1e3 * (82 * machine.kernel_gap_us + machine.launch_us))
    slow = replace(machine, launch_us=20.0)
    late = hardware_costs(MODEL, "bf16", PLAN, slow, "launched")
    busy_us = MODEL.bytes_per_token("bf16") / 4320 / 1e3
    assert late.parts["launch"].exact_ns(1) == pytest.approx(1e3 * (82 * 20 - busy_us), rel=1e-3)
    assert late.parts["launch"].exact_ns(512) < late.parts["launch"].exact_ns(1)


def test_persistent_is_the_fastest_and_launches_cost_more_than_a_graph() -> None:
    one = [hardware_costs(MODEL, "bf16", PLAN, h200(), name).costs.step_ns(1, 1) for name in ORCHESTRATIONS]
    assert one[0] < one[2] < one[1]


def test_published_times_come_out() -> None:
    """Llama-3.2-1B at batch 1 on an H200, the figures that the barrier and the graph's gap were calculated from."""
    persistent, _, graph = (hardware_costs(MODEL, "bf16", PLAN, h200(), name).costs for name in ORCHESTRATIONS)
    assert persistent.step_ns(1, 1) == pytest.approx(759.8e3, rel=0.02)
    assert graph.step_ns(1, 1) == pytest.approx(794.7e3, rel=0.05)


def test_measured_costs_are_split_into_what_a_fit_tells_apart() -> None:
    found = calibrated(SMALL)
    step = {"n_rows": 3, "n_sample_rows": 3, "context_tokens": 40, "attended_tokens": 50, "n_moves": 2}
    assert sum(priced(part, step) for part in found.parts.values()) == priced(SMALL, step)
    assert set(found.phases) == {"forward", "control"}
    assert priced(found.phases["control"], step) == 74.5


@pytest.mark.parametrize(
    ("key", "value"), [("memory_share", 0.0), ("barrier_us", -1.0), ("memory_gb_per_s", float("inf"))]
)
def test_impossible_hardware_is_refused(key: str, value: float) -> None:
    with pytest.raises(InputError, match=f"hardware.{key}="):
        replace(Hardware(), **{key: value}).check()


def test_every_machine_composes() -> None:
    from hydra import compose, initialize_config_module

    from xlpk import config

    config.register()
    with initialize_config_module("xlpk.conf", version_base="1.3"):
        for name in config.options("hardware"):
            chosen = config.validate(compose("config", [f"hardware={name}", "backend=simulated"])).hardware
            assert chosen.name == name
