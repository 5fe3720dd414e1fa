"""How fast `transformers` runs a model on the CPU: the peer of `make bench`, on the same weights and threads."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np

from xlpk.model import Llama3Rope, Model, ModelConfig
from xlpk.weights import bf16_encode


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    rope = None
    if isinstance(config.rope_scaling, Llama3Rope):
        rope = {"rope_type": "llama3", **vars(config.rope_scaling)}
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings",
        "tie_word_embeddings", "bos_token_id",
    )  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": config.dtype,
        "eos_token_id": list(config.eos_token_ids),
        "rope_scaling": rope,
        **{name: getattr(config, name) for name in names},
    }


def checkpoint_of(model: Model, cache: Path) -> Path:
    """A folder that transformers reads: the model's own, or one written under `cache` the first time."""
    if model.path is not None:
        return model.path
    folder = cache / model.fingerprint[:16]
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors, offset = {}, 0
    shapes = model.config.tensor_shapes()
    dtype = model.weights.dtype
    arrays = {
        name: model.weights.matrix(name).base if len(shape) == 2 else _as_stored(model.weights.vector(name), dtype)
        for name, shape in shapes.items()
    }
    for name, array in arrays.items():
        kind = "BF16" if array.dtype == np.uint16 else "F32"
        tensors[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).data)
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    return folder


def _as_stored(vector: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    return bf16_encode(vector) if dtype == "bf16" else vector


def measure_transformers(
    model: Model, cache: Path, mode: str, threads: int, prompt: tuple[int, ...], decode: int, repeats: int
) -> dict[str, Any]:
    """Median prefill and decode tokens/s, greedy, one sequence.

    mode: `eager` (a cache that grows), `static` (one of fixed size), `compiled` (torch.compile of the static one).
    """
    import torch
    from transformers import DynamicCache, LlamaForCausalLM, StaticCache

    torch.set_num_threads(threads)
    folder = checkpoint_of(model, cache)
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[model.weights.dtype]
    peer = LlamaForCausalLM.from_pretrained(folder, dtype=torch_dtype).eval()
    forward = torch.compile(peer.forward, dynamic=False) if mode == "compiled" else peer.forward
    length = len(prompt) + decode
    ids = torch.tensor([prompt])
    prefill, steps = [], []
    with torch.inference_mode():
        for repeat in range(repeats + 1):  # the first one warms up, and compiles
            if mode == "eager":
                kv = DynamicCache(config=peer.config)
            else:
                kv = StaticCache(config=peer.config, max_cache_len=length)
            begin = time.perf_counter()
            positions = torch.arange(len(prompt))
            out = forward(
                input_ids=ids, past_key_values=kv, cache_position=positions,
                position_ids=positions[None], use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            if repeat:
                prefill.append(len(prompt) / (time.perf_counter() - begin))
            for position in range(len(prompt), length - 1):
                begin = time.perf_counter()
                at = torch.tensor([position])
                out = forward(
                    input_ids=token, past_key_values=kv, cache_position=at,
                    position_ids=at[None], use_cache=True, logits_to_keep=1,
                )  # fmt: skip
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                if repeat:
                    steps.append(time.perf_counter() - begin)
    return {
        "prefill_tokens_per_s": float(np.median(prefill)),
        "decode_tokens_per_s": 1 / float(np.median(steps)),
    }
