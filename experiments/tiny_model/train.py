"""Train the tiny target and distil its draft, by the wall clock: every schedule is a fraction of elapsed time.

    python experiments/tiny_model/train.py --minutes 40 --out xlpk/models/tiny
    python experiments/tiny_model/train.py --minutes 12 --out xlpk/models/tiny --phase draft

The second command goes on with the draft that the first one left; the target stays.

Leaves to evaluate.py what the result is worth, and to card.py how it is told; both run at the end.
"""

import argparse
import csv
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import card
import data
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from model import DRAFT, TARGET, Llama, load, save, write_atomically
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
THREADS = 2
BATCH_TOKENS = 4096
SHORT, LONG = 512, 1024  # sequence lengths
LONG_FROM = 0.8  # of the target's time
TARGET_UNTIL, DRAFT_UNTIL = 0.77, 0.96  # of --minutes; the rest is for evaluate.py
WARMUP, DECAY_FROM, FLOOR = 0.015, 0.5, 0.01  # of the phase's time; the last one of the peak rate
FIRST_CHECKPOINT_S, CHECKPOINT_EVERY_S = 180, 300
HELDOUT_EVERY_S, HELDOUT_WINDOWS = 60, 48
LOG_ROWS, LOG_ROWS_DRAFT = 230, 45  # about, of a whole run and of one with --phase draft
CE_SHARE = 0.1  # of the draft's loss; the rest is KL(target || draft)
COLUMNS = ["elapsed_s", "phase", "step", "tokens", "seq_len", "lr_scale", "train_loss", "heldout_bits_per_byte"]


@dataclass(frozen=True)
class Rates:
    """Peak learning rates; Muon's update is scaled to the RMS of AdamW's, so they are of one kind."""

    muon: float = 2e-3  # matrices of the layers
    embedding: float = 3e-3
    norm: float = 2e-3
    weight_decay: float = 0.1  # matrices only


DRAFT_RATES = Rates(muon=3e-3)


def lr_scale(fraction: float) -> float:
    """Warm-up, stable, linear decay; fraction of the phase's time in, share of the peak rate out."""
    if fraction < WARMUP:
        return max(fraction / WARMUP, 0.02)
    return min(1.0, max(FLOOR, (1 - fraction) / (1 - DECAY_FROM)))


def optimizers(model: Llama, rates: Rates) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    norms = [p for p in model.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(
        matrices, lr=rates.muon, momentum=0.95, weight_decay=rates.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(
        [
            {"params": [model.model.embed_tokens.weight], "lr": rates.embedding},
            {"params": norms, "lr": rates.norm},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    return [muon, adam]


def logits_of(model: Llama, tokens: Tensor) -> Tensor:
    """tokens (B, T) -> logits (B * T, V) in fp32, computed under bf16 autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(tokens).float().flatten(0, 1)


class Log:
    """Rows of loss.csv; a training loss is the mean since the row before. The clock goes on from old rows."""

    def __init__(self, path: Path, every_s: float, old_rows: list[list]):
        self.path, self.every_s, self.rows = path, every_s, old_rows
        self.losses: list[float] = []
        self.last_s = float(old_rows[-1][0]) if old_rows else 0.0
        self.start = time.monotonic() - self.last_s

    def elapsed_s(self) -> float:
        return time.monotonic() - self.start

    def step(self, phase: str, step: int, tokens: int, seq_len: int, scale: float, loss: float, bpb: float | None):
        self.losses.append(loss)
        now = self.elapsed_s()
        if bpb is None and now - self.last_s < self.every_s:
            return
        mean = float(np.mean(self.losses))
        shown = "" if bpb is None else f"{bpb:.4f}"
        self.rows.append([f"{now:.1f}", phase, step, tokens, seq_len, f"{scale:.4f}", f"{mean:.4f}", shown])
        self.losses, self.last_s = [], now
        print(*self.rows[-1], flush=True)
        with self.path.open("w", newline="") as f:
            csv.writer(f).writerows([COLUMNS, *self.rows])


def fit(
    phase: str,
    model: Llama,
    loss_of: Callable[[Tensor], Tensor],
    files: list[np.ndarray],
    heldout_bpb: Callable[[Llama], float],
    log: Log,
    until_s: float,
    rates: Rates,
    folder: Path,
    seed: int,
    before: dict | None = None,
) -> dict:
    """Step until until_s on the log's clock; writes checkpoints on the way and the final weights.

    before is what this returned for the weights that model has now; its counts go on.
    """
    begin_s = log.elapsed_s()
    opts = optimizers(model, rates)
    peaks = [[g["lr"] for g in opt.param_groups] for opt in opts]
    windows = {n: data.Windows(files, BATCH_TOKENS // n, n, seed=seed + n) for n in (SHORT, LONG)}
    step, tokens, seconds = (before[k] for k in ("steps", "tokens", "seconds")) if before else (0, 0, 0.0)
    next_save_s, next_heldout_s = begin_s + FIRST_CHECKPOINT_S, begin_s
    while (now := log.elapsed_s()) < until_s:
        fraction = (now - begin_s) / (until_s - begin_s)
        scale, seq_len = lr_scale(fraction), LONG if fraction >= LONG_FROM else SHORT
        for opt, peak in zip(opts, peaks, strict=True):
            for group, lr in zip(opt.param_groups, peak, strict=True):
                group["lr"] = lr * scale
        loss = loss_of(torch.from_numpy(windows[seq_len].next()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        step, tokens = step + 1, tokens + BATCH_TOKENS
        bpb = None
        if now >= next_heldout_s:
            bpb, next_heldout_s = heldout_bpb(model), now + HELDOUT_EVERY_S
        log.step(phase, step, tokens, seq_len, scale, loss.item(), bpb)
        if now >= next_save_s:
            save(model, folder)
            next_save_s = now + CHECKPOINT_EVERY_S
    save(model, folder)
    seconds += log.elapsed_s() - begin_s
    log.step(phase, step, tokens, seq_len, scale, loss.item(), heldout_bpb(model))
    return {"steps": step, "tokens": tokens, "seconds": round(seconds, 1), "parameters": model.parameters_total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40, help="wall clock for everything")
    parser.add_argument("--out", type=Path, default=Path("xlpk/models/tiny"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of loss.csv, train.json and eval.json")
    parser.add_argument(
        "--phase", choices=["both", "draft"], default="both", help="draft: go on with the draft in --out"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    total_s = args.minutes * 60
    go_on = args.phase == "draft"
    before = json.loads((args.results / "train.json").read_text()) if go_on else None
    log = open_log(args.results / "loss.csv", total_s, go_on)
    begin_s = log.elapsed_s()

    corpus = data.load_corpus()
    if go_on:
        tok = data.Tokenizer.from_file(str(args.out / "tokenizer.json"))
    else:
        tok = data.train_tokenizer(list(corpus.train.values()))
        write_tokenizer(tok, args.out)
        write_atomically(args.out / "heldout.txt", data.shipped_heldout(corpus))
    train, heldout = data.encode_files(tok, corpus.train), data.encode_files(tok, corpus.heldout)
    facts = corpus.facts()
    facts |= {"train_tokens": sum(map(len, train)), "heldout_tokens": sum(map(len, heldout))}
    assert before is None or before["data"] == facts, "another text than the target's"
    print(json.dumps(facts), flush=True)

    stream = np.concatenate(heldout)
    starts = np.linspace(0, len(stream) - SHORT - 1, HELDOUT_WINDOWS).astype(int)
    probe = torch.from_numpy(np.stack([stream[i : i + SHORT + 1] for i in starts]))
    bits_per_nat_token = facts["heldout_tokens"] / facts["heldout_bytes"] / np.log(2)

    @torch.no_grad()
    def heldout_bpb(model: Llama) -> float:
        """An estimate for the loss curve; evaluate.py has the real one."""
        losses = [F.cross_entropy(logits_of(model, b[:, :-1]), b[:, 1:].flatten()) for b in probe.split(8)]
        return float(torch.stack(losses).mean()) * bits_per_nat_token

    target = Llama(TARGET)

    @torch.compile(dynamic=False)
    def target_loss(batch: Tensor) -> Tensor:
        """Cross entropy of a batch (B, T + 1)."""
        return F.cross_entropy(logits_of(target, batch[:, :-1]), batch[:, 1:].flatten())

    phases = {} if before is None else before["phases"]
    if not go_on:
        until_s = TARGET_UNTIL * total_s
        phases["target"] = fit(
            "target", target, target_loss, train, heldout_bpb, log, until_s, Rates(), args.out, args.seed
        )

    teacher = load(TARGET, args.out)
    draft = load(DRAFT, args.out / "draft").train() if go_on else Llama(DRAFT)

    @torch.compile(dynamic=False)
    def teacher_log_probs(tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B * T, V)."""
        with torch.no_grad():
            return F.log_softmax(logits_of(teacher, tokens), -1)

    @torch.compile(dynamic=False)
    def distil(batch: Tensor, log_p: Tensor) -> Tensor:
        log_q = F.log_softmax(logits_of(draft, batch[:, :-1]), -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        return (1 - CE_SHARE) * kl + CE_SHARE * F.nll_loss(log_q, batch[:, 1:].flatten())

    def draft_loss(batch: Tensor) -> Tensor:
        """KL to the target and a little cross entropy, of a batch (B, T + 1)."""
        return distil(batch, teacher_log_probs(batch[:, :-1]))

    until_s = begin_s + DRAFT_UNTIL * total_s
    seed = args.seed + len(log.rows)  # other batches than the run before
    phases["draft"] = fit(
        "draft", draft, draft_loss, train, heldout_bpb, log, until_s, DRAFT_RATES, args.out / "draft", seed,
        phases.get("draft"),
    )  # fmt: skip
    report = {
        "data": facts,
        "phases": phases,
        "minutes": [*(before["minutes"] if before else []), args.minutes],  # of each command
        "seed": args.seed,
        "cores": os.cpu_count(),
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
    }
    write_atomically(args.results / "train.json", json.dumps(report, indent=2) + "\n")
    evaluate.run(args.out, args.results)
    card.run(args.out, args.results)
    print(json.dumps({"elapsed_s": round(log.elapsed_s(), 1), **phases}))


def open_log(path: Path, total_s: float, go_on: bool) -> Log:
    """A new log, or the old one to go on with."""
    if not go_on:
        return Log(path, total_s / LOG_ROWS, [])
    with path.open(newline="") as f:
        return Log(path, total_s / LOG_ROWS_DRAFT, list(csv.reader(f))[1:])


def write_tokenizer(tok: data.Tokenizer, folder: Path) -> None:
    """tokenizer.json and the two small files that transformers wants beside it."""
    write_atomically(folder / "tokenizer.json", tok.to_str(pretty=True) + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": data.EOT,
        "eos_token": data.EOT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": TARGET.max_position_embeddings,
    }
    write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False}
    write_atomically(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")


if __name__ == "__main__":
    main()
