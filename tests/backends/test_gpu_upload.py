"""Weights on their way to the device: every byte of either layout, the same bits from both, and bounded memory."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kinds
import numpy as np
import pytest
from drive import finish
from phases.test_tiles import tiles_of
from standin.session import on_standin, run_body

from xlpk import layout
from xlpk.backends import upload
from xlpk.kv import KV, KVPlan
from xlpk.model import Model, load_model
from xlpk.workload import Request

pytestmark = pytest.mark.heavy

CASES = ["gqa_wide_group", "fp32", "biases_fp16"]  # tied, odd vocabularies, last tiles of 32 and 96 columns, biases
PROMPT = tuple(range(3, 43))


def opened(model: Model, weight_layout: str, **options: Any) -> Any:
    backend = kinds.make(max_num_seqs=4, max_step_rows=32, weight_layout=weight_layout, **options)
    backend.open(model, KVPlan.make(KV(budget="64pages"), model.config, model.weights.dtype, 256))
    return backend


def requests() -> list[Request]:
    return [
        Request(0, PROMPT, 20, temperature=0.8, seed=1, ignore_eos=True),
        Request(1, PROMPT[5:], 12, top_k=20, temperature=1.1, seed=2, ignore_eos=True, logprobs=2),
    ]


def outcome(model: Model, weight_layout: str) -> tuple[dict[int, list[int]], np.ndarray[Any, Any]]:
    """Tokens by request, and the bits of the first prompt's logits."""
    backend = opened(model, weight_layout, debug_logits=True)
    try:
        assert backend._report.details["weight_layout"] == weight_layout
        finish(backend, requests()[:1])
        logits = backend.logits(len(PROMPT))
        return finish(backend, requests()[1:]).tokens, logits.view(np.uint32)
    finally:
        backend.close()


@pytest.mark.parametrize("case", CASES)
def test_either_layout_gives_the_same_bits(small: Callable[[str], Model], case: str) -> None:
    with kinds.on("launched"):
        tokens, logits = outcome(small(case), "rows")
        tiled_tokens, tiled_logits = outcome(small(case), "tiles")
    assert tiled_tokens == tokens
    np.testing.assert_array_equal(tiled_logits, logits)
    assert np.isfinite(logits.view(np.float32)).all()
    assert len(np.unique(logits)) > len(PROMPT)


def test_tiles_on_every_orchestration(tiny: Model) -> None:
    with kinds.on("launched"):
        tokens, logits = outcome(tiny, "rows")
    for kind in kinds.GPU:
        with kinds.on(kind):
            tiled_tokens, tiled_logits = outcome(tiny, "tiles")
        assert tiled_tokens == tokens
        np.testing.assert_array_equal(tiled_logits, logits)


def matrices(model: Model) -> Iterator[tuple[str, str, int]]:
    """(name in the checkpoint, field of Params or of LayerWeights, layer or -1)."""
    yield "model.embed_tokens.weight", "embed_tokens", -1
    yield "lm_head.weight", "lm_head", -1
    for name in model.weights.names:
        *_, block, field, kind = ["", "", *name.split(".")]
        if kind == "weight" and block in ("self_attn", "mlp"):
            yield name, field, int(name.split(".")[2])


@pytest.mark.parametrize("weight_layout", ["rows", "tiles"])
@pytest.mark.parametrize("case", CASES)
def test_every_byte_is_where_the_definition_says(
    small: Callable[[str], Model], case: str, weight_layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through buffers much smaller than a matrix, which cut rows in two; rows of zeros behind the last one."""
    monkeypatch.setattr(upload, "STAGING_BYTES", 10_000)
    model = small(case)
    said: list[tuple[int, int]] = []
    with kinds.on("launched"):
        backend = opened(model, weight_layout, progress=lambda *now: said.append(now))
        try:
            params = backend._memory.params
            table = np.zeros(model.config.num_hidden_layers, layout.LAYER_WEIGHTS.dtype)
            backend.device.read(table, int(params["layers"]))

            def check(expected: np.ndarray[Any, Any], address: int) -> None:
                copy = np.zeros_like(expected)
                backend.device.read(copy, address)
                np.testing.assert_array_equal(copy, expected)

            seen = 0
            for name, field, layer in matrices(model):
                matrix = model.weights.matrix(name).base
                expected = tiles_of(matrix) if weight_layout == "tiles" else matrix.ravel()
                check(expected, int(params[field] if layer < 0 else table[field][layer]))
                seen += 1
            assert seen == 2 + 7 * model.config.num_hidden_layers
            for layer in range(model.config.num_hidden_layers):
                name = f"model.layers.{layer}.input_layernorm.weight"
                check(model.weights.vector(name), int(table["input_layernorm"][layer]))
                if model.config.attention_bias:
                    name = f"model.layers.{layer}.self_attn.o_proj.bias"
                    check(model.weights.vector(name), int(table["o_bias"][layer]))
        finally:
            backend.close()
    done = [count for count, _ in said]
    assert done == sorted(done)
    assert len(done) > 100
    assert said[-1][0] == said[-1][1] > model.weights.nbytes


def sparse_checkpoint(folder: Path, vocab_size: int, hidden_size: int) -> Path:
    """A model whose embedding is a hole in its file."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    head, ffn, layer = 64, 32, "model.layers.0."
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [vocab_size, hidden_size],
        "model.norm.weight": [hidden_size],
        layer + "input_layernorm.weight": [hidden_size],
        layer + "post_attention_layernorm.weight": [hidden_size],
        **{f"{layer}self_attn.{name}_proj.weight": [head, hidden_size] for name in "qkv"},
        layer + "self_attn.o_proj.weight": [hidden_size, head],
        **{f"{layer}mlp.{name}_proj.weight": [ffn, hidden_size] for name in ("gate", "up")},
        layer + "mlp.down_proj.weight": [hidden_size, ffn],
    }
    header, size = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, size + nbytes]}
        size += nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    return folder


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


@on_standin()
def test_memory_of_an_upload_does_not_grow_with_the_model() -> None:
    """1.1 GB. On the host two buffers; on the device, beside the weights, one, and that until they are there."""
    from standin.hook import CACHE

    from xlpk.backends.gpu_device import Device
    from xlpk.backends.gpu_module import CachedSourceModule
    from xlpk.backends.memory import dims_record
    from xlpk.toolchain import dims_defines

    tiny = load_model("tiny")
    plan = KVPlan.make(KV(), tiny.config, tiny.weights.dtype, 256)
    defines = dims_defines(dims_record(tiny.config, plan), tiny.weights.dtype, plan.dtype, "tiles")
    with tempfile.TemporaryDirectory() as folder:
        model = load_model("sparse", sparse_checkpoint(Path(folder), (1 << 17) + 1, 4096))
    assert model.weights.nbytes > 1 << 30
    for tiles in (False, True):
        device = Device()
        module = CachedSourceModule("launched.cu", CACHE, arch=device.arch, defines=defines)
        retile = module.get_function("xl_retile") if tiles else None
        free_at_first, _ = device.cuda.mem_get_info()
        own, on_device = [], []

        def note(*_: int) -> None:
            free, _ = device.cuda.mem_get_info()  # noqa: B023
            on_device.append(free_at_first - free)  # noqa: B023
            own.append(anonymous_bytes() - on_device[-1])  # noqa: B023  the stand-in's device memory is the host's

        before = anonymous_bytes()
        upload.upload(device, model, plan, note, retile)
        assert len(own) > 30
        slack = 32 << 20  # stacks of the stand-in's threads among it
        assert max(own) - before < 2 * upload.STAGING_BYTES + slack
        assert own[-1] - own[2] < slack
        assert max(on_device) < model.weights.nbytes + tiles * upload.STAGING_BYTES + slack
        free, _ = device.cuda.mem_get_info()
        assert free_at_first - free < model.weights.nbytes + slack
        del module, retile
        device.close()


if __name__ == "__main__":
    run_body()
