"""The forward passes of the peer backend: the network, the cache of what runs, and logits as the host needs them.

Who runs, and what follows from the logits, is the backend's (hf.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from xlpk.backends import hf_model
from xlpk.backends.hf_batch import PaddedBatch
from xlpk.backends.hf_request import Running
from xlpk.errors import ToolError
from xlpk.model import Model

Table = np.ndarray[Any, Any]  # of logits


class ForwardPasses:
    """Of one session, from the checkpoint's weights to `close`."""

    def __init__(
        self, torch: Any, model: Model, dtype: str, device: str, *, static_length: int, alone: bool, keep_logits: bool
    ) -> None:
        """`static_length`: tokens of a cache of fixed size; 0: the cache grows. `alone`: one sequence at a time.
        `keep_logits`: all of the last prompt's, which a cache of fixed size then takes token by token."""
        self._torch, self._device, self._alone, self._keep_logits = torch, device, alone, keep_logits
        self._static_length = static_length
        self.net: Any = hf_model.load(model, dtype, device)
        self._decode = self.net.forward
        self._static = hf_model.static_cache(self.net, static_length) if static_length else None
        self.batch = PaddedBatch(torch)  # empty where the cache has a fixed size
        self.logits: Table | None = None  # [tokens, vocab] float32, of the last prompt, where they are kept

    def compile(self) -> float:
        """Compiles the decode step now, not in somebody's latency; seconds."""
        begin_s = time.perf_counter()
        self._decode = hf_model.compiled(self.net, self._device)
        try:
            with self._torch.inference_mode():
                for at in range(min(4, self._static_length)):  # CUDA graphs: warm, recorded, replayed
                    self.forward([[0]], self._static, [[at]], decode=at > 0)
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ToolError(f"backend.compile=true: torch.compile failed: {type(error).__name__}: {reason}") from None
        return time.perf_counter() - begin_s

    def close(self) -> None:
        """Gives the memory back; there are no passes after it."""
        self.net = self._decode = self._static = None
        self.batch = PaddedBatch(self._torch)
        if self._device == "cuda":
            self._torch.cuda.empty_cache()

    def forward(self, ids: Any, kv: Any, at: Any, mask: Any = None, keep: int = 1, decode: bool = False) -> Any:
        """ids, at [batch, n] -> logits [batch, keep or n, vocab]."""
        torch = self._torch
        out = (self._decode if decode else self.net.forward)(
            input_ids=torch.tensor(ids, device=self._device),
            position_ids=torch.tensor(at, device=self._device),
            attention_mask=mask,
            past_key_values=kv,
            use_cache=True,
            logits_to_keep=keep,
        )
        return out.logits

    def prefill(self, one: Running) -> Any:
        """[1, 1, vocab]"""
        n, one.computed = len(one.tokens), len(one.tokens)
        if self._static is not None:
            kv = self._static
            kv.reset()
            if self._keep_logits:  # row by row: the numerics of the decode step, compiled or not
                rows = [self.forward([[t]], kv, [[at]], decode=at > 0).float().cpu() for at, t in enumerate(one.tokens)]
                self.logits = self._torch.cat(rows, 1)[0].numpy()
                return rows[-1].to(self._device)
        else:
            from transformers import DynamicCache

            kv = DynamicCache(config=self.net.config)
        logits = self.forward([one.tokens], kv, [list(range(n))], keep=0 if self._keep_logits else 1)
        if self._keep_logits:
            self.logits = logits[0].float().cpu().numpy()
        if self._static is None:
            self.batch.join(kv, n)
        return logits[:, -1:]

    def decode(self, rows: list[Running]) -> Any:
        """[requests, 1 + drafts, vocab]"""
        if self._alone:
            (one,) = rows
            ids = [one.tokens[-1], *one.drafts]
            places = list(range(one.computed, one.computed + len(ids)))
            kv = self._static if self._static is not None else self.batch.cache
            logits = self.forward([ids], kv, [places], keep=len(ids), decode=True)
            self.batch.grow(0 if self._static is not None else len(ids))
            one.computed += 1
            return logits
        mask = self.batch.mask(self._device)
        last, at = [[one.tokens[-1]] for one in rows], [[one.computed] for one in rows]
        logits = self.forward(last, self.batch.cache, at, mask, decode=True)
        self.batch.grow(1)
        for one in rows:
            one.computed += 1
        return logits

    def fetch(self, rows: Sequence[Running], logits: Any) -> tuple[list[list[int]], Table | None]:
        """Waits for the device -> per request the likeliest token of each row, -1 where there is a NaN; and, where some
        request needs more than that, the logits [requests, rows, vocab] float32."""
        plain = [one.picker.plain for one in rows]
        best = [[-1]] * len(rows)
        if any(plain):
            values, tokens = logits.max(-1)
            best = self._torch.where(values.isnan(), -1, tokens).tolist()
        enough = all(plain) and not any(-1 in tokens for tokens in best)
        return best, None if enough else logits.float().cpu().numpy()
