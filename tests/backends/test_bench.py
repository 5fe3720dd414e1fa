"""`make bench` as a smoke test: the tiny model, one round; a table, then one line of JSON that is also on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xlpk import bench


def test_quick(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--no-peers", "--threads", "1", "--widths", "1,8", "--cache", str(cache)]
    assert bench.main([*options, "--outputs", str(tmp_path)]) == 0
    lines = capfd.readouterr().out.strip().splitlines()
    report = json.loads(lines[-1])
    (written,) = (tmp_path / "bench").glob("*.json")
    assert json.loads(written.read_text()) == report
    (row,) = report["rows"]
    assert lines[1].split()[0] == row["model"] == "tiny"
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "read_gb_per_s", "mbu", "step_us"):
        assert row[name]["least"] > 0
    assert row["width_cost"]["1"]["median"] == 1
    assert row["width_cost"]["8"]["median"] > 0
    assert 0 < row["stored_bytes"] < row["peak_bytes"]
    assert row["phase_us"]["gate_up"] > 0


@pytest.mark.parametrize(
    ("option", "value"),
    [("--models", "huge"), ("--peer-modes", "fast"), ("--rounds", "0"), ("--decode", "1"), ("--widths", "0,8")],
)
def test_refuses(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([option, value]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert option in message
