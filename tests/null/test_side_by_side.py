"""mode=mega_kernel_sim: three orchestrations in one run, from the command line; no compiler, every output marked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from xlpk import record, side_by_side
from xlpk.errors import InputError
from xlpk.hardware import ORCHESTRATIONS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backend=cpu"], "backend=cpu: simulated in mode=mega_kernel_sim"),
        (["backend.orchestration=graph"], "backend.orchestration=graph"),
        (["backend.costs=x.yaml"], "backend.costs=x.yaml"),
    ],
)
def test_the_comparison_takes_no_other_backend(overrides: list[str], message: str) -> None:
    from hydra import compose, initialize_config_module

    from xlpk import config

    config.register()
    with initialize_config_module("xlpk.conf", version_base="1.3"):
        cfg = compose("config", ["mode=mega_kernel_sim", *overrides])
    with pytest.raises(InputError, match=message):
        config.validate(cfg)


def test_side_by_side_without_a_compiler_and_tagged_in_every_output(tmp_path: Path) -> None:
    """One process with nothing on its PATH: three orchestrations, one table, one picture, every answer marked."""
    command = [sys.executable, "-m", "xlpk.run", "mode=mega_kernel_sim", "tracking=none", f"run.outputs={tmp_path}"]
    small = ["workload.requests=6", "workload.output_len=12", "workload.rate_per_s=100"]
    done = subprocess.run(
        [*command, *small], capture_output=True, text=True, check=False, env={"PATH": "", "HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("runs/*/*")
    assert not (tmp_path / "cache").exists()  # nothing was built
    assert "SYNTHETIC" in done.stdout.splitlines()[1]
    assert (folder / "text.txt").read_text().startswith("SYNTHETIC")
    status = json.loads((folder / "status.json").read_text())
    assert status["synthetic"] is True
    from xlpk.mlflow_fields import tags_of

    assert tags_of(folder, status)["synthetic"] == "true"
    found = json.loads((folder / "metrics.json").read_text())
    assert found["simulated/synthetic"] == 1
    for name in ORCHESTRATIONS:
        for key in (
            "latency/ttft_ms.p50",
            "latency/itl_ms.p50",
            "host/launches",
            "host/syncs",
            "loop/device_idle_share",
        ):
            assert f"{name}/{key}" in found
        assert sum(value for key, value in found.items() if key.startswith(f"{name}/waterfall/")) == pytest.approx(
            2 * found[f"{name}/waterfall/token_ms"]
        )
        assert (folder / side_by_side.log_name(name)).exists()
    assert found["persistent/latency/ttft_ms.mean"] == found["latency/ttft_ms.mean"]
    assert found["persistent/latency/itl_ms.p50"] < found["graph/latency/itl_ms.p50"]
    assert found["graph/latency/itl_ms.p50"] < found["launched/latency/itl_ms.p50"]
    assert found["launched/host/launches"] > 50 * found["graph/host/launches"]
    assert "where a token's time goes" in done.stdout
    assert (folder / side_by_side.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert set(record.MORE_FILES) >= {side_by_side.FIGURE, *side_by_side.LOGS}
