"""ModelConfig: what it computes, what it accepts, and what it refuses in one clear line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES, llama3, make_case, make_checkpoint

from xlpk.errors import InputError
from xlpk.model import SHAPES, ModelConfig, load_model, read_config
from xlpk.rope import DynamicRope, LinearRope, Llama3Rope
from xlpk.weights import Weights

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


# ---------------------------------------------------------------------------------------------- accepted


def test_transformers_4_and_5_say_the_same() -> None:
    rope = llama3(8.0, 1.0, 4.0, 512)
    old = SMALL | {"rope_theta": 500000.0, "rope_scaling": rope}
    new = {key: value for key, value in SMALL.items() if key != "torch_dtype"}
    new |= {"dtype": "bfloat16", "rope_parameters": {**rope, "rope_theta": 500000.0}}
    legacy = old | {"rope_scaling": {("type" if key == "rope_type" else key): value for key, value in rope.items()}}
    config = ModelConfig.from_hf(old, "config.json")
    assert config.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 512)
    assert config.rope_theta == 500000.0
    assert config == ModelConfig.from_hf(new, "config.json") == ModelConfig.from_hf(legacy, "config.json")


def test_defaults_are_those_of_transformers() -> None:
    config = ModelConfig.from_hf(SMALL, "config.json")
    assert config.head_dim == 64
    assert config.rope_theta == 10000.0
    assert config.rope_scaling is None
    assert config.max_position_embeddings == 2048
    assert not config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    del (no_dtype := dict(SMALL))["torch_dtype"]
    assert ModelConfig.from_hf(no_dtype, "config.json").dtype == "float32"
    del (mha := dict(SMALL))["num_key_value_heads"]
    assert ModelConfig.from_hf(mha, "config.json").num_key_value_heads == 2


@pytest.mark.parametrize(("value", "expected"), [(3, (3,)), ([3, 5], (3, 5)), (None, ()), ([], ())])
def test_eos_is_one_several_or_none(value: object, expected: tuple[int, ...]) -> None:
    assert ModelConfig.from_hf(SMALL | {"eos_token_id": value}, "config.json").eos_token_ids == expected


def test_stop_tokens_of_the_generation_config_win(tmp_path: Path) -> None:
    make_case(tmp_path, "one_head")
    assert read_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert read_config(tmp_path).eos_token_ids == (7, 9)


# ---------------------------------------------------------------------------------------------- computed


def test_named_shapes() -> None:
    assert SHAPES["llama_1b_shape"].parameters == 1_235_814_400
    assert SHAPES["llama_8b_shape"].parameters == 8_030_261_248
    assert SHAPES["llama_160m_shape"].parameters == 160_058_112
    assert SHAPES["llama_1b_shape"].bytes_per_token("bf16") == pytest.approx(2.471e9, rel=1e-3)


def test_bytes_per_token_counts_by_hand() -> None:
    config = ModelConfig.from_hf(SMALL | {"tie_word_embeddings": True}, "config.json")
    layer = 128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 352
    norms = 4 * 128 * 5
    assert config.bytes_per_token("bf16") == 2 * (2 * layer + 100 * 128) + norms
    untied = ModelConfig.from_hf(SMALL, "config.json")
    assert untied.bytes_per_token("fp32") == 4 * (2 * layer + 100 * 128 + 128) + norms
    assert untied.parameters == config.parameters + 100 * 128
    with pytest.raises(InputError, match=r"^dtype=fp7: one of bf16, fp16, fp32$"):
        config.bytes_per_token("fp7")


@pytest.mark.parametrize("case", CASES)
def test_tensor_shapes_are_those_of_the_checkpoint(tmp_path: Path, case: str) -> None:
    model = load_model(case, make_case(tmp_path, case))
    shapes = model.config.tensor_shapes()
    assert set(model.weights.names) == set(shapes)
    assert ("lm_head.weight" in shapes) is not model.config.tie_word_embeddings
    assert model.config.parameters == sum(math.prod(shape) for shape in shapes.values())


def test_inv_freq_plain_and_llama3_by_the_published_loop() -> None:
    """Against `apply_scaling` as it is written in meta-llama/llama-models, element by element."""
    for config in (SHAPES["llama_1b_shape"], SHAPES["llama_8b_shape"], SHAPES["llama_160m_shape"]):
        expected = []
        for i in range(config.head_dim // 2):
            freq = 1.0 / config.rope_theta ** (2 * i / config.head_dim)
            rope = config.rope_scaling
            if rope is not None:
                wavelen = 2 * math.pi / freq
                if wavelen > rope.original_max_position_embeddings / rope.low_freq_factor:
                    freq = freq / rope.factor
                elif wavelen >= rope.original_max_position_embeddings / rope.high_freq_factor:
                    smooth = rope.original_max_position_embeddings / wavelen - rope.low_freq_factor
                    smooth /= rope.high_freq_factor - rope.low_freq_factor
                    freq = (1 - smooth) * freq / rope.factor + smooth * freq
            expected.append(freq)
        assert config.inv_freq().dtype == np.float64
        np.testing.assert_allclose(config.inv_freq(), expected, rtol=1e-14)  # some 40 roundings of 2^-53


# ---------------------------------------------------------------------------------------------- refused


def test_linear_scaling_divides_every_frequency() -> None:
    plain = ModelConfig.from_hf(SMALL, "config.json")
    config = ModelConfig.from_hf(SMALL | {"rope_scaling": {"type": "linear", "factor": 3}}, "config.json")
    assert config.rope_scaling == LinearRope(3.0)
    np.testing.assert_array_equal(config.inv_freq(), plain.inv_freq() / 3)
    assert config.at_length(1 << 20) == config


def test_dynamic_scaling_is_that_of_one_length() -> None:
    change = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    plain = ModelConfig.from_hf(SMALL, "config.json")
    config = ModelConfig.from_hf(SMALL | change, "config.json")
    assert config.rope_scaling == DynamicRope(2.0)
    assert config.stretches
    assert not plain.stretches
    for tokens in (1, config.max_position_embeddings):
        np.testing.assert_array_equal(config.at_length(tokens).inv_freq(), plain.inv_freq())
    # transformers 5.23, ROPE_INIT_FUNCTIONS["dynamic"] at seq_len = 3 max_position_embeddings, head_dim 64, float32
    wanted = [1.0, 0.7119550704956055, 0.006120525766164064, 2.667042826942634e-05]
    ours = config.at_length(3 * config.max_position_embeddings).inv_freq()
    np.testing.assert_allclose(ours[[0, 1, 15, 31]], wanted, rtol=1e-6)
    assert len({config.at_length(n * config.max_position_embeddings).rope_theta for n in (1, 2, 3)}) == 3


def test_biases_have_the_length_of_their_outputs() -> None:
    config = ModelConfig.from_hf(SMALL | {"attention_bias": True, "mlp_bias": True}, "config.json")
    shapes = config.tensor_shapes()
    biases = {name: shape for name, shape in shapes.items() if name.endswith(".bias")}
    assert len(biases) == 7 * config.num_hidden_layers
    for name, shape in biases.items():
        assert shape == shapes[name.replace(".bias", ".weight")][:1]
    plain = ModelConfig.from_hf(SMALL, "config.json")
    floats = 4 * sum(shape[0] for shape in biases.values())
    assert config.bytes_per_token("bf16") == plain.bytes_per_token("bf16") + floats
    only = ModelConfig.from_hf(SMALL | {"mlp_bias": True}, "config.json").tensor_shapes()
    assert {name for name in only if name.endswith(".bias")} == {name for name in biases if ".mlp." in name}
    weights = Weights.from_hash(config, 1, "bf16")
    assert not weights.vector("model.layers.0.mlp.up_proj.bias").any()


@pytest.mark.parametrize(
    ("change", "field", "allowed"),
    [
        ({"model_type": "mistral"}, "model_type=mistral", "only llama"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "architectures=['Qwen2ForCausalLM']", "only LlamaForCausalLM"),
        ({"architectures": None, "model_type": None}, "model_type=missing", "llama"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu", "only silu"),
        ({"attention_bias": 1}, "attention_bias=1", "true or false"),
        ({"mlp_bias": "yes"}, "mlp_bias=yes", "true or false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}", "unquantized"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_scaling.rope_type=yarn",
            "linear, dynamic and llama3",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor=missing", "a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor=0.5", "at least 1"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "rope_scaling.factor=2", "a number"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type=yarn", "dynamic and llama3"),
        ({"rope_scaling": llama3(0.5, 1.0, 4.0, 64)}, "rope_scaling.factor=0.5", "at least 1"),
        ({"rope_scaling": llama3(8.0, 4.0, 1.0, 64)}, "rope_scaling.high_freq_factor=1.0", "above low_freq_factor=4.0"),
        ({"rope_scaling": llama3(8.0, 0.0, 1.0, 64)}, "rope_scaling.low_freq_factor=0.0", "above 0"),
        ({"rope_scaling": llama3(8.0, 1.0, 4.0, 0)}, "rope_scaling.original_max_position_embeddings=0", "1 to"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor=missing", "a number is required"),
        ({"rope_scaling": 7}, "rope_scaling=7", "an object or null"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
            "only 1",
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta=10000.0", "rope_theta=500000.0"),
        (
            {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 1e4}},
            "rope_scaling=",
            "what rope_parameters says",
        ),
        ({"rope_theta": 0}, "rope_theta=0.0", "above 0"),
        ({"rope_theta": float("inf")}, "rope_theta=inf", "finite"),
        ({"head_dim": 32}, "head_dim=32", "64, 80, 96, 128"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 80},
            "num_attention_heads=3",
            "an even number",
        ),
        ({"num_attention_heads": 4, "head_dim": None}, "head_dim=32", "64, 80, 96, 128"),
        ({"num_attention_heads": 3}, "hidden_size=128", "num_attention_heads=3"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 2, "head_dim": 64},
            "num_key_value_heads=2",
            "num_attention_heads=3",
        ),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4", "num_attention_heads=2"),
        ({"hidden_size": 130, "head_dim": 64}, "hidden_size=130", "multiple of 32"),
        ({"intermediate_size": 100}, "intermediate_size=100", "multiple of 32"),
        ({"vocab_size": 0}, "vocab_size=0", "1 to"),
        ({"hidden_size": 0}, "hidden_size=0", "1 to"),
        ({"intermediate_size": -32}, "intermediate_size=-32", "1 to"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0", "1 to"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000", "1 to 1024"),
        ({"num_attention_heads": 0}, "num_attention_heads=0", "1 to"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0", "1 to"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0", "1 to"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0.0", "above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan", "finite"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps=1000", "finite"),
        ({"torch_dtype": "float64"}, "torch_dtype=float64", "bfloat16, float16, float32"),
        ({"dtype": "float8_e4m3fn"}, "dtype=float8_e4m3fn", "bfloat16, float16, float32"),
        ({"dtype": 16}, "dtype=16", "bfloat16, float16, float32"),
        ({"vocab_size": "100"}, "vocab_size=100", "a whole number"),
        ({"vocab_size": 100.0}, "vocab_size=100.0", "a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True", "a whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps=small", "a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1", "true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id=</s>", "a token id"),
        ({"eos_token_id": [1, None]}, "eos_token_id=[1, None]", "a token id"),
        ({"eos_token_id": 100}, "eos_token_id=100", "0 to 99"),
        ({"bos_token_id": [1]}, "bos_token_id=[1]", "a token id or null"),
        ({"bos_token_id": -1}, "bos_token_id=-1", "0 to 99"),
        ({"model_type": "a\nb"}, "model_type=a\\nb", "only llama"),
        ({"model_type": "x" * 10000}, "model_type=xxx", "only llama"),
    ],
)
def test_a_bad_config_is_refused_by_name(change: dict[str, Any], field: str, allowed: str) -> None:
    with pytest.raises(InputError) as error:
        ModelConfig.from_hf(SMALL | change, "config.json")
    text = one_line(error)
    assert text.startswith("config.json:")
    assert field in text
    assert allowed in text


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"],
)
def test_a_missing_field_is_named(key: str) -> None:
    with pytest.raises(InputError) as error:
        ModelConfig.from_hf({k: v for k, v in SMALL.items() if k != key}, "config.json")
    assert one_line(error).startswith(f"config.json:{key}=missing: a ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.json="),
        ("{", "valid JSON"),
        ("[1]", "config.json=[1]: a JSON object"),
        ('{"vocab_size": 1, "vocab_size": 2}', "config.json:vocab_size=twice: each key once"),
        ("[" * 100000, "config.json=deeply nested"),
        ("\xff", "valid JSON in UTF-8"),
        ('{"vocab_size": ' + "1" * 5000 + "}", "valid JSON"),
    ],
)
def test_broken_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as error:
        read_config(tmp_path)
    assert message in one_line(error)


# ---------------------------------------------------------------------------------------------- load_model


def test_a_folder_has_to_hold_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a folder that holds config\.json"):
        load_model("hf", tmp_path)
    with pytest.raises(InputError, match=r"model\.path=.*a folder with config\.json"):
        load_model("hf", tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(InputError, match=r"holds model\.safetensors or model\.safetensors\.index\.json"):
        load_model("hf", tmp_path)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(InputError) as error:
        load_model("gpt2")
    assert one_line(error).startswith("model=gpt2: one of tiny, llama_1b_shape")


def test_a_shape_gets_hash_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ModelConfig.from_hf(SMALL, "config.json")
    monkeypatch.setitem(SHAPES, "small_shape", small)
    model = load_model("small_shape", seed=3, dtype="fp32")
    assert model.path is None
    assert model.tokenizer is None
    assert model.config.dtype == "float32"
    assert model.weights.dtype == "fp32"
    assert load_model("small_shape").weights.dtype == "bf16"
    prints = {
        load_model("small_shape", seed=seed, dtype=dtype).fingerprint
        for seed in (3, 4)
        for dtype in ("bf16", "fp16", "fp32")
    }
    assert len(prints) == 6
    assert model.fingerprint in prints
    for seed in (-1, 1 << 64):
        with pytest.raises(InputError, match=r"^model\.seed="):
            load_model("small_shape", seed=seed)
    with pytest.raises(InputError, match=r"^model\.dtype=int2: one of auto, bf16, fp16, fp32$"):
        load_model("small_shape", dtype="int2")


def test_the_file_decides_the_dtype(tmp_path: Path) -> None:
    folder = make_case(tmp_path, "fp32")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": "bfloat16"}))
    assert load_model("hf", folder).config.dtype == "float32"
    with pytest.raises(InputError, match=r"^model\.dtype=bf16: auto or fp32"):
        load_model("hf", folder, dtype="bf16")


def test_the_fingerprint_sees_values_and_config(tmp_path: Path) -> None:
    prints = set()
    for number, change in enumerate(({}, {"seed": 8}, {"rms_norm_eps": 1e-6}, {"shards": 2})):
        folder = make_checkpoint(tmp_path / str(number), **({"seed": 7, **CASES["mha"]} | change))
        prints.add(load_model("x", folder).fingerprint)
        assert load_model("another name", folder).fingerprint in prints
    assert len(prints) == 4


def test_the_tokenizer_is_read_on_demand(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder = make_case(tmp_path, "one_head")
    assert load_model("x", folder).tokenizer is None
    words = tokenizers.models.WordLevel({"hello": 0, "?": 1}, unk_token="?")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    assert load_model("x", folder).tokenizer.encode("hello").ids == [0]
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json=.*Hugging Face tokenizers") as error:
        _ = load_model("x", folder).tokenizer
    one_line(error)


def test_weights_take_arrays(tmp_path: Path) -> None:
    """The constructor is what mutants and quantizers use; it checks like the file reader."""
    config = ModelConfig.from_hf(SMALL, "config.json")
    arrays = {name: np.zeros(shape, np.float32) for name, shape in config.tensor_shapes().items()}
    assert Weights(config, arrays, "zeros").dtype == "fp32"
    name = "model.layers.1.mlp.up_proj.weight"
    for wrong, text in (
        (np.zeros((352, 127), np.float32), "[352, 127]: expected [352, 128]"),
        (np.zeros((352, 128)), "float64: expected uint16"),
    ):
        with pytest.raises(InputError) as error:
            Weights(config, arrays | {name: wrong}, "zeros")
        assert name in one_line(error)
        assert text in one_line(error)
