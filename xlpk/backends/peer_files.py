"""The weights of a model as files that the peers of `make bench` read: a Hugging Face folder, a GGUF file.

Both are written once and kept; a name covers what a file holds, so a stale one is never used. The GGUF file has no
tokenizer: prompts are token ids.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xlpk.dtypes import bf16_encode, decode
from xlpk.errors import InputError
from xlpk.model import Model, ModelConfig
from xlpk.rope import Llama3Rope

Array = np.ndarray[Any, Any]

GGUF_DTYPES = ("bf16", "f16", "f32")
_LLAMA_NAMES = {  # Hugging Face -> llama.cpp, both without ".weight"
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def tensors_of(model: Model) -> Iterator[tuple[str, Array]]:
    """Every tensor by its Hugging Face name: matrices as they lie in memory (uint16 is bf16), vectors as float32."""
    for name, shape in model.config.tensor_shapes().items():
        yield name, model.weights.matrix(name).base if len(shape) == 2 else model.weights.vector(name)


def _written(path: Path, write: Callable[[Path], None]) -> Path:
    """`path`, made by `write` if it is not there; a file that was cut off never bears the name."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            write(unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path


# ---------------------------------------------------------------------------------------------- Hugging Face


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    rope = None
    if isinstance(config.rope_scaling, Llama3Rope):
        rope = {"rope_type": "llama3", **vars(config.rope_scaling)}
    elif config.rope_scaling is not None:
        raise InputError("rope_scaling", config.rope_scaling, "none or llama3 in a folder written for transformers")
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings",
        "tie_word_embeddings", "bos_token_id", "attention_bias", "mlp_bias",
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


def hf_folder(model: Model, cache: Path) -> Path:
    """A folder that transformers reads and `load_model` too: the model's own, or one under `cache`."""
    if model.path is not None:
        return model.path
    folder = cache / model.fingerprint[:16]
    _written(folder / "model.safetensors", lambda path: _write_safetensors(model, path))
    _written(folder / "config.json", lambda path: _write_json(hf_config(model.config), path))
    return folder


def _write_json(values: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(values))


def _write_safetensors(model: Model, path: Path) -> None:
    """Vectors in the dtype of the matrices, as checkpoints have them; both steps are exact for vectors that came so."""
    words = {np.dtype(np.uint16): "BF16", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
    as_stored: dict[str, Callable[[Array], Array]] = {
        "bf16": bf16_encode,
        "fp16": lambda values: values.astype(np.float16),
        "fp32": lambda values: values,
    }
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    arrays, offset = [], 0
    for name, held in tensors_of(model):
        array = held if held.ndim == 2 else as_stored[model.weights.dtype](held)
        entries[name] = {
            "dtype": words[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
        arrays.append(array)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 64)  # matrices lie as aligned as hash weights do
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for array in arrays:
            file.write(np.ascontiguousarray(array).data)


# ---------------------------------------------------------------------------------------------- GGUF


def gguf_file(model: Model, dtype: str, cache: Path) -> Path:
    """The model for llama.cpp, its matrices in `dtype` (bf16, f16 or f32), under `cache`. Needs the wheel `gguf`."""
    if dtype not in GGUF_DTYPES:
        raise InputError("dtype", dtype, f"one of {', '.join(GGUF_DTYPES)}")
    if model.config.attention_bias or model.config.mlp_bias:
        raise InputError("model", model.name, "a model without biases, for a GGUF file")
    path = cache / f"{model.fingerprint[:16]}-{dtype}.gguf"
    return _written(path, lambda unfinished: _write_gguf(model, dtype, unfinished))


def _write_gguf(model: Model, dtype: str, path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    config = model.config
    kind = {"bf16": LlamaFileType.MOSTLY_BF16, "f16": LlamaFileType.MOSTLY_F16, "f32": LlamaFileType.ALL_F32}[dtype]
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if config.rope_scaling is not None:  # llama.cpp divides the plain frequencies by these
        plain = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / config.inv_freq()).astype(np.float32))
    for name, held in tensors_of(model):
        array = held
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if f".{part}." in name:
                array = pairs_together(held, heads)
        if array.ndim == 1 or dtype == "f32":
            writer.add_tensor(llama_name(name), np.ascontiguousarray(decode(array)))
        elif dtype == "bf16":
            bits = array if array.dtype == np.uint16 else bf16_encode(array)
            stored = np.ascontiguousarray(bits).view(np.uint8)
            writer.add_tensor(llama_name(name), stored, raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(llama_name(name), decode(array).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    part = name.removesuffix(".weight")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", part):
        return f"blk.{match[1]}.{_LLAMA_NAMES[match[2]]}.weight"
    return f"{_LLAMA_NAMES[part]}.weight"


def pairs_together(matrix: Array, heads: int) -> Array:
    """Rows of a Q or K projection in the order that llama.cpp rotates.

    RoPE turns rows i and i + d/2 of a head of Hugging Face together, and rows 2i and 2i + 1 of a head of llama.cpp
    (`permute` in its converter).
    """
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
