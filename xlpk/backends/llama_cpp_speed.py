"""How fast llama.cpp runs a model on the CPU, through `llama-cpp-python`: a peer of `make bench-peers`."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlpk.errors import ToolError


class LlamaCpp:
    """One model in llama.cpp, one sequence, greedy.

    Its own defaults but for the threads, and for weights that are read into memory, which may have huge pages, instead
    of mapped: no slower where measured.
    """

    def __init__(self, path: Path, threads: int, context: int, *, exact: bool = False) -> None:
        """`path`: a GGUF file. `context`: positions.

        `exact`: K and V as float, and no flash attention, which would round them to f16.
        """
        import llama_cpp

        self._api: Any = llama_cpp
        self._warm = False
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # the library keeps no reference
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        if not self._model:
            raise ToolError(f"llama.cpp did not load {path.name}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = threads
        if exact:
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ToolError(f"llama.cpp made no context of {context} positions for {path.name}")
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model)))

    def forward(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        """Appends the tokens to the sequence -> logits [vocab_size] of the last; a view that the next call changes."""
        held = (ctypes.c_int32 * len(tokens))(*tokens)
        code = self._api.llama_decode(self._context, self._api.llama_batch_get_one(held, len(tokens)))
        if code:
            raise ToolError(f"llama_decode of {len(tokens)} tokens: code {code}")
        return np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, -1), (self.vocab_size,))

    def restart(self) -> None:
        """Forgets the sequence."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def measure(self, prompt: Sequence[int], decode: int, prefills: int = 1) -> dict[str, Any]:
        """Medians: prefill tokens/s over `prefills` times, decode tokens/s over steps. The first call warms up."""
        if not self._warm:
            self._warm = True
            self.measure(prompt, min(decode, 4))
        prefill_s, steps = [], []
        for _ in range(prefills):
            self.restart()
            begin = time.perf_counter()
            token = int(self.forward(prompt).argmax())
            prefill_s.append(time.perf_counter() - begin)
        tokens = [token]
        for _ in range(decode - 1):
            begin = time.perf_counter()
            token = int(self.forward([token]).argmax())
            steps.append(time.perf_counter() - begin)
            tokens.append(token)
        return {
            "prefill_tokens_per_s": len(prompt) / float(np.median(prefill_s)),
            "decode_tokens_per_s": 1 / float(np.median(steps)),
            "tokens": tokens,
        }

    def close(self) -> None:
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)
