"""mode=quality: what it says of the real loop equals what is computed from the loop's logits by other means."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import kinds
import numpy as np
import pytest
from drive import CACHE, run

from xlpk.errors import InputError
from xlpk.kv import KV, KVPlan
from xlpk.model import TINY, Model
from xlpk.quality import read_windows, session_plan
from xlpk.reference import Exact, forward
from xlpk.settings import Quality
from xlpk.workload import Request

TEXT = (TINY / "heldout.txt").read_text()[3000:4200] + "naïve = '×'\n"
SMALL = ["quality.window=96", "quality.stride=40", "workload.requests=1", "sampling.max_new_tokens=4"]


def xlpk(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    (folder / "outputs").mkdir(exist_ok=True)
    cache = folder / "outputs" / "cache"
    if not cache.exists():
        cache.symlink_to(CACHE)
    (folder / "text.py").write_text(TEXT)
    command = [sys.executable, "-m", "xlpk.run", "tracking=none", "mode=quality", "quality.file=text.py", *SMALL]
    done = subprocess.run(
        [*command, "run.json=true", *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env=kinds.environment(),
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    done = xlpk(folder, *arguments)
    return json.loads(done.stdout.splitlines()[-1])


def quality_events(folder: Path) -> list[dict[str, Any]]:
    logs = sorted((folder / "outputs").glob("runs/*/*/events.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(line) for line in logs[-1].read_text().splitlines() if '"event":"quality"' in line]


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.longdouble) - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def by_other_means(tiny: Model, kv: str) -> dict[str, float]:
    """Whole windows of the loop's logits against the oracle in float64, in probabilities of extended precision."""
    assert tiny.tokenizer is not None
    ids = tiny.tokenizer.encode(TEXT).ids
    exact = Exact(tiny.weights)
    nll, reference_nll, kl, same = [], [], [], []
    for begin in range(0, len(ids) - 1, 40):
        low, end = max(0, begin + 40 - 96), min(begin + 40, len(ids) - 1)
        logits = run(tiny, [Request(0, tuple(ids[low:end]), 1)], kv=KV(dtype=kv), debug_logits=True).logits
        assert logits is not None
        q, p = softmax(logits), softmax(forward(tiny.config, exact, ids[low:end]))
        for row in range(begin - low, end - low):
            target = ids[low + row + 1]
            nll.append(-math.log(q[row, target]))
            reference_nll.append(-math.log(p[row, target]))
            kl.append(float((p[row] * np.log(p[row] / q[row])).sum()))
            same.append(int(q[row].argmax() == p[row].argmax()))
    first = len(tiny.tokenizer.decode([ids[0]]).encode())
    return {
        "tokens": len(ids) - 1,
        "nll_nats.mean": float(np.mean(nll)),
        "reference_nll_nats.mean": float(np.mean(reference_nll)),
        "kl_nats.mean": float(np.mean(kl)),
        "kl_nats.max": max(kl),
        "top1_agreement": float(np.mean(same)),
        "perplexity": math.exp(np.mean(nll)),
        "bits_per_byte": sum(nll) / math.log(2) / (len(TEXT.encode()) - first),
    }


def test_figures_of_the_cpu(tiny: Model, tmp_path: Path) -> None:
    found = measured(tmp_path)
    for name, value in by_other_means(tiny, "auto").items():
        tight = 2e-3 if name.startswith("kl") else 1e-6  # the reference sums in float32
        assert found[f"quality/{name}"] == pytest.approx(value, rel=tight), name
    assert 0 < found["quality/kl_nats.mean"] < 1e-3
    assert found["requests/output_tokens"] == 4, "the workload is served too"
    assert found["warmup/tokens"] == 4
    first = quality_events(tmp_path)
    measured(tmp_path, "backend.orchestration=launched", "scheduler.prefill_chunk=7", "backend.threads=1")
    assert quality_events(tmp_path) == first, "the same bits in every orchestration and chunking"


@pytest.mark.heavy
def test_it_sees_what_storage_costs(tmp_path: Path) -> None:
    """Pages in float32 are nearer to the reference than pages in bf16; a wrong model is far away."""
    coarse, fine = measured(tmp_path, "kv.dtype=bf16"), measured(tmp_path, "kv.dtype=fp32")
    assert fine["quality/kl_nats.mean"] < 0.9 * coarse["quality/kl_nats.mean"]
    done = xlpk(tmp_path, "quality.tokens=50", "mode=speculative_decode", "quality.measure=true")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["quality/tokens"] == 50
    assert "spec/proposed" in found, "any mode can have it"
    assert "KL" in done.stdout


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (line,) = xlpk(tmp_path, "quality.file=missing.txt", code=2).stderr.splitlines()
    assert line == "xlpk: quality.file=missing.txt: a readable text file (No such file or directory)"
    assert not list((tmp_path / "outputs").glob("runs/*/*"))


def test_texts_and_windows_that_cannot_be_scored(tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("short", "a text of at least 2 tokens"),
        ("binary", "a text file in UTF-8"),
        ("", "readable"),
    ):
        with pytest.raises(InputError, match=message):
            read_windows(Quality(file=str(tmp_path / name)), tiny)
    for budget, max_len, most in (("64MiB", 1024, 1023), ("4pages", 1024, 63)):
        plan = KVPlan.make(KV(budget=budget), tiny.config, "bf16", max_len)
        with pytest.raises(InputError, match=f"=1024: at most {most}:"):
            session_plan(Quality(window=1024), tiny, plan)
        assert session_plan(Quality(window=most), tiny, plan).max_len == most + 1
    with pytest.raises(InputError, match="has no tokenizer"):
        read_windows(Quality(), replace(tiny, path=tmp_path))


@pytest.mark.heavy
@pytest.mark.parametrize("kind", kinds.GPU)
def test_figures_of_the_gpu_backends(tmp_path: Path, kind: str) -> None:
    with kinds.on(kind):
        found = measured(tmp_path, f"backend={kind}", "quality.tokens=90")
        again = quality_events(tmp_path)
        measured(tmp_path, "backend=launched", "quality.tokens=90")
    assert found["quality/tokens"] == 90
    assert 0 < found["quality/kl_nats.mean"] < 1e-3
    assert quality_events(tmp_path) == again, "the same bits in every orchestration of one device"


@pytest.mark.peers
def test_no_worse_than_transformers(tiny: Model, tmp_path: Path) -> None:
    """On the trained model: the CPU's divergence is at most 1.1 times that of transformers in bf16, which a second way
    of computing it confirms; both references agree."""
    torch = pytest.importorskip("torch", reason="needs the extra `peers`")
    from transformers import LlamaForCausalLM

    ours, theirs = measured(tmp_path), measured(tmp_path, "backend=hf", "backend.device=cpu")
    assert ours["quality/kl_nats.mean"] <= 1.1 * theirs["quality/kl_nats.mean"]
    assert abs(ours["quality/nll_ratio"] - 1) <= 1.1 * abs(theirs["quality/nll_ratio"] - 1) + 1e-4
    other = measured(tmp_path, "quality.reference=transformers")
    assert other["quality/reference_nll_nats.mean"] == pytest.approx(ours["quality/reference_nll_nats.mean"], rel=1e-6)
    assert other["quality/kl_nats.mean"] == pytest.approx(ours["quality/kl_nats.mean"], rel=2e-3)

    assert tiny.tokenizer is not None
    ids = tiny.tokenizer.encode(TEXT).ids
    nets = [LlamaForCausalLM.from_pretrained(TINY, dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16)]
    kl = []
    for begin in range(0, len(ids) - 1, 40):
        low, end = max(0, begin + 40 - 96), min(begin + 40, len(ids) - 1)
        with torch.inference_mode():
            p, q = (net(torch.tensor([ids[low:end]])).logits[0, begin - low :].double().log_softmax(-1) for net in nets)
        kl += (p.exp() * (p - q)).sum(-1).tolist()
    assert theirs["quality/kl_nats.mean"] == pytest.approx(np.mean(kl), rel=0.05)  # attention sums may differ
