"""The model card and the results of the README, written from train.json, loss.csv and eval.json; no number is typed.

python experiments/tiny_model/card.py --out xlpk/models/tiny
"""

import argparse
import csv
import json
import math
from pathlib import Path

import matplotlib
from data import EOT, HELDOUT_PER_MILLE, SKIP_DIRS, SKIP_FILES, SKIP_PREFIXES, VOCAB_TOKENS
from model import DRAFT, TARGET, Shape, write_atomically

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BEGIN, END = "<!-- written by card.py -->", "<!-- end of what card.py writes -->"
COMMAND = "python experiments/tiny_model/train.py --minutes {minutes:g} --out xlpk/models/tiny{phase}"
INSTALL = "pip install torch=={torch} numpy safetensors tokenizers transformers==5.23.0 zstandard matplotlib"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column is text, the others numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def plot(rows: list[dict], path: Path) -> None:
    """Bits per byte over minutes: training loss of the target as a line, held-out text as marks."""
    figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
    for phase, mark, line in [("target", "o", "-"), ("draft", "s", "--")]:
        held = [(float(r["elapsed_s"]) / 60, float(r["heldout_bits_per_byte"])) for r in rows
                if r["phase"] == phase and r["heldout_bits_per_byte"]]  # fmt: skip
        axes.plot(*zip(*held, strict=True), line, marker=mark, color="black", markersize=4, linewidth=1,
                  label=f"{phase}, held-out")  # fmt: skip
    axes.set(xlabel="minutes", ylabel="bits per byte", ylim=(0.5, 2.5))
    axes.grid(color="0.85")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def bits_table(e: dict) -> str:
    """Held-out bits per byte of the models and the compressors."""
    b = e["bits_per_byte"]
    rows = [[f"{name} model (context {e['context_tokens']:,} tokens)", f"{b[name]['heldout']:.3f}", ""]
            for name in ("target", "draft")]  # fmt: skip
    labels = {"xz_9e": "xz -9e", "zstd_19": "zstd -19", "zstd_22": "zstd --ultra -22"}
    for key, label in labels.items():
        c = b["compressors"][key]
        rows.append([label, f"{c['alone']:.3f}", f"{c['after_training']:.3f}" if "after_training" in c else ""])
    return table(["", "held-out, bits per byte", "after the training text"], rows)


def draft_table(e: dict) -> str:
    d, text = e["draft"], e["draft"]["heldout_text"]
    block = d["greedy"]["block_tokens"]
    rows = [
        ["argmax of the draft = argmax of the target, held-out text", f"{100 * text['top1_agreement']:.1f} %"],
        ["mean sum of min(p, q) at temperature 1, held-out text", f"{text['sum_min_p_q']:.3f}"],
        ["KL(target, draft), nats a token, held-out text", f"{text['kl_nats']:.3f}"],
        [f"tokens accepted of {block} drafted, greedy", f"{d['greedy']['accepted_of_block']:.2f}"],
        [f"tokens accepted of {block} drafted, temperature 1", f"{d['temperature_1']['accepted_of_block']:.2f}"],
        ["tokens a target step, greedy (with the target's own)", f"{d['greedy']['tokens_per_step']:.2f}"],
        ["tokens a target step, temperature 1", f"{d['temperature_1']['tokens_per_step']:.2f}"],
    ]
    return table(["", "value"], rows)


def curve_table(rows: list[dict]) -> str:
    """About eight points of the held-out curve."""
    held = [r for r in rows if r["heldout_bits_per_byte"]]
    picked = []
    for phase, count in [("target", 6), ("draft", 3)]:
        own = [r for r in held if r["phase"] == phase]
        picked += [own[round(i * (len(own) - 1) / (count - 1))] for i in range(count)]
    return table(
        ["phase", "minute", "step", "tokens", "loss, nats a token", "held-out, bits per byte"],
        [
            [r["phase"], f"{float(r['elapsed_s']) / 60:.1f}", f"{int(r['step']):,}", f"{int(r['tokens']):,}",
             r["train_loss"], r["heldout_bits_per_byte"]]
            for r in picked
        ],
    )  # fmt: skip


def shape_table(t: dict) -> str:
    def column(s: Shape, phase: dict) -> list[str]:
        return [
            f"{phase['parameters']:,}", str(s.hidden_size), str(s.intermediate_size), str(s.num_hidden_layers),
            f"{s.num_attention_heads} / {s.num_key_value_heads}", str(s.head_dim), f"{s.vocab_size:,}",
            f"{s.max_position_embeddings:,}", f"{phase['tokens']:,}", f"{phase['seconds'] / 60:.1f}",
        ]  # fmt: skip

    names = [
        "parameters", "hidden", "intermediate", "layers", "heads / kv heads", "head size", "vocabulary",
        "positions", "tokens trained on", "minutes of training",
    ]  # fmt: skip
    columns = column(TARGET, t["phases"]["target"]), column(DRAFT, t["phases"]["draft"])
    return table(["", "target", "draft"], [list(r) for r in zip(names, *columns, strict=True)])


def data_table(d: dict) -> str:
    rows = [
        ["files", f"{d['train_files']:,}", f"{d['heldout_files']:,}"],
        ["bytes", f"{d['train_bytes']:,}", f"{d['heldout_bytes']:,}"],
        ["tokens, with one separator a file", f"{d['train_tokens']:,}", f"{d['heldout_tokens']:,}"],
        ["bytes a token", *(f"{d[k + '_bytes'] / d[k + '_tokens']:.2f}" for k in ("train", "heldout"))],
        ["SHA-256 of the files in order of path", *(f"`{d[k + '_sha256'][:16]}…`" for k in ("train", "heldout"))],
    ]
    return table(["", "training", "held-out"], rows)


def sample_text(row: dict) -> str:
    """One prompt with its two continuations; the separator shows where the model ended a file."""
    parts = []
    for how in ("greedy", "sampled"):
        title = "Greedy" if how == "greedy" else f"Temperature {row['temperature']}"
        body = row[how].removeprefix(EOT).split(EOT)[0].rstrip()
        parts.append(f"{title}, prompt {json.dumps(row['prompt'])}:\n\n~~~~python\n{body}\n~~~~")
    return "\n\n".join(parts)


def card_text(t: dict, e: dict, rows: list[dict]) -> str:
    d, s, b = t["data"], e["shipped_heldout"], e["bits_per_byte"]
    epochs = t["phases"]["target"]["tokens"] / d["train_tokens"]
    saved = 1 - b["target"]["heldout"] / b["compressors"]["xz_9e"]["alone"]
    rate = t["phases"]["target"]["tokens"] / t["phases"]["target"]["seconds"]
    phases = ["", *[" --phase draft"] * (len(t["minutes"]) - 1)]
    commands = "\n    ".join(COMMAND.format(minutes=m, phase=p) for m, p in zip(t["minutes"], phases, strict=True))
    texts = "\n\n".join(sample_text(row) for row in e["samples"])
    after = b["compressors"]["xz_9e"]["after_training"]
    skipped = ", ".join(f"`{n}`" for n in sorted(SKIP_DIRS | SKIP_FILES) + [p + "*" for p in SKIP_PREFIXES])
    return f"""# The tiny model

A Llama of {t["phases"]["target"]["parameters"] / 1e6:.2f} M parameters that continues Python source text, and a draft
of {t["phases"]["draft"]["parameters"] / 1e6:.2f} M distilled from it for speculative decoding: weights small enough to
ship with the package, trained well enough that acceptance, perplexity and text mean something.
`experiments/tiny_model/card.py` writes this page from the measurements; edit that, not this.

{shape_table(t)}

Both: SiLU, RMS norm (eps {TARGET.rms_norm_eps:g}), rotary base {TARGET.rope_theta:g}, head tied to the embedding, bf16.

## Files

| file | what |
|---|---|
| `config.json`, `model.safetensors` | the target, Hugging Face names, no `lm_head.weight` (tied) |
| `draft/config.json`, `draft/model.safetensors` | the draft; it reads the target's tokenizer |
| `tokenizer.json`, `tokenizer_config.json` | byte-level BPE, {VOCAB_TOKENS:,} entries; 0, `{EOT}`, is bos and eos |
| `generation_config.json` | bos, eos, greedy |
| `heldout.txt` | {s["bytes"]:,} bytes ({s["tokens"]:,} tokens) of held-out files, for perplexity |

The tokenizer adds no bos by itself; put token 0 before a prompt that is the beginning of a file. A newline and the
indentation after it are one token, so end a prompt before the newline ("def f(n):") or after the indentation; a prompt
that ends with a bare newline says that the next line starts at the margin.

## Data and licence

The sources and docstrings of the standard library of CPython {d["python"]}: `*.py` under
`sysconfig.get_path("stdlib")`, which every Python installation has. They are under the PSF licence, version 2, with
the notices of incorporated software (https://docs.python.org/3/license.html); `heldout.txt` is a verbatim extract and
keeps the copyright lines that its files carry. Left out at any depth, as tests, other people's packages, tables, or
files that each build writes:
{skipped}.
Copies of a file already taken are left out too.

A file is held out when the SHA-256 of its relative path says so ({HELDOUT_PER_MILLE} of 1,000); the tokenizer saw only
the training half.

{data_table(d)}

Another Python version has other sources, so it makes another model; the full hashes are in
`experiments/tiny_model/results/eval.json`. The target read the training text {epochs:.1f} times.

## Held-out bits per byte

{bits_table(e)}

The models: weights as rounded to bf16, arithmetic in fp32, each file by itself after the separator, windows of
{e["context_tokens"]:,} tokens that advance by {e["stride_tokens"]}, so a scored token sees the {e["stride_tokens"]} to
{e["context_tokens"] - 1:,} before it where its file has them. The compressors: all held-out files as one stream.
"After the training text" is size(training + held-out) - size(training), with a window that holds both: what the
compressor gains from having read what the model read. The weights
({e["weights_bytes"]["target"] / 1e6:.1f} MB and {e["weights_bytes"]["draft"] / 1e6:.1f} MB) are not counted as output.
The target needs {100 * saved:.0f} % fewer bits than xz alone and {100 * (1 - b["target"]["heldout"] / after):.0f} %
fewer than xz after the training text.

On one in twenty of the training files the target reaches {b["target"]["train_sample"]:.3f} bits per byte and the draft
{b["draft"]["train_sample"]:.3f}: the distance to the held-out column is what they learnt by heart.
On `heldout.txt` as one text (token 0 first, independent windows of {e["context_tokens"]:,} predictions) the target has
{s["nats_per_token_target"]:.4f} nats a token (perplexity {math.exp(s["nats_per_token_target"]):.2f}), the draft
{s["nats_per_token_draft"]:.4f}.

## Agreement of the draft

{draft_table(e)}

Held-out text: {e["draft"]["heldout_text"]["tokens"]:,} tokens, each after the true text before it. Accepted tokens:
along {e["draft"]["greedy"]["places"]:,} places of continuations that the target wrote after held-out prefixes, by
its argmax (greedy) or by sampling; x drawn from p stays with the chance min(1, q(x) / p(x)), and a block ends at the
first token that does not stay.

## Loss curve

{curve_table(rows)}

The held-out column is an estimate under bf16 autocast from windows of 512 tokens; the draft's loss is
0.9 KL + 0.1 cross entropy, so it does not compare with the target's. All rows:
`experiments/tiny_model/results/loss.csv`, plotted in `loss.png` beside it.

## Samples

{texts}

## Limits

It writes what looks like Python and means little. Greedy text soon repeats, the positions end at
{TARGET.max_position_embeddings:,}, and prose, other languages and digits are poorly modelled. It has seen one code
base, by heart in places; it is a load for an engine, not an assistant. Text it writes can be a copy of its training
text, whose licence then applies.

## Train it again

    {INSTALL.format(torch=t["torch"])}
    {commands}

{t["cores"]} CPU cores, {sum(t["minutes"]):g} minutes, no GPU. The schedules follow the clock, so a quicker or quieter
machine takes more steps; this run had {rate:,.0f} tokens a second for the target.
"""


def run(folder: Path, results: Path) -> None:
    """Write folder/README.md, results/loss.png and, for the results that ship, the marked part of our README."""
    train = json.loads((results / "train.json").read_text())
    report = json.loads((results / "eval.json").read_text())
    with (results / "loss.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    plot(rows, results / "loss.png")
    write_atomically(folder / "README.md", card_text(train, report, rows))
    if results.resolve() == RESULTS.resolve():
        readme = (HERE / "README.md").read_text()
        before, rest = readme.split(BEGIN)
        _, after = rest.split(END)
        phases, cores = train["phases"], train["cores"]
        taken = (
            f"{phases['target']['tokens']:,} tokens in {phases['target']['seconds'] / 60:.1f} minutes for the target, "
            f"{phases['draft']['tokens']:,} in {phases['draft']['seconds'] / 60:.1f} for the draft, on {cores} cores."
        )
        body = "\n\n".join([BEGIN, taken, bits_table(report), draft_table(report), END])
        write_atomically(HERE / "README.md", before + body + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("xlpk/models/tiny"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    run(args.out, args.results)


if __name__ == "__main__":
    main()
