"""What the saved pair is worth: folder with bf16 weights in, eval.json out. Weights as rounded, arithmetic in fp32.

    python experiments/tiny_model/evaluate.py --out xlpk/models/tiny

Symbols: p and q are the next-token distributions of the target and the draft; alpha = sum over tokens of min(p, q)
is the chance that speculative sampling keeps a drafted token at temperature 1.
"""

import argparse
import json
import lzma
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import data
import numpy as np
import torch
import torch.nn.functional as F
import zstandard
from model import DRAFT, TARGET, Llama, load, write_atomically
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

RESULTS = Path(__file__).parent / "results"
CONTEXT, STRIDE = 1024, 512  # tokens: a scored token sees the 512 to 1,023 before it, where its file has them
BLOCK = 4  # drafted tokens a step
WALK_PROMPTS, WALK_PREFIX, WALK_NEW = 128, 128, 128  # the target's own continuations, where the draft is judged
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 120, 0.8
PROMPTS = [
    "def fibonacci(n):",
    "class Stack:\n    def __init__(self",
    "import os\n\ndef read_file(path):",
    "for i in range(",
]


def chunks(tokens: np.ndarray) -> Iterator[tuple[Tensor, int]]:
    """One file's [separator, tokens...] -> inputs and targets in one array (length + 1,), first scored target."""
    for begin in range(0, len(tokens) - 1, STRIDE):
        end = min(begin + STRIDE, len(tokens) - 1)
        low = max(0, begin + STRIDE - CONTEXT)
        yield torch.from_numpy(tokens[low : end + 1]), begin - low


@torch.no_grad()
def nats(model: Llama, files: Iterable[np.ndarray]) -> float:
    """Sum of -log p over all tokens of the files; a file sees nothing of the others."""
    total = 0.0
    for file in files:
        for window, first in chunks(file):
            logits = model(window[None, :-1])[0, first:]
            total += float(F.cross_entropy(logits, window[1 + first :], reduction="sum"))
    return total


@torch.no_grad()
def compare(target: Llama, draft: Llama, files: Iterable[np.ndarray]) -> dict:
    """Agreement of the draft over the text of the files, every token judged after the true text before it."""
    same, alphas, kls = [], [], []
    for file in files:
        for window, first in chunks(file):
            log_p = F.log_softmax(target(window[None, :-1])[0, first:], -1)
            log_q = F.log_softmax(draft(window[None, :-1])[0, first:], -1)
            same.append((log_p.argmax(-1) == log_q.argmax(-1)).float())
            alphas.append(torch.minimum(log_p, log_q).exp().sum(-1))
            kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return {
        "top1_agreement": mean(same),
        "sum_min_p_q": mean(alphas),
        "kl_nats": mean(kls),
        "tokens": sum(len(s) for s in same),
    }


def mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).mean())


@torch.no_grad()
def acceptance(target: Llama, draft: Llama, walks: Tensor, greedy: bool) -> dict:
    """Accepted tokens of BLOCK drafted ones, along continuations (N, prefix + new) that the target made itself.

    Greedy: a drafted token stays when the two argmaxes agree. Sampled: with x drawn from p, the chance that k tokens
    stay is the mean of prod min(1, q(x) / p(x)) over k places, exactly. A block may start at any place of a walk.
    """
    keeps = []
    for rows in walks.split(16):
        log_p = F.log_softmax(target(rows[:, :-1])[:, WALK_PREFIX - 1 :], -1)
        log_q = F.log_softmax(draft(rows[:, :-1])[:, WALK_PREFIX - 1 :], -1)
        x = rows[:, WALK_PREFIX:, None]
        ratio = (log_q.gather(-1, x) - log_p.gather(-1, x)).clamp(max=0).exp()[..., 0]
        keeps.append((log_p.argmax(-1) == log_q.argmax(-1)).float() if greedy else ratio)
    blocks = torch.cat(keeps).unfold(1, BLOCK, 1)  # (N, starts, BLOCK)
    accepted = float(blocks.cumprod(-1).sum(-1).mean())
    return {
        "block_tokens": BLOCK,
        "accepted_of_block": accepted,
        "tokens_per_step": accepted + 1,  # the target adds one of its own
        "places": blocks.shape[0] * blocks.shape[1],
    }


def prefixes(files: list[np.ndarray]) -> Tensor:
    """(WALK_PROMPTS, WALK_PREFIX) windows evenly spread over the held-out text."""
    stream = np.concatenate(files)
    starts = np.linspace(0, len(stream) - WALK_PREFIX, WALK_PROMPTS).astype(int)
    return torch.from_numpy(np.stack([stream[i : i + WALK_PREFIX] for i in starts]))


def compressed_bytes(train: bytes, heldout: bytes) -> dict:
    """xz -9e and zstd -19 / --ultra -22 on the held-out text, alone and after the training text.

    "after_training": size(training + held-out) - size(training), with a window that holds both.
    """

    def xz(text: bytes) -> int:
        return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))  # its window: 64 MiB

    def zstd(level: int, text: bytes) -> int:
        parameters = zstandard.ZstdCompressionParameters.from_level(level, window_log=27)
        return len(zstandard.ZstdCompressor(compression_params=parameters).compress(text))

    return {
        "xz_9e": {"alone": xz(heldout), "after_training": xz(train + heldout) - xz(train)},
        "zstd_19": {"alone": zstd(19, heldout)},
        "zstd_22": {"alone": zstd(22, heldout), "after_training": zstd(22, train + heldout) - zstd(22, train)},
    }


def samples(hf: torch.nn.Module, tok: Tokenizer) -> list[dict]:
    """Continuations of PROMPTS, each after the separator."""
    out = []
    for prompt in PROMPTS:
        ids = torch.tensor([[0, *tok.encode(prompt).ids]])
        row = {"prompt": prompt, "temperature": SAMPLE_TEMPERATURE}
        for name, choice in {
            "greedy": {"do_sample": False},
            "sampled": {"do_sample": True, "temperature": SAMPLE_TEMPERATURE, "top_k": 0},
        }.items():
            torch.manual_seed(0)
            row[name] = tok.decode(generate(hf, ids, SAMPLE_TOKENS, **choice)[0].tolist())
        out.append(row)
    return out


def generate(hf: torch.nn.Module, ids: Tensor, new_tokens: int, **choice: object) -> Tensor:
    """ids (N, T) -> (N, T + new) or fewer where all ended."""
    return hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, pad_token_id=0, **choice)


def run(folder: Path, results: Path) -> dict:
    """Evaluate the pair in folder; writes results/eval.json."""
    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    target, draft = load(TARGET, folder), load(DRAFT, folder / "draft")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    hf_draft = AutoModelForCausalLM.from_pretrained(folder / "draft", dtype=torch.float32).eval()

    corpus = data.load_corpus()
    heldout = data.encode_files(tok, corpus.heldout)
    train_sample = dict(list(corpus.train.items())[::20])
    facts = corpus.facts()
    names = {"target": (target, hf), "draft": (draft, hf_draft)}

    # transformers must compute what we trained: fp32 rounding over at most 6 layers, logits of order 10
    probe = prefixes(heldout)[:4]
    with torch.no_grad():
        hf_difference = {
            name: float((ours(probe) - theirs(probe).logits).abs().max()) for name, (ours, theirs) in names.items()
        }
    assert max(hf_difference.values()) < 1e-3, hf_difference

    def bits_per_byte(model: Llama, files: list[np.ndarray], size: int) -> float:
        return nats(model, files) / math.log(2) / size

    heldout_bytes = facts["heldout_bytes"]
    sample_tokens, sample_bytes = data.encode_files(tok, train_sample), len(data.joined(train_sample))
    shipped = (folder / "heldout.txt").read_bytes().decode()
    shipped_tokens = np.array([0, *tok.encode(shipped).ids])
    independent = [shipped_tokens[i : i + CONTEXT + 1] for i in range(0, len(shipped_tokens) - 1, CONTEXT)]

    @torch.no_grad()
    def shipped_nats(model: Llama) -> float:
        rows = [torch.from_numpy(w) for w in independent]
        total = sum(float(F.cross_entropy(model(w[None, :-1])[0], w[1:], reduction="sum")) for w in rows)
        return total / (len(shipped_tokens) - 1)

    torch.manual_seed(0)
    walk_from = prefixes(heldout)
    greedy_walks = generate(hf, walk_from, WALK_NEW, do_sample=False, eos_token_id=None)
    sampled_walks = generate(hf, walk_from, WALK_NEW, do_sample=True, temperature=1.0, top_k=0, eos_token_id=None)

    compressors = compressed_bytes(data.joined(corpus.train), data.joined(corpus.heldout))
    report = {
        "data": facts,
        "heldout_tokens": sum(len(f) - 1 for f in heldout),
        "context_tokens": CONTEXT,
        "stride_tokens": STRIDE,
        "bits_per_byte": {
            "target": {
                "heldout": bits_per_byte(target, heldout, heldout_bytes),
                "train_sample": bits_per_byte(target, sample_tokens, sample_bytes),
            },
            "draft": {
                "heldout": bits_per_byte(draft, heldout, heldout_bytes),
                "train_sample": bits_per_byte(draft, sample_tokens, sample_bytes),
            },
            "compressors": {
                name: {how: size * 8 / heldout_bytes for how, size in sizes.items()}
                for name, sizes in compressors.items()
            },
        },
        "compressed_bytes": compressors,
        "weights_bytes": {
            "target": (folder / "model.safetensors").stat().st_size,
            "draft": (folder / "draft" / "model.safetensors").stat().st_size,
        },
        "shipped_heldout": {
            "bytes": len(shipped.encode()),
            "tokens": len(shipped_tokens) - 1,
            "nats_per_token_target": shipped_nats(target),
            "nats_per_token_draft": shipped_nats(draft),
        },
        "draft": {
            "heldout_text": compare(target, draft, heldout),
            "greedy": acceptance(target, draft, greedy_walks, greedy=True),
            "temperature_1": acceptance(target, draft, sampled_walks, greedy=False),
        },
        "transformers_max_logit_difference": hf_difference,
        "samples": samples(hf, tok),
    }
    write_atomically(results / "eval.json", json.dumps(rounded(report), indent=2) + "\n")
    return report


def rounded(value: object) -> object:
    """Floats at five significant digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("xlpk/models/tiny"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    report = run(args.out, args.results)
    print(json.dumps(rounded({k: report[k] for k in ("bits_per_byte", "draft")})))


if __name__ == "__main__":
    main()
