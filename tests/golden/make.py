"""Makes the golden files: what transformers' LlamaForCausalLM says about each of checkpoints.CASES.

    python tests/golden/make.py [case ...]        needs torch and transformers; about a minute

Each <case>.npz: the checkpoint's fingerprint, the prompt [40], logits float32 [8, vocab] at `positions` of the prompt,
the greedy continuation [24] of the float32 model, and how far torch's own float32 and bfloat16 runs are from the
float64 oracle over all 40 positions (largest, root mean square): what a bf16 implementation is measured against.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from checkpoints import CASES, fingerprint, make_case, prompt  # noqa: E402

from xlpk.model import load_model  # noqa: E402
from xlpk.reference import forward  # noqa: E402

POSITIONS = (0, 1, 2, 5, 11, 20, 31, 39)
NEW_TOKENS = 24


def run(folder: Path, tokens: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 [n, vocab] and the greedy continuation [24], without a cache and without stopping at eos."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    ids = torch.tensor(tokens)[None]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0].float().numpy()
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return logits, ids[0, tokens.size :].numpy()


def make(case: str) -> None:
    tokens = prompt(case)
    with tempfile.TemporaryDirectory() as name:
        folder = make_case(Path(name), case)
        model = load_model(case, folder)
        exact = forward(model.config, model.weights, tokens)
        fp32, continuation = run(folder, tokens, torch.float32)
        bf16, _ = run(folder, tokens, torch.bfloat16)
        errors = {
            f"torch_{kind}_{norm}": function(np.abs(logits - exact))
            for kind, logits in (("fp32", fp32), ("bf16", bf16))
            for norm, function in (("max", np.max), ("rms", lambda x: np.sqrt(np.mean(x * x))))
        }
        np.savez_compressed(
            HERE / f"{case}.npz",
            checkpoint=fingerprint(folder),
            versions=f"torch {torch.__version__} transformers {transformers.__version__}",
            prompt=tokens.astype(np.int32),
            positions=np.array(POSITIONS, dtype=np.int32),
            logits=fp32[list(POSITIONS)],
            continuation=continuation.astype(np.int32),
            **errors,
        )
    print(case, " ".join(f"{key}={value:.2e}" for key, value in errors.items()), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[1:] or CASES:
        make(each)
