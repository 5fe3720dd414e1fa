"""The power meter against a double of the management library, and the metrics of its samples."""

from __future__ import annotations

import importlib.machinery
import sys
import time
from pathlib import Path
from types import ModuleType

import pynvml_double
import pytest
from test_metrics import LOG

from xlpk import metrics
from xlpk.backends.power import PowerMeter

MS = 1_000_000


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(pynvml_double, "__spec__", importlib.machinery.ModuleSpec("pynvml", None))
    monkeypatch.setitem(sys.modules, "pynvml", pynvml_double)
    return pynvml_double


def meter_of(uuid: str, at_least: int) -> PowerMeter:
    """A meter that has stopped, with so many samples unless it gives none."""
    meter = PowerMeter(uuid)
    meter.start()
    give_up = time.monotonic() + 120
    while len(meter.samples) < at_least:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    meter.stop()
    return meter


@pytest.mark.parametrize("counts", [True, False])
def test_samples(nvml: ModuleType, monkeypatch: pytest.MonkeyPatch, counts: bool) -> None:
    monkeypatch.setattr(nvml, "counts_energy", counts)
    samples = meter_of("GPU-1", 3).samples
    times = [sample["host_ns"] for sample in samples]
    assert times == sorted(times)
    for sample in samples:
        assert (sample["power_w"], sample["sm_clock_mhz"], sample["temperature_c"]) == (250.0, 1980, 41)
        assert ("energy_j" in sample) is counts
    assert nvml.sessions == 0


def test_no_library_and_no_device(nvml: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert meter_of("none of its devices", 0).samples == []
    assert nvml.sessions == 0
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert meter_of("GPU-1", 0).samples == []


def power(at_ms: float, watts: float, joules: float | None = None) -> dict[str, object]:
    energy = {} if joules is None else {"energy_j": joules}
    common = {"event": "power", "host_ns": round(at_ms * MS), "sm_clock_mhz": 1000 + watts, "temperature_c": 40}
    return {**common, "power_w": watts, **energy}


def window() -> tuple[float, float, int]:
    """First arrival and last token in ms, and the output tokens, of the log of test_metrics."""
    tokens = [event for event in LOG if event["event"] == "token" and not event.get("warmup")]
    arrivals = [event for event in LOG if event["event"] == "arrival"]
    begin_ns, end_ns = min(a["host_ns"] for a in arrivals), max(t["host_ns"] for t in tokens)
    return begin_ns / MS, end_ns / MS, len(tokens)


def test_metrics_of_the_window() -> None:
    begin, end, n_tokens = window()
    middle = (begin + end) / 2
    inside = [power(begin, 100), power(middle, 300), power(end, 100)]
    found = metrics.compute([*LOG, power(begin - 5, 900), *inside, power(end + 5, 900)])
    assert found["system/power_w.peak"] == 300
    assert found["system/power_w.mean"] == pytest.approx(500 / 3)
    assert found["system/sm_clock_mhz.peak"] == 1300
    assert found["system/temperature_c.mean"] == 40
    assert found["system/joules_per_token"] == pytest.approx(200 * (end - begin) / 1e3 / n_tokens)


def test_the_energy_counter_comes_before_the_power() -> None:
    begin, end, n_tokens = window()
    quarter = (end - begin) / 4
    samples = [power(begin + quarter, 100, 7000.0), power(end - quarter, 100, 7000.5)]
    found = metrics.compute([*LOG, *samples])
    assert found["system/joules_per_token"] == pytest.approx(0.5 * 2 / n_tokens)  # half the window was seen


def test_too_few_samples() -> None:
    begin, _, _ = window()
    for samples in ([], [power(begin, 100)]):
        assert not [key for key in metrics.compute([*LOG, *samples]) if key.startswith("system/")]


def test_each_is_defined() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    begin, end, _ = window()
    made = metrics.compute([*LOG, power(begin, 1), power(end, 1)])
    named = {key.partition(".")[0] for key in made if key.startswith("system/")}
    assert len(named) == 4
    assert all(f"`{key}`" in page for key in named)
