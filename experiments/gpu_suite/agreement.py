"""The tiny model on each backend, beside each other: tokens by the oracle's margin, KL and NLL; one JSON object.

    python experiments/gpu_suite/agreement.py --outputs FOLDER [--backends persistent,graph,launched,cpu,hf]

One sweep of mode=quality, so that what is scored and what is generated come from the same backend. A backend may pick
another token than the float64 oracle's only where the oracle's margin is within twice the bound of its arithmetic: for
xlpk sums in float32, bf16 in front of matrices and in pages; for transformers every intermediate in bf16. Exit code 1:
one picked another, or a run failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from xlpk.model import Model, load_model
from xlpk.reference import Array, Exact, Perturbed, error_bound, forward

CACHE = Path(__file__).resolve().parents[2] / "outputs" / "cache"
BACKENDS = "persistent,graph,launched,cpu,hf"
PROMPTS = ("def read_file(path):", "class Stack:", "import os")
NEW_TOKENS = 48
FIGURES = ("kl_nats.mean", "kl_nats.p99", "kl_nats.max", "nll_ratio", "top1_agreement", "perplexity")


@dataclass
class Agreement:
    """Of one backend's tokens with the oracle's, all requests together."""

    tokens: int
    decided: int  # the oracle's margin exceeds twice the bound
    argmax: int  # tokens that are the oracle's own, decided or not
    largest_regret: float  # logit of the oracle's token less that of the backend's
    limit: float  # twice the largest bound of a position
    outside: int  # tokens whose regret exceeds twice the bound of their position
    like_cpu: int  # tokens before the first that differs from the CPU backend's, over all requests


class Bf16Everywhere(Perturbed):
    """torch's arithmetic with bf16 weights: sums in float32, what they come to stored in bf16, as all intermediates."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__(rng, "fp32", "bf16", "bf16")

    def value(self, x: Array, roundings: float = 1.0) -> Array:
        return self._near_bf16(super().value(x, roundings))

    def product(self, x: Array, w: Array) -> Array:
        return self._near_bf16(super().product(x, w))


def agreement(
    model: Model, prompts: Sequence[tuple[int, ...]], outputs: Sequence[Sequence[int]], torch_bf16: bool = False
) -> Agreement:
    """Each output judged after its own prefix. `torch_bf16`: by the bound of transformers' arithmetic, not of ours."""
    weights, kinds = Exact(model.weights), {"kv_dtype": "bf16", "activations": "bf16"}
    if torch_bf16:
        kinds = {"errors": Bf16Everywhere}
    oracle = {name: value for name, value in kinds.items() if name != "errors"}
    total = Agreement(0, 0, 0, 0.0, 0.0, 0, 0)
    for prompt, output in zip(prompts, outputs, strict=True):
        whole, rows = (*prompt, *output)[:-1], slice(len(prompt) - 1, None)
        logits = forward(model.config, weights, whole, **oracle)[rows]  # [len(output), vocab]
        bound = 2 * error_bound(model.config, weights, whole, **kinds)[rows]
        regret = logits.max(axis=1) - logits[np.arange(len(output)), list(output)]
        best = np.sort(logits, axis=1)
        total.tokens += len(output)
        total.decided += int((best[:, -1] - best[:, -2] > bound).sum())
        total.argmax += int((regret == 0).sum())
        total.largest_regret = max(total.largest_regret, float(regret.max()))
        total.limit = max(total.limit, float(bound.max()))
        total.outside += int((regret > bound).sum())
    return total


def outputs_of(point: Path) -> list[list[int]]:
    """The tokens of each request of a run, by id."""
    found: dict[int, list[int]] = {}
    for line in (point / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "token" and not event.get("warmup"):
            found.setdefault(event["request_id"], []).append(event["token"])
    return [found[request_id] for request_id in sorted(found)]


def sweep(outputs: Path, backends: Sequence[str]) -> dict[str, Path]:
    """Runs the backends -> the folder of each."""
    shutil.rmtree(outputs / "sweeps", ignore_errors=True)
    outputs.mkdir(parents=True, exist_ok=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    if not (outputs / "cache").exists():
        (outputs / "cache").symlink_to(CACHE)
    prompts = ",".join(f"'{prompt}'" for prompt in PROMPTS)
    command = [sys.executable, "-m", "xlpk.run", "-m", "mode=quality", f"backend={','.join(backends)}"]
    command += ["tracking=none", f"workload.prompt=[{prompts}]", f"run.outputs={outputs}", "sampling.ignore_eos=true"]
    command += [f"sampling.max_new_tokens={NEW_TOKENS}", "sampling.temperature=0"]
    subprocess.run(command, stdout=sys.stderr, check=False)
    found = {}
    for status in (outputs / "sweeps").glob("*/*/*/status.json"):
        chosen = [text for text in json.loads(status.read_text()).get("overrides", []) if text.startswith("backend=")]
        found[chosen[-1].removeprefix("backend=")] = status.parent
    return found


_JUDGED: dict[str, Agreement] = {}  # backends of the same tokens are judged once


def judged(
    model: Model, prompts: Sequence[tuple[int, ...]], outputs: Sequence[Sequence[int]], torch_bf16: bool
) -> Agreement:
    key = json.dumps([outputs, torch_bf16])
    if key not in _JUDGED:
        _JUDGED[key] = agreement(model, prompts, outputs, torch_bf16)
    return replace(_JUDGED[key])


def record(
    model: Model, prompts: Sequence[tuple[int, ...]], point: Path, cpu: list[list[int]] | None
) -> dict[str, Any]:
    """What one backend's run comes to."""
    status = json.loads((point / "status.json").read_text())
    if status["status"] != "FINISHED":
        return {"status": status["status"], "error": status.get("error")}
    metrics = json.loads((point / "metrics.json").read_text())
    outputs = outputs_of(point)
    found = judged(model, prompts, outputs, torch_bf16=status.get("backend") == "hf")
    for ours, theirs in zip(outputs, cpu or [], strict=False):
        same = [one == other for one, other in zip(ours, theirs, strict=False)]
        found.like_cpu += same.index(False) if False in same else len(same)
    return {
        "status": "FINISHED",
        "device": json.loads((point / "build.json").read_text())["backend"].get("device"),
        **{name: metrics.get(f"quality/{name}") for name in FIGURES},
        **asdict(found),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--backends", default=BACKENDS, help=f"with commas between them ({BACKENDS})")
    args = parser.parse_args()
    wanted, skipped = args.backends.split(","), {}
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing and "hf" in wanted:
        wanted.remove("hf")
        skipped["hf"] = f"{' and '.join(missing)} not installed for this Python"
    points = sweep(args.outputs.resolve(), wanted)
    model = load_model("tiny")
    prompts = [tuple(model.tokenizer.encode(text).ids) for text in PROMPTS]
    cpu = outputs_of(points["cpu"]) if "cpu" in points else None
    absent = {"status": "FAILED", "error": "no run"}
    found = {name: record(model, prompts, points[name], cpu) if name in points else absent for name in wanted}
    print(json.dumps({"model": "tiny", "new_tokens": NEW_TOKENS, "backends": found, "skipped": skipped}))
    return int(any(one["status"] != "FINISHED" or one["outside"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
