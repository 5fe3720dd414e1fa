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
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from xlpk.errors import InputError
from xlpk.text import ChatTemplate
from xlpk.weights import ELEMENT_BYTES, Fill, Weights, parse_json, shown

TINY = Path(__file__).parent / "models" / "tiny"  # ships with the package
HEAD_DIMS = (64, 80, 96, 128)  # what the attention kernels are written for
GRANULE = 32  # hidden and intermediate sizes are multiples of it: reductions use 32 lanes
MAX_SIZE = 1 << 24  # no real vocabulary or width is larger: a bigger figure is a broken file
MAX_LAYERS = 1024
MAX_POSITIONS = 1 << 30
FLOAT32 = np.finfo(np.float32)
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # config.json's word -> ours
DTYPE_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}


@dataclass(frozen=True)
class Llama3Rope:
    """RoPE scaling of Llama 3.1 and 3.2: long waves stretched by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int  # tokens


@dataclass(frozen=True)
class LinearRope:
    """RoPE scaling by position interpolation: every wave stretched by `factor` (Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True)
class DynamicRope:
    """NTK-aware RoPE scaling: theta grows with the sequence once it is longer than `max_position_embeddings`."""

    factor: float


Rope: TypeAlias = Llama3Rope | LinearRope | DynamicRope


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
            if not float(FLOAT32.tiny) <= getattr(self, key) <= float(FLOAT32.max):
                raise InputError(key, getattr(self, key), "a finite number above 0, as float32 too")
        if self.dtype not in DTYPES:
            raise InputError("dtype", shown(self.dtype), f"one of {', '.join(DTYPES)}")
        scaling = self.rope_scaling
        if scaling is not None and not 1 <= scaling.factor <= float(FLOAT32.max):
            raise InputError("rope_scaling.factor", scaling.factor, "a finite number of at least 1")
        if isinstance(scaling, Llama3Rope):
            if not 0 < scaling.low_freq_factor < math.inf:
                raise InputError("rope_scaling.low_freq_factor", scaling.low_freq_factor, "a finite number above 0")
            if not scaling.low_freq_factor < scaling.high_freq_factor < math.inf:
                raise InputError(
                    "rope_scaling.high_freq_factor",
                    scaling.high_freq_factor,
                    f"finite and above low_freq_factor={scaling.low_freq_factor}",
                )
            if not 1 <= scaling.original_max_position_embeddings <= MAX_POSITIONS:
                raise InputError(
                    "rope_scaling.original_max_position_embeddings",
                    scaling.original_max_position_embeddings,
                    f"1 to {MAX_POSITIONS}",
                )
        for key, ids in (
            ("bos_token_id", () if self.bos_token_id is None else (self.bos_token_id,)),
            ("eos_token_id", self.eos_token_ids),
        ):
            for token in ids:
                if not 0 <= token < self.vocab_size:
                    raise InputError(key, token, f"0 to {self.vocab_size - 1} (vocab_size={self.vocab_size})")

    @classmethod
    def from_hf(cls, raw: object, source: str) -> ModelConfig:
        """The parsed config.json, as transformers 4 or 5 writes it -> ModelConfig. `source` opens every message.

        Absent fields take the defaults of transformers' LlamaConfig; sizes, head count and epsilon have to be there.
        """
        reader = _Reader(raw, source)
        reader.check_family()
        heads = reader.whole("num_attention_heads")
        hidden = reader.whole("hidden_size")
        theta, scaling = reader.rope()
        if reader.get("head_dim") is None and heads > 0 and hidden % heads:
            raise InputError(
                f"{source}:hidden_size", hidden, f"a multiple of num_attention_heads={heads}, or a head_dim of its own"
            )
        try:
            return cls(
                vocab_size=reader.whole("vocab_size"),
                hidden_size=hidden,
                intermediate_size=reader.whole("intermediate_size"),
                num_hidden_layers=reader.whole("num_hidden_layers"),
                num_attention_heads=heads,
                num_key_value_heads=reader.whole("num_key_value_heads", heads),
                head_dim=reader.whole("head_dim", hidden // heads if heads > 0 else 0),
                rms_norm_eps=reader.number("rms_norm_eps"),
                rope_theta=theta,
                rope_scaling=scaling,
                max_position_embeddings=reader.whole("max_position_embeddings", 2048),
                tie_word_embeddings=reader.flag("tie_word_embeddings", False),
                dtype=reader.dtype(),
                bos_token_id=reader.token_ids("bos_token_id", 1, several=False)[0],
                eos_token_ids=tuple(t for t in reader.token_ids("eos_token_id", 2, several=True) if t is not None),
                attention_bias=reader.flag("attention_bias", False),
                mlp_bias=reader.flag("mlp_bias", False),
            )
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
        factor, d = self.rope_scaling.factor, self.head_dim
        growth = factor * max(tokens, self.max_position_embeddings) / self.max_position_embeddings - (factor - 1)
        return replace(self, rope_theta=self.rope_theta * growth ** (d / (d - 2)), rope_scaling=None)

    def inv_freq(self) -> npt.NDArray[np.float64]:
        """Radians a token for each pair of RoPE's rotated elements -> [head_dim / 2].

        Plain: theta^(-2i/d) (Su et al. 2021, RoFormer, section 3.2.2). Linear: that over the factor. Dynamic: plain,
        see `at_length`. Llama 3 scaling: `apply_scaling` in
        meta-llama/llama-models (models/llama3/model.py), which transformers repeats as `_compute_llama3_parameters`
        in modeling_rope_utils.py.
        """
        plain = self.rope_theta ** (-np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        scaling = self.rope_scaling
        if isinstance(scaling, LinearRope):
            return np.asarray(plain / scaling.factor, dtype=np.float64)
        if not isinstance(scaling, Llama3Rope):
            return plain
        waves = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # turns over the original context
        blend = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = np.clip(blend, 0.0, 1.0)  # 1: a short wave, kept; 0: a long one, stretched
        return np.asarray((1 - keep) * plain / scaling.factor + keep * plain, dtype=np.float64)

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


class _Reader:
    """Typed access to a parsed config.json; a wrong type, a missing field or another architecture: InputError."""

    def __init__(self, raw: object, source: str) -> None:
        if not isinstance(raw, dict):
            raise InputError(source, shown(raw), "a JSON object")
        self.raw: dict[str, Any] = raw
        self.source = source

    def refuse(self, key: str, value: object, allowed: str) -> InputError:
        return InputError(f"{self.source}:{key}", shown(value), allowed)

    def get(self, key: str) -> Any:
        """The value at `key`, dots descend; null and absent are one."""
        value: Any = self.raw
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.refuse(key, "missing", "a whole number is required")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.refuse(key, "missing", "a number is required")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(key, value, "a number")
        try:
            return float(value)
        except OverflowError:
            raise self.refuse(key, value, "a finite number") from None

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return value

    def token_ids(self, key: str, default: int, *, several: bool) -> list[int | None]:
        if key not in self.raw:
            return [default] if default < self.whole("vocab_size") else [None]
        value = self.raw[key]
        if value is None:
            return [None]
        ids = value if several and isinstance(value, list) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise self.refuse(key, value, "a token id, a list of them or null" if several else "a token id or null")
        return list(ids)

    def dtype(self) -> str:
        value = self.get("dtype") if self.get("dtype") is not None else self.get("torch_dtype")
        if value is None:
            return "float32"
        if not isinstance(value, str) or value.removeprefix("torch.") not in DTYPES:
            raise self.refuse(
                "dtype" if self.get("dtype") is not None else "torch_dtype", value, f"one of {', '.join(DTYPES)}"
            )
        return value.removeprefix("torch.")

    def check_family(self) -> None:
        model_type, architectures = self.get("model_type"), self.get("architectures")
        if model_type is None and architectures is None:
            raise self.refuse("model_type", "missing", "llama (architectures: LlamaForCausalLM)")
        if architectures is not None and architectures != ["LlamaForCausalLM"]:
            raise self.refuse("architectures", architectures, "only LlamaForCausalLM is supported")
        if model_type is not None and model_type != "llama":
            raise self.refuse("model_type", model_type, "only llama is supported")
        if self.get("quantization_config") is not None:
            raise self.refuse(
                "quantization_config",
                self.get("quantization_config"),
                "unquantized bfloat16, float16 or float32 checkpoints only",
            )
        if self.get("hidden_act") not in (None, "silu"):
            raise self.refuse("hidden_act", self.get("hidden_act"), "only silu is supported")

    def rope(self) -> tuple[float, Rope | None]:
        """theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4)."""
        new, old = self.get("rope_parameters"), self.get("rope_scaling")
        for key, value in (("rope_parameters", new), ("rope_scaling", old)):
            if value is not None and not isinstance(value, dict):
                raise self.refuse(key, value, "an object or null")
        if new is not None and old is not None and new != old:
            raise self.refuse("rope_scaling", old, "absent, or what rope_parameters says")
        at = "rope_scaling" if new is None else "rope_parameters"
        fields: dict[str, Any] = (old if new is None else new) or {}
        inner, outer = fields.get("rope_theta"), self.get("rope_theta")
        if inner is not None and outer is not None and inner != outer:
            raise self.refuse("rope_theta", outer, f"absent, or {at}.rope_theta={shown(inner)}")
        theta = self.number(f"{at}.rope_theta" if inner is not None else "rope_theta", 10000.0)
        partial = fields.get("partial_rotary_factor", self.get("partial_rotary_factor"))
        if partial not in (None, 1):
            raise self.refuse(f"{at}.partial_rotary_factor", partial, "only 1 is supported")
        kind = fields.get("rope_type", fields.get("type", "default"))
        if kind == "default":
            return theta, None
        if kind == "linear":
            return theta, LinearRope(self.number(f"{at}.factor"))
        if kind == "dynamic":
            return theta, DynamicRope(self.number(f"{at}.factor"))
        if kind != "llama3":
            raise self.refuse(f"{at}.rope_type", kind, "only default, linear, dynamic and llama3 are supported")
        return theta, Llama3Rope(
            factor=self.number(f"{at}.factor"),
            low_freq_factor=self.number(f"{at}.low_freq_factor"),
            high_freq_factor=self.number(f"{at}.high_freq_factor"),
            original_max_position_embeddings=self.whole(f"{at}.original_max_position_embeddings"),
        )


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

    @cached_property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` beside the weights; None if there is none."""
        file = None if self.path is None else self.path / "tokenizer.json"
        if file is None or not file.exists():
            return None
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise InputError(str(file), shown(str(error)), "a tokenizer.json of Hugging Face tokenizers") from None

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
        config = replace(SHAPES[name_or_shape], dtype=DTYPE_NAMES[kind])
        return Model(name_or_shape, config, Weights.from_hash(config, seed, kind, fill), None)
    if path is None and name_or_shape != "tiny":
        raise InputError("model", shown(name_or_shape), f"one of tiny, {', '.join(SHAPES)}, or a folder in model.path")
    folder = TINY if path is None else path
    config = read_config(folder)
    weights = Weights.open(folder, config)
    if dtype not in ("auto", weights.dtype):
        raise InputError("model.dtype", dtype, f"auto or {weights.dtype}, which is what {folder.name} holds")
    return Model(name_or_shape, replace(config, dtype=DTYPE_NAMES[weights.dtype]), weights, folder)


def read_config(folder: Path) -> ModelConfig:
    """FOLDER/config.json -> ModelConfig; stop tokens of generation_config.json win, as they do in transformers."""
    if not folder.is_dir():
        raise InputError("model.path", folder, "a folder with config.json and safetensors files")
    raw = parse_json(_read(folder / "config.json"), "config.json")
    generation = folder / "generation_config.json"
    if isinstance(raw, dict) and generation.exists():
        stops = parse_json(_read(generation), generation.name)
        if not isinstance(stops, dict):
            raise InputError(generation.name, shown(stops), "a JSON object")
        if stops.get("eos_token_id") is not None:
            raw = {**raw, "eos_token_id": stops["eos_token_id"]}
    return ModelConfig.from_hf(raw, "config.json")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise InputError("model.path", file.parent, f"a folder that holds {file.name}") from None
    except OSError as error:
        raise InputError(str(file), error.strerror, "a readable file") from None
