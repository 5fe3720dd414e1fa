"""Every mode on every workload, through the command line: the tokens are those of an ample run of one request at a
time, without drafts, sharing or pressure; and what a mode is there for happened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kinds
import numpy as np
import pytest

from xlpk import run

REQUESTS = 10
# All arrive while the first is served, however fast the loop is: else whether they meet is a matter of time.
LONG = ["workload.prompt_len=24", "workload.output_len=44"]  # outputs need the pages, not prompts
TRAFFIC = [f"workload.requests={REQUESTS}", "workload.rate_per_s=100000", *LONG]
WORKLOADS: dict[str, list[str]] = {
    "prompts": ["sampling.max_new_tokens=48", "sampling.ignore_eos=true"],
    "synthetic": [f"workload.requests={REQUESTS}", *LONG],
    "poisson": [*TRAFFIC, "workload.length_cv=0.4"],
    "gamma": [*TRAFFIC, "workload.range_ratio=0.3"],
    "constant": [*TRAFFIC, "workload.text=heldout"],
    "trace": ["workload.block_size=16", "workload.scale=0.0002"],
    "sharegpt": [f"workload.requests={REQUESTS}", "workload.rate_per_s=100000", "workload.output_len=80"],
    "shared_prefix": [
        *(f"workload.requests={REQUESTS}", "workload.prefixes=2", "workload.prefix_len=18", "workload.suffix_len=4"),
        *("workload.output_len=90", "workload.rate_per_s=100000"),
    ],
}
SHARED = ("trace", "shared_prefix")  # prompts begin as others do
AMPLE = ["mode=serial_decode", "scheduler.max_num_seqs=1", "kv.prefix_sharing=false"]
PRESSURES = {
    f"kv_pressure-{share}-{how}": ["mode=kv_pressure", f"kv.pressure={share}", f"kv.preemption={how}"]
    for share in (0.25, 0.5, 0.75)
    for how in ("recompute", "swap")
}
MODES: dict[str, list[str]] = {
    "serial_decode": ["mode=serial_decode"],
    "speculative_decode": ["mode=speculative_decode"],
    "forced_rejection": ["mode=forced_rejection", "spec.block=4"],
    **PRESSURES,
    "kv_pressure-0.5-drafts": ["mode=kv_pressure", "spec=ngram", "kv.eviction=slru"],
}
QUICK = {("poisson", "kv_pressure-0.5-swap")}
CASES = [
    pytest.param("cpu", workload, mode, marks=() if (workload, mode) in QUICK else pytest.mark.heavy)
    for workload in WORKLOADS
    for mode in MODES
]
ON_GPU = [("poisson", "kv_pressure-0.25-recompute"), ("poisson", "kv_pressure-0.5-swap")]
ON_GPU += [("shared_prefix", "kv_pressure-0.5-drafts"), ("sharegpt", "forced_rejection"), ("trace", "serial_decode")]
CASES += [pytest.param(kind, *case, marks=pytest.mark.heavy) for kind in kinds.GPU for case in ON_GPU]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Overrides that name the files of the workloads that need one."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.RandomState(5)
    prompts = [f"def f{i}(" + "ab, " * (i % 4) for i in range(REQUESTS)]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    rows = [
        {
            "timestamp": 40 * i,
            "input_length": 20 + i,
            "output_length": 90,
            "hash_ids": [i % 2, 10 + i, 30 + i][: (35 + i) // 16],
        }
        for i in range(REQUESTS)
    ]
    (folder / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["the", "list", "of", "items", "that", "return", "self", "value", "for", "each", "name", "in", "range"]
    talk = [
        {
            "id": str(i),
            "conversations": [
                {"from": "human", "value": " ".join(rng.choice(words, 8))},
                {"from": "gpt", "value": " ".join(rng.choice(words, 24))},
            ],
        }
        for i in range(REQUESTS + 4)
    ]
    (folder / "share.json").write_text(json.dumps(talk))
    return {
        "prompts": [f"workload.file={folder / 'prompts.txt'}", "workload.prompt=null"],
        "trace": [f"workload.file={folder / 'trace.jsonl'}"],
        "sharegpt": [f"workload.file={folder / 'share.json'}"],
    }


def serve(folder: Path, *overrides: str) -> tuple[dict[int, list[int]], list[dict[str, Any]], dict[str, float]]:
    """One run -> tokens by request, its steps, its metrics."""
    folder.mkdir(exist_ok=True)
    (folder / "cache").symlink_to(kinds.CACHE)
    common = ["tracking=none", "run.warmup_steps=0", "sampling.temperature=0.7"]
    backend = [] if kinds.current == "cpu" else [f"backend={kinds.current}"]
    assert run.main([f"run.outputs={folder}", *common, *backend, *overrides]) == 0
    (made,) = folder.glob("runs/*/*")
    tokens: dict[int, list[int]] = {}
    steps = []
    for event in map(json.loads, (made / "events.jsonl").read_text().splitlines()):
        if event["event"] == "token":
            tokens.setdefault(event["request_id"], []).append(event["token"])
        elif event["event"] == "step":
            steps.append(event)
    return tokens, steps, json.loads((made / "metrics.json").read_text())


@pytest.fixture(scope="module")
def ample(files: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Workload -> the tokens of its ample, unbatched run on the CPU."""
    known: dict[str, dict[int, list[int]]] = {}

    def tokens(workload: str) -> dict[int, list[int]]:
        if workload not in known:
            folder = tmp_path_factory.mktemp(workload)
            overrides = [f"workload={workload}", *WORKLOADS[workload], *files.get(workload, [])]
            with kinds.on("cpu"):
                known[workload], steps, metrics = serve(folder, *AMPLE, *overrides)
            assert max(step["n_prefill"] + step["n_decode"] for step in steps) == 1
            assert metrics["kv/preemptions"] == metrics["kv/evictions"] == 0
            assert "kv/prefix_hit_tokens" not in metrics
            assert not any(step["n_draft_rows"] for step in steps)
        return known[workload]

    return tokens


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    with kinds.on(request.param):
        yield request.param


@pytest.mark.parametrize(("kind", "workload", "mode"), CASES, indirect=["kind"])
def test_the_tokens_are_those_of_an_ample_unbatched_run(
    kind: str, workload: str, mode: str, files: dict[str, list[str]], ample: Any, tmp_path: Path
) -> None:
    expected = ample(workload)
    batch = ["scheduler.max_num_seqs=8", f"workload={workload}", *WORKLOADS[workload], *files.get(workload, [])]
    tokens, steps, metrics = serve(tmp_path / "run", *MODES[mode], *batch)
    assert tokens == expected
    assert len(tokens) == REQUESTS
    assert max(step["n_prefill"] + step["n_decode"] for step in steps) > 1, "requests met in a step"
    drafts, accepted = (sum(step[name] for step in steps) for name in ("n_draft_rows", "n_accepted"))
    if "spec" in mode or "rejection" in mode or "drafts" in mode:
        assert 0 < accepted < drafts
    else:
        assert drafts == 0
    if mode.startswith("kv_pressure"):
        assert metrics["kv/preemptions"] > 0
        assert (metrics["kv/moved_bytes"] > 0) == ("swap" in mode)
        assert metrics["kv/evictions"] > 0
        assert metrics["kv/usage.peak"] > 0.9
        if "recompute" in mode:
            assert metrics["kv/recomputed_tokens"] > 0
    else:
        assert metrics["kv/preemptions"] == 0
    if workload in SHARED:
        assert metrics["kv/prefix_hit_tokens"] > 0
