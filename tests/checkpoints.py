"""Small random checkpoints in the Hugging Face layout, made from a seed: what tests run models on.

Torch-free. Scales are such that logits spread over a few units and attention is far from uniform, so that a wrong
rotation, mask or head map shows in the logits.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

PROMPT_TOKENS = 40


def make_checkpoint(
    folder: Path,
    *,
    seed: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int = 64,
    vocab_size: int = 1031,
    rms_norm_eps: float = 1e-5,
    rope_theta: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
    max_position_embeddings: int = 2048,
    tied: bool = False,
    dtype: str = "bfloat16",
    attention_bias: bool = False,
    mlp_bias: bool = False,
    shards: int = 1,
    style: int = 4,
) -> Path:
    """Writes config.json and safetensors into `folder` and returns it. `style`: transformers 4 or 5 field names."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "rms_norm_eps": rms_norm_eps,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if style == 4:
        config |= {"rope_theta": rope_theta, "rope_scaling": rope_scaling, "torch_dtype": dtype}
    else:
        rope = {"rope_type": "default"} if rope_scaling is None else rope_scaling
        config |= {"rope_parameters": {**rope, "rope_theta": rope_theta}, "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2))

    rng = np.random.RandomState(seed)  # its stream is frozen (NEP 19); that of a Generator is not
    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[dtype]

    def matrix(rows: int, columns: int, scale: float) -> np.ndarray:
        return (scale * rng.standard_normal((rows, columns))).astype(np.float32).astype(kind)

    def gain() -> np.ndarray:
        return rng.uniform(0.5, 1.5, hidden_size).astype(np.float32).astype(kind)

    def bias(rows: int) -> np.ndarray:
        return rng.standard_normal(rows).astype(np.float32).astype(kind)

    queries, keys = num_attention_heads * head_dim, num_key_value_heads * head_dim
    unit = 1 / math.sqrt(hidden_size)  # a normed row in, variance 1 out
    tensors = {"model.embed_tokens.weight": matrix(vocab_size, hidden_size, 3 * unit)}
    for layer in range(num_hidden_layers):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "input_layernorm.weight": gain(),
            at + "self_attn.q_proj.weight": matrix(queries, hidden_size, 1.5 * unit),
            at + "self_attn.k_proj.weight": matrix(keys, hidden_size, 1.5 * unit),
            at + "self_attn.v_proj.weight": matrix(keys, hidden_size, unit),
            at + "self_attn.o_proj.weight": matrix(hidden_size, queries, 1 / math.sqrt(queries)),
            at + "post_attention_layernorm.weight": gain(),
            at + "mlp.gate_proj.weight": matrix(intermediate_size, hidden_size, 1.5 * unit),
            at + "mlp.up_proj.weight": matrix(intermediate_size, hidden_size, unit),
            at + "mlp.down_proj.weight": matrix(hidden_size, intermediate_size, 1 / math.sqrt(intermediate_size)),
        }
        for block, has_bias in (("self_attn", attention_bias), ("mlp", mlp_bias)):
            for name in [name for name in tensors if has_bias and name.startswith(at + block + ".")]:
                tensors[name.replace(".weight", ".bias")] = bias(len(tensors[name]))
    tensors["model.norm.weight"] = gain()
    if not tied:
        tensors["lm_head.weight"] = matrix(vocab_size, hidden_size, 3 * unit)

    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def make_case(folder: Path, case: str) -> Path:
    """The checkpoint of CASES[case], the same one each time."""
    return make_checkpoint(folder, seed=1000 + list(CASES).index(case), **CASES[case])


def widened(source: Path, folder: Path) -> Path:
    """The same values as float32: kernels then round nothing but the sums."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for file in source.glob("*.safetensors"):
        tensors |= {name: tensor.astype(np.float32) for name, tensor in load_file(file).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prompt(case: str) -> np.ndarray:
    """[40] token ids; each case has its own."""
    vocab_size = CASES[case].get("vocab_size", 1031)
    return np.random.RandomState(2000 + list(CASES).index(case)).randint(0, vocab_size, PROMPT_TOKENS)


def fingerprint(folder: Path) -> str:
    """Of every file's bytes: a golden file says for which checkpoint it was made."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def llama3(factor: float, low: float, high: float, original: int) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _case(hidden: int, ffn: int, layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        **more,
    }


# Appending keeps the others' seeds, and so their golden files.
CASES: dict[str, dict[str, Any]] = {
    "mha": _case(128, 352, 2, 2, 2),
    "gqa": _case(256, 672, 2, 4, 2, style=5),
    "gqa_wide_group": _case(256, 544, 2, 8, 2, tied=True),
    "mqa": _case(192, 480, 3, 3, 1, rms_norm_eps=1e-6),
    "head128": _case(256, 704, 2, 2, 1, head_dim=128, rope_theta=500000.0),
    "head128_mha_fp32": _case(160, 416, 1, 2, 2, head_dim=128, dtype="float32", tied=True),
    "fp32": _case(192, 608, 2, 4, 2, dtype="float32", vocab_size=509),
    "narrow": _case(96, 160, 1, 4, 2, vocab_size=257, rms_norm_eps=1e-2),
    "deep": _case(160, 288, 4, 2, 1, vocab_size=771, style=5),
    "tied_eps": _case(160, 352, 2, 4, 4, tied=True, rms_norm_eps=1e-2, dtype="float32"),
    "llama3_rope": _case(128, 416, 2, 4, 2, rope_theta=500000.0, rope_scaling=llama3(32.0, 1.0, 4.0, 64), tied=True),
    "llama3_rope_style5": _case(192, 352, 3, 4, 1, head_dim=128, rope_scaling=llama3(8.0, 1.0, 4.0, 32), style=5),
    "small_theta": _case(96, 224, 2, 2, 1, rope_theta=100.0, vocab_size=1000, rms_norm_eps=1e-6),
    "sharded": _case(256, 512, 4, 8, 4, shards=3),
    "one_head": _case(32, 32, 1, 1, 1, vocab_size=33, shards=2, dtype="float32"),
    "fp16": _case(192, 416, 2, 4, 2, dtype="float16"),
    "fp16_head128": _case(128, 352, 2, 2, 1, head_dim=128, dtype="float16", tied=True, style=5, shards=2),
    "attention_bias": _case(160, 352, 2, 4, 2, attention_bias=True),
    "biases_fp16": _case(128, 288, 2, 4, 1, attention_bias=True, mlp_bias=True, dtype="float16", style=5),
    "head80": _case(160, 352, 2, 4, 2, head_dim=80, rope_theta=1000.0),
    "head80_mha_fp32": _case(96, 224, 2, 2, 2, head_dim=80, dtype="float32", tied=True, mlp_bias=True),
    "head96": _case(192, 352, 2, 3, 1, head_dim=96, dtype="float16", vocab_size=771),
    "linear_rope": _case(128, 352, 2, 4, 2, rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=100.0),
    "linear_rope_style5": _case(
        160, 288, 2, 2, 1, head_dim=80, rope_scaling={"rope_type": "linear", "factor": 1.5}, rope_theta=1000.0, style=5
    ),
    "dynamic_rope": _case(128, 352, 2, 4, 2, rope_scaling={"type": "dynamic", "factor": 2.0}, rope_theta=1000.0),
}
# What the quick suite looks at: each type, size and map of heads, scaling, bias and layout of files that there is.
SOME = ("mha", "gqa", "mqa", "head128_mha_fp32", "llama3_rope_style5", "fp16_head128", "biases_fp16", "head80")
SOME += ("linear_rope", "dynamic_rope")
