"""How fast `transformers` runs a model on the CPU: the peer of `make bench`, on the same weights, dtype and threads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlpk.backends import hf_model

MODES = ("eager", "static", "compiled", "max_autotune")


class Transformers:
    """One model in transformers, one sequence, greedy; the modes share its weights.

    `eager`: a cache that grows. `static`: one of fixed size. `compiled`: torch.compile of the static one.
    `max_autotune`: that with torch's search over kernels, weights frozen into the graph and packed; it wants an object
    of its own, since torch compiles a function in one way at a time.
    """

    def __init__(self, folder: Path, dtype: str, threads: int, cache: Path) -> None:
        """`folder`: a checkpoint with matrices of `dtype` (bf16, fp16, fp32). `cache`: where compiled code is kept."""
        torch = hf_model.libraries(cache)
        torch.set_num_threads(threads)
        self._model: Any = hf_model.load_folder(folder, dtype)
        self._forwards: dict[str, Any] = {}
        self._caches: dict[int, Any] = {}

    def measure(self, mode: str, prompt: Sequence[int], decode: int, prefills: int = 1) -> dict[str, Any]:
        """Medians: prefill tokens/s over `prefills` times, decode tokens/s over steps. A mode's first call compiles."""
        import torch

        with torch.inference_mode():
            if mode not in self._forwards:
                self._forwards[mode] = self._forward(mode)
                self._generate(mode, prompt, decode, most=4)
            found = [self._generate(mode, prompt, decode, most=1)[0] for _ in range(prefills - 1)]
            prefill_s, steps_s, tokens = self._generate(mode, prompt, decode, most=decode)
        return {
            "prefill_tokens_per_s": len(prompt) / float(np.median([*found, prefill_s])),
            "decode_tokens_per_s": 1 / float(np.median(steps_s)),
            "tokens": tokens,
        }

    def _forward(self, mode: str) -> Any:
        import torch

        if mode in ("eager", "static"):
            return self._model.forward
        if mode == "compiled":
            return hf_model.compiled(self._model, "cpu")
        from torch._inductor import config

        config.freezing = True
        return torch.compile(self._model.forward, dynamic=False, mode="max-autotune-no-cudagraphs")

    def _kv(self, mode: str, length: int) -> Any:
        """An empty cache; one of fixed size is made once."""
        from transformers import DynamicCache

        if mode == "eager":
            return DynamicCache(config=self._model.config)
        if length not in self._caches:
            self._caches[length] = hf_model.static_cache(self._model, length)
        self._caches[length].reset()
        return self._caches[length]

    def _generate(
        self, mode: str, prompt: Sequence[int], decode: int, most: int
    ) -> tuple[float, list[float], list[int]]:
        """The first `most` of `decode` tokens -> seconds of the prefill and of each step, and the tokens."""
        import torch

        forward, kv = self._forwards[mode], self._kv(mode, len(prompt) + decode)

        def step(ids: Any, at: Any) -> Any:
            out = forward(
                input_ids=ids,
                past_key_values=kv,
                cache_position=at,
                position_ids=at[None],
                use_cache=True,
                logits_to_keep=1,
            )
            return out.logits[:, -1].argmax(-1, keepdim=True)

        begin = time.perf_counter()
        token = step(torch.tensor([list(prompt)]), torch.arange(len(prompt)))
        prefill_s = time.perf_counter() - begin
        tokens, steps = [int(token)], []
        for position in range(len(prompt), len(prompt) + most - 1):
            begin = time.perf_counter()
            token = step(token, torch.tensor([position]))
            steps.append(time.perf_counter() - begin)
            tokens.append(int(token))
        return prefill_s, steps, tokens
