"""config.json of a Llama model, as transformers 4 or 5 writes it -> the fields of a `ModelConfig`, all but ranges."""

from __future__ import annotations

from typing import Any

from xlpk.dtypes import CONFIG_DTYPE
from xlpk.errors import InputError, shown
from xlpk.jsonfile import Fields
from xlpk.rope import DynamicRope, LinearRope, Llama3Rope, Rope


def read_fields(raw: object, source: str) -> dict[str, Any]:
    """The parsed config.json -> ModelConfig's arguments. `source` opens every message.

    Absent fields take the defaults of transformers' LlamaConfig; sizes, head count and epsilon have to be there. A
    wrong type, a missing field or another architecture: InputError.
    """
    reader = _LlamaFields(raw, source)
    reader.check_family()
    heads = reader.whole("num_attention_heads")
    hidden = reader.whole("hidden_size")
    theta, scaling = reader.rope()
    if reader.get("head_dim") is None and heads > 0 and hidden % heads:
        raise InputError(
            f"{source}:hidden_size", hidden, f"a multiple of num_attention_heads={heads}, or a head_dim of its own"
        )
    return {
        "vocab_size": reader.whole("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": reader.whole("intermediate_size"),
        "num_hidden_layers": reader.whole("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.whole("num_key_value_heads", heads),
        "head_dim": reader.whole("head_dim", hidden // heads if heads > 0 else 0),
        "rms_norm_eps": reader.number("rms_norm_eps"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": reader.whole("max_position_embeddings", 2048),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
        "dtype": reader.dtype(),
        "bos_token_id": next(iter(reader.ids("bos_token_id", 1, several=False)), None),
        "eos_token_ids": reader.ids("eos_token_id", 2, several=True),
        "attention_bias": reader.flag("attention_bias", False),
        "mlp_bias": reader.flag("mlp_bias", False),
    }


class _LlamaFields(Fields):
    """What has more than one spelling, and what must not be there."""

    def ids(self, key: str, default: int, *, several: bool) -> tuple[int, ...]:
        """transformers' default where the key is absent, if the vocabulary has it."""
        if key not in self.raw:
            return (default,) if default < self.whole("vocab_size") else ()
        return self.token_ids(key, several=several)

    def dtype(self) -> str:
        value = self.get("dtype") if self.get("dtype") is not None else self.get("torch_dtype")
        if value is None:
            return "float32"
        if not isinstance(value, str) or value.removeprefix("torch.") not in CONFIG_DTYPE:
            raise self.refuse(
                "dtype" if self.get("dtype") is not None else "torch_dtype", value, f"one of {', '.join(CONFIG_DTYPE)}"
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
