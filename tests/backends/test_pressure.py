"""`mode=kv_pressure` and KV budgets, through the command line: causes happen, the text is that of an ample run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kinds import CACHE

from xlpk import run
from xlpk.workload.shared_prefix import SharedPrefix

ARGS = [
    "mode=kv_pressure",
    "run.warmup_steps=0",
    "workload.requests=24",
    "scheduler.max_num_seqs=8",
    "workload.output_len=40",
    "workload.prompt_len=64",
]


def serve(folder: Path, *overrides: str) -> tuple[str, dict[str, float]]:
    """One run in a folder of its own -> its texts and metrics."""
    folder.mkdir(exist_ok=True)
    (folder / "cache").symlink_to(CACHE)
    assert run.main([f"run.outputs={folder}", "tracking=none", *overrides]) == 0
    (made,) = folder.glob("runs/*/*")
    return (made / "text.txt").read_text(), json.loads((made / "metrics.json").read_text())


HEAVY = pytest.mark.heavy


@pytest.mark.parametrize("pressure", [pytest.param(0.25, marks=HEAVY), 0.5, pytest.param(0.75, marks=HEAVY)])
@pytest.mark.parametrize("preemption", ["recompute", pytest.param("swap", marks=HEAVY)])
def test_the_text_does_not_depend_on_the_budget(tmp_path: Path, pressure: float, preemption: str) -> None:
    plain = [text for text in ARGS if not text.startswith("mode")]
    ample, free = serve(tmp_path / "ample", *plain, "mode=serial_decode", "workload=synthetic")
    tight, metrics = serve(
        tmp_path / "tight", *ARGS, f"kv.pressure={pressure}", f"kv.preemption={preemption}", "spec=ngram"
    )
    assert tight == ample
    assert free["kv/preemptions"] == 0
    assert metrics["kv/preemptions"] > 0
    assert metrics["kv/evictions"] > 0
    assert (metrics["kv/moved_bytes"] > 0) == (preemption == "swap")
    assert (metrics["kv/recomputed_tokens"] > 0) == (preemption == "recompute")
    assert metrics["kv/usage.peak"] > 0.9
    # Each prompt is asked for once, whatever came back how often, and different prompts have nothing to find.
    assert metrics["kv/prefix_tokens"] == 24 * 64
    assert metrics["kv/hit_rate"] == 0


@pytest.mark.parametrize(
    ("prefix_len", "suffix_len"),
    [(130, 16), pytest.param(128, 16, marks=HEAVY), (48, 0), pytest.param(15, 5, marks=HEAVY)],
)
def test_the_hit_rate_is_the_exact_one(tmp_path: Path, prefix_len: int, suffix_len: int) -> None:
    """One request at a time, with a warm-up whose prompt is the first one's: it leaves nothing to find."""
    shape = {"requests": 24, "prefixes": 5, "prefix_len": prefix_len, "suffix_len": suffix_len}
    arguments = [f"workload.{key}={value}" for key, value in shape.items()]
    one = ["scheduler.max_num_seqs=1", "workload.output_len=4", "workload.rate_per_s=inf"]
    _, metrics = serve(tmp_path, "mode=serial_decode", "workload=shared_prefix", *arguments, *one)
    workload = SharedPrefix(**shape)
    assert metrics["warmup/steps"] > 0
    assert metrics["kv/hit_rate"] == pytest.approx(workload.expected_hit_rate(16), abs=1e-12)
    assert (metrics["kv/hit_rate"] > 0) == (prefix_len >= 16)
