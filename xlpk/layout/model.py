"""The model as kernels see it: its dimensions and where the weights of a layer lie."""

from __future__ import annotations

from xlpk.layout.record import Record

DIMS = Record(
    "Dims",
    "The model's dimensions, under their Hugging Face names; on the GPU, compile-time constants of the same names.",
    (
        ("vocab_size", "i32", "tokens"),
        ("hidden_size", "i32", "multiple of 32"),
        ("intermediate_size", "i32", "multiple of 32"),
        ("num_hidden_layers", "i32", "layers"),
        ("num_attention_heads", "i32", "query heads"),
        ("num_key_value_heads", "i32", "divides num_attention_heads"),
        ("head_dim", "i32", "multiple of 16"),
        ("head_stride", "i32", "head_dim up to a multiple of 32: how q, pages and partials hold a head"),
        ("page_size", "i32", "tokens a KV page holds; divides 256"),
        ("rms_norm_eps", "f32", ""),
    ),
)

LAYER_WEIGHTS = Record(
    "LayerWeights",
    "One layer. Matrices are row-major [out, in] in the storage type of the model; norm vectors and biases are float.",
    (
        ("input_layernorm", "const float*", "[hidden_size]"),
        ("q_proj", "const void*", "[num_attention_heads * head_dim, hidden_size]"),
        ("k_proj", "const void*", "[num_key_value_heads * head_dim, hidden_size]"),
        ("v_proj", "const void*", "[num_key_value_heads * head_dim, hidden_size]"),
        ("o_proj", "const void*", "[hidden_size, num_attention_heads * head_dim]"),
        ("post_attention_layernorm", "const float*", "[hidden_size]"),
        ("gate_proj", "const void*", "[intermediate_size, hidden_size]"),
        ("up_proj", "const void*", "[intermediate_size, hidden_size]"),
        ("down_proj", "const void*", "[hidden_size, intermediate_size]"),
        ("q_bias", "const float*", "[num_attention_heads * head_dim]; null: none"),
        ("k_bias", "const float*", "[num_key_value_heads * head_dim]; null: none"),
        ("v_bias", "const float*", "[num_key_value_heads * head_dim]; null: none"),
        ("o_bias", "const float*", "[hidden_size]; null: none"),
        ("gate_bias", "const float*", "[intermediate_size]; null: none"),
        ("up_bias", "const float*", "[intermediate_size]; null: none"),
        ("down_bias", "const float*", "[hidden_size]; null: none"),
    ),
)
