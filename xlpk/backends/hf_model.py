"""A model in `transformers`: its libraries, its weights, its caches of fixed size, its compiled form.

Shared by the peer backend (hf.py) and the peer of `make bench` (hf_speed.py). Calls import torch, not the module.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlpk.backends.peer_files import hf_config, tensors_of
from xlpk.errors import InputError, ToolError
from xlpk.model import Model

TORCH_DTYPE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
COMPILED_STATIC = {"cpu": "default", "cuda": "reduce-overhead"}  # torch.compile's mode; the latter is CUDA graphs


def require(what: str) -> None:
    """ToolError in one line if a library is missing that `what` needs; imports nothing."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ToolError(f"{what}: no {' and no '.join(missing)} here: pip install 'xlpk[peers]'")


def libraries(cache: Path) -> Any:
    """torch, and transformers told to be quiet. `cache`: where torch keeps compiled code. ToolError as of `require`."""
    require("transformers cannot be used")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.resolve()))  # read when torch is imported
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return torch


def device_of(torch: Any, wanted: str) -> str:
    """`auto`: cuda if torch sees a GPU, else cpu. ToolError: cuda, and torch sees none."""
    found = bool(torch.cuda.is_available())
    if wanted == "cuda" and not found:
        raise ToolError("backend.device=cuda: this torch sees no GPU: a build of torch for CUDA, or backend.device=cpu")
    return ("cuda" if found else "cpu") if wanted == "auto" else wanted


def details(net: Any, device: str) -> dict[str, str]:
    """What ran it."""
    import torch
    import transformers

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": str(net.config._attn_implementation),
    }


def device_uuid() -> str:
    """Of the GPU in use, as the management library calls it."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def load_folder(folder: Path, dtype: str, device: str = "cpu") -> Any:
    """A checkpoint as LlamaForCausalLM, as transformers itself reads it. `dtype`: bf16, fp16 or fp32."""
    import torch
    from transformers import LlamaForCausalLM

    net: Any = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, TORCH_DTYPE[dtype])).eval()
    if device != "cpu":
        return net.to(device)
    # Out of the file's mapping, into memory that may have huge pages: decoding is a quarter faster from there.
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()
    return net


def load(model: Model, dtype: str, device: str) -> Any:
    """The model as LlamaForCausalLM: its folder, or, of hash weights, the very arrays (on the CPU without a copy)."""
    if model.path is not None:
        return load_folder(model.path, dtype, device)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**hf_config(model.config))
    with torch.device("meta"):
        net: Any = LlamaForCausalLM(config)
    wanted = getattr(torch, TORCH_DTYPE[dtype])
    state = {name: _tensor(array).to(device=device, dtype=wanted) for name, array in tensors_of(model)}
    net.load_state_dict(state, strict=not model.config.tie_word_embeddings, assign=True)
    net.tie_weights()
    net.model.rotary_emb = type(net.model.rotary_emb)(config=config).to(device)  # its buffers are in no state
    return net.eval()


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    import torch

    if not array.flags.writeable:
        array = array.copy()
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == np.uint16 else (
        torch.from_numpy(array)
    )  # fmt: skip


def static_cache(net: Any, length: int) -> Any:
    """An empty cache of `length` tokens for one sequence, its tensors made: compiled code may hold their addresses."""
    from transformers import StaticCache

    config = net.config
    made = StaticCache(config=config, max_cache_len=length)
    # Else the first call makes the tensors, and compiled code is compiled again for the second.
    made.early_initialization(1, config.num_key_value_heads, config.head_dim, net.dtype, net.device)
    return made


def compiled(net: Any, device: str) -> Any:
    """net.forward by torch.compile, for one token at a time and a cache of fixed size. The first call compiles."""
    import torch

    return torch.compile(net.forward, dynamic=False, mode=COMPILED_STATIC[device])


def check_kv_dtype(plan_dtype: str, dtype: str) -> None:
    """transformers keeps K and V in the model's dtype. A plan of bf16 pages stands for fp16 too: the same bytes."""
    if {"fp16": "bf16"}.get(dtype, dtype) != plan_dtype:
        raise InputError("kv.dtype", plan_dtype, f"auto: transformers keeps K and V in the model's dtype, {dtype}")


class Float32:
    """The model in float32 on the CPU: token ids -> logits, an implementation that shares nothing with ours."""

    def __init__(self, model: Model, cache: Path) -> None:
        """`cache`: where torch keeps compiled code."""
        self._torch = libraries(cache)
        self._net = load(model, "fp32", "cpu")

    def __call__(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        """[n] -> [n, vocab] float32, in one forward pass without a cache."""
        with self._torch.inference_mode():
            logits = self._net(input_ids=self._torch.tensor([list(tokens)]), use_cache=False).logits
        return np.asarray(logits[0].numpy(), np.float32)
