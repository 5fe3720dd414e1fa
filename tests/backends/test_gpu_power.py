"""A run on a device whose power is measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import kinds
import pynvml_double
import pytest
from backends.test_faults import QUIET
from backends.test_modes import only_run, xlpk

from xlpk import record

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("kind", kinds.GPU, indirect=True)
def test_joules_per_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """250 W, by the library's double: joules a token times tokens a second."""
    if kinds.real_driver():
        pytest.skip("the device has a power of its own")
    (tmp_path / "modules").mkdir()
    shutil.copy(pynvml_double.__file__, tmp_path / "modules" / "pynvml.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=":")
    xlpk(tmp_path, *QUIET, "workload=synthetic", "workload.requests=100", "workload.output_len=128")
    metrics = record.read_json(only_run(tmp_path) / record.METRICS)
    assert metrics["system/sm_clock_mhz.mean"] == 1980
    watts = metrics["system/joules_per_token"] * metrics["throughput/tokens_per_s"]
    assert watts == pytest.approx(pynvml_double.WATTS, rel=0.1)
