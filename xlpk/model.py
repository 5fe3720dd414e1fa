"""What a model is: its configuration (Hugging Face field names), its tensors' shapes, its weights, its tokenizer.

`load_model` turns a folder in the Hugging Face layout, the packaged tiny model or a named shape with hash weights into
one `Model`. Only the Llama family is accepted; everything else is refused by name. The bytes of the weights are the
business of `weights.py`, the arithmetic is that of `reference.py` and the kernels.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xlpk.dtypes import CONFIG_DTYPE, CONFIG_DTYPE_OF, ELEMENT_BYTES
from xlpk.errors import InputError, shown
from xlpk.generation import FILE as GENERATION_FILE
from xlpk.generation import GenerationConfig, read_generation_config
from xlpk.hash_weights import Fill
from xlpk.hf_config import read_fields
from xlpk.jsonfile import parse_json, read_bytes
from xlpk.rope import FLOAT32_MAX, MAX_POSITIONS, DynamicRope, Llama3Rope, Rope, check_rope, dynamic_theta, inv_freq
from xlpk.text import ChatTemplate
from xlpk.weights import Weights

TINY = Path(__file__).parent / "models" / "tiny"  # ships with the package
HEAD_DIMS = (64, 80, 96, 128)  # what the attention kernels are written for
GRANULE = 32  # hidden and intermediate sizes are multiples of it: reductions use 32 lanes
MAX_SIZE = 1 << 24  # no real vocabulary or width is larger: a bigger figure is a broken file
MAX_LAYERS = 1024
FLOAT32_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class ModelConfig:
    """One Llama model. Field names as in Hugging Face's config.json; each instance has been checked."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Rope | None
    max_position_embeddings: int  # tokens
    tie_word_embeddings: bool
    dtype: str  # "bfloat16" | "float16" | "float32": how the matrices are stored
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    attention_bias: bool = False  # of the q, k, v and o projections
    mlp_bias: bool = False  # of the gate, up and down projections

    def __post_init__(self) -> None:
        for key, most in (
            ("vocab_size", MAX_SIZE),
            ("hidden_size", MAX_SIZE),
            ("intermediate_size", MAX_SIZE),
            ("num_hidden_layers", MAX_LAYERS),
            ("num_attention_heads", MAX_SIZE),
            ("num_key_value_heads", MAX_SIZE),
            ("max_position_embeddings", MAX_POSITIONS),
        ):
            value = getattr(self, key)
            if not 1 <= value <= most:
                raise InputError(key, value, f"1 to {most}")
        for key in ("hidden_size", "intermediate_size"):
            if getattr(self, key) % GRANULE:
                raise InputError(key, getattr(self, key), f"a multiple of {GRANULE}")
        if self.head_dim not in HEAD_DIMS:
            raise InputError("head_dim", self.head_dim, f"one of {', '.join(map(str, HEAD_DIMS))}")
        if self.num_attention_heads * self.head_dim % GRANULE:
            raise InputError(
                "num_attention_heads", self.num_attention_heads, f"an even number with head_dim={self.head_dim}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                "num_key_value_heads",
                self.num_key_value_heads,
                f"a divisor of num_attention_heads={self.num_attention_heads}",
            )
        for key in ("rms_norm_eps", "rope_theta"):
            if not FLOAT32_TINY <= getattr(self, key) <= FLOAT32_MAX:
                raise InputError(key, getattr(self, key), "a finite number above 0, as float32 too")
        if self.dtype not in CONFIG_DTYPE:
            raise InputError("dtype", shown(self.dtype), f"one of {', '.join(CONFIG_DTYPE)}")
        check_rope(self.rope_scaling)
        for key, ids in (
            ("bos_token_id", () if self.bos_token_id is None else (self.bos_token_id,)),
            ("eos_token_id", self.eos_token_ids),
        ):
            for token in ids:
                if not 0 <= token < self.vocab_size:
                    raise InputError(key, token, f"0 to {self.vocab_size - 1} (vocab_size={self.vocab_size})")

    @classmethod
    def from_hf(cls, raw: object, source: str) -> ModelConfig:
        """The parsed config.json -> ModelConfig, see `hf_config.read_fields`. `source` opens every message."""
        try:
            return cls(**read_fields(raw, source))
        except InputError as error:
            if error.field.startswith(f"{source}:"):
                raise
            raise InputError(f"{source}:{error.field}", error.value, error.allowed) from None

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def head_stride(self) -> int:
        """head_dim up to a whole number of virtual lanes: how queries, pages and partials hold a head."""
        return -(-self.head_dim // GRANULE) * GRANULE

    @property
    def stretches(self) -> bool:
        """Whether a sequence may be longer than max_position_embeddings."""
        return isinstance(self.rope_scaling, DynamicRope)

    def at_length(self, tokens: int) -> ModelConfig:
        """This model for sequences of up to `tokens`: dynamic RoPE scaling becomes the theta of that length.

        transformers (`_compute_dynamic_ntk_parameters` in modeling_rope_utils.py) takes the length that a sequence has
        reached, so keys cached earlier keep the rotation of an earlier theta and logits depend on how a prompt was
        chunked. Here the length is fixed, and the two are equal for a sequence of `tokens` in one forward pass, and
        for any up to `max_position_embeddings`.
        """
        if not isinstance(self.rope_scaling, DynamicRope):
            return self
        theta = dynamic_theta(self.rope_theta, self.head_dim, self.rope_scaling, tokens, self.max_position_embeddings)
        return replace(self, rope_theta=theta, rope_scaling=None)

    def inv_freq(self) -> npt.NDArray[np.float64]:
        """Radians a token for each pair of RoPE's rotated elements -> [head_dim / 2]; see `rope.inv_freq`."""
        return inv_freq(self.rope_theta, self.head_dim, self.rope_scaling)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, by its Hugging Face name; rows are outputs. Tied: no lm_head.weight."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_hidden_layers):
            at = f"model.layers.{layer}."
            shapes[at + "input_layernorm.weight"] = (hidden,)
            shapes[at + "self_attn.q_proj.weight"] = (queries, hidden)
            shapes[at + "self_attn.k_proj.weight"] = (keys, hidden)
            shapes[at + "self_attn.v_proj.weight"] = (keys, hidden)
            shapes[at + "self_attn.o_proj.weight"] = (hidden, queries)
            shapes[at + "post_attention_layernorm.weight"] = (hidden,)
            shapes[at + "mlp.gate_proj.weight"] = (ffn, hidden)
            shapes[at + "mlp.up_proj.weight"] = (ffn, hidden)
            shapes[at + "mlp.down_proj.weight"] = (hidden, ffn)
            for block, has_bias in (("self_attn", self.attention_bias), ("mlp", self.mlp_bias)):
                for matrix in [name for name in shapes if has_bias and name.startswith(at + block + ".")]:
                    shapes[matrix.replace(".weight", ".bias")] = shapes[matrix][:1]
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    @property
    def parameters(self) -> int:
        """Weights in the model; a tied embedding counts once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def phase_bytes(self, dtype: str) -> dict[str, int]:
        """Weight bytes that a step must read at least once, by phase (layout.PHASES); `embed` reads one row a token."""
        totals = dict.fromkeys(("qkv", "output", "gate_up", "down", "lm_head"), 0)
        for name, shape in self.tensor_shapes().items():
            part = name.split(".")[-2]
            if phase := _PHASE_OF.get(part):
                totals[phase] += (4 if len(shape) == 1 else ELEMENT_BYTES[dtype]) * math.prod(shape)
            if part == "embed_tokens" and self.tie_word_embeddings:
                totals["lm_head"] += ELEMENT_BYTES[dtype] * math.prod(shape)
        return totals

    def bytes_per_token(self, dtype: str) -> int:
        """Weight bytes that one decode step of one row must read, with matrices in `dtype` (bf16, fp16 or fp32).

        Every matrix once and the vectors (norms, biases) as float32. Of an untied embedding one row is read; a tied one
        is read in full as the LM head, its row included.
        """
        if dtype not in ELEMENT_BYTES:
            raise InputError("dtype", shown(dtype), f"one of {', '.join(ELEMENT_BYTES)}")
        total = 0
        for name, shape in self.tensor_shapes().items():
            if len(shape) == 1:
                total += 4 * shape[0]
            elif name == "model.embed_tokens.weight" and not self.tie_word_embeddings:
                total += ELEMENT_BYTES[dtype] * self.hidden_size
            else:
                total += ELEMENT_BYTES[dtype] * math.prod(shape)
        return total


_PHASE_OF = {
    "input_layernorm": "qkv",
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "output",
    "post_attention_layernorm": "gate_up",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
    "norm": "lm_head",
    "lm_head": "lm_head",
}


SHAPES: dict[str, ModelConfig] = {
    # Llama-3.2-1B: 1,235,814,400 parameters
    "llama_1b_shape": ModelConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=128000,
        eos_token_ids=(128001,),
    ),
    # Llama-3.1-8B: 8,030,261,248 parameters
    "llama_8b_shape": ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_token_id=128000,
        eos_token_ids=(128001,),
    ),
    # The 160 M class: width and depth of JackFram/llama-160m, with grouped queries: 160,058,112 parameters
    "llama_160m_shape": ModelConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=3328,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_ids=(2,),
    ),
}


@dataclass
class Model:
    """A model ready to run. `path` is its folder; None where the weights come from a hash."""

    name: str
    config: ModelConfig
    weights: Weights = field(repr=False)
    path: Path | None
    generation: GenerationConfig = field(default_factory=GenerationConfig)  # of the folder

    @cached_property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` beside the weights; None if there is none."""
        file = None if self.path is None else self.path / "tokenizer.json"
        if file is None or not file.exists():
            return None
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise InputError(str(file), shown(str(error)), "a tokenizer.json of Hugging Face tokenizers") from None
        tokenizer.no_truncation()  # of training, and saved with it: a prompt is neither cut nor filled up in silence
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template beside the weights; None if there is none."""
        return None if self.path is None else ChatTemplate.open(self.path)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over the config and `Weights.identity`: tells models apart without reading them all."""
        facts = json.dumps([asdict(self.config), self.weights.identity], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()


def load_model(
    name_or_shape: str, path: Path | None = None, seed: int = 0, dtype: str = "auto", fill: Fill | None = None
) -> Model:
    """A folder in the Hugging Face layout, the packaged "tiny", or a named shape with hash weights -> Model.

    Args:
        name_or_shape: "tiny", a key of SHAPES, or any name for what `path` holds.
        path: a folder with config.json and safetensors; it decides if given.
        seed: of the hash weights; unused with a folder.
        dtype: "bf16", "fp16" or "fp32"; "auto" is the checkpoint's own, and bf16 for hash weights. A checkpoint is used
            as it is stored, so another dtype than its own is refused.
        fill: a compiled generator of hash weights, see `Weights.from_hash`.
    """
    if dtype not in ("auto", *ELEMENT_BYTES):
        raise InputError("model.dtype", shown(dtype), f"one of auto, {', '.join(ELEMENT_BYTES)}")
    if path is None and name_or_shape in SHAPES:
        kind = "bf16" if dtype == "auto" else dtype
        config = replace(SHAPES[name_or_shape], dtype=CONFIG_DTYPE_OF[kind])
        return Model(name_or_shape, config, Weights.from_hash(config, seed, kind, fill), None)
    if path is None and name_or_shape != "tiny":
        raise InputError("model", shown(name_or_shape), f"one of tiny, {', '.join(SHAPES)}, or a folder in model.path")
    folder = TINY if path is None else path
    config, generation = _read_configs(folder)
    weights = Weights.open(folder, config)
    if dtype not in ("auto", weights.dtype):
        raise InputError("model.dtype", dtype, f"auto or {weights.dtype}, which is what {folder.name} holds")
    return Model(name_or_shape, replace(config, dtype=CONFIG_DTYPE_OF[weights.dtype]), weights, folder, generation)


def read_config(folder: Path) -> ModelConfig:
    """FOLDER/config.json -> ModelConfig; stop tokens of generation_config.json win, as they do in transformers."""
    return _read_configs(folder)[0]


def _read_configs(folder: Path) -> tuple[ModelConfig, GenerationConfig]:
    if not folder.is_dir():
        raise InputError("model.path", folder, "a folder with config.json and safetensors files")
    raw = parse_json(read_bytes(folder / "config.json"), "config.json")
    generation = read_generation_config(folder)
    if generation.eos_token_ids is None or not isinstance(raw, dict):
        return ModelConfig.from_hf(raw, "config.json"), generation
    config = ModelConfig.from_hf({**raw, "eos_token_id": None}, "config.json")
    try:
        return replace(config, eos_token_ids=generation.eos_token_ids), generation
    except InputError as error:
        raise InputError(f"{GENERATION_FILE}:{error.field}", error.value, error.allowed) from None
