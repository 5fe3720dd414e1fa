"""K and V of the sequences that `transformers` decodes together: one DynamicCache, padded on the left.

The library appends a step's K and V behind every sequence at once, so sequences of different lengths end at the same
place: [batch, heads, length, d], row b's first `length - own length` tokens are padding that the mask hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PaddedBatch:
    """Sequences join at the end, in any order they leave; padding that all of them have is cut off."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self.cache: Any = None  # a DynamicCache; None: no sequence
        self._own: list[int] = []  # tokens of each sequence

    @property
    def length(self) -> int:
        """Tokens of every row, padding included."""
        return max(self._own, default=0)

    def join(self, cache: Any, tokens: int) -> None:
        """One more sequence, whose own cache this takes."""
        if self.cache is None:
            self.cache, self._own = cache, [tokens]
            return
        length = max(self.length, tokens)
        for layer, other in zip(self.cache.layers, cache.layers, strict=True):
            for name in ("keys", "values"):
                both = [self._padded(getattr(one, name), length) for one in (layer, other)]
                setattr(layer, name, self._torch.cat(both))
        self._own.append(tokens)

    def _padded(self, tensor: Any, length: int) -> Any:
        return self._torch.nn.functional.pad(tensor, (0, 0, length - tensor.shape[-2], 0))

    def grow(self, tokens: int) -> None:
        """A forward pass appended so many to each."""
        self._own = [own + tokens for own in self._own]

    def crop(self, tokens: int) -> None:
        """The last ones go, of each."""
        self.cache.crop(-tokens)
        self.grow(-tokens)

    def keep(self, rows: Sequence[int]) -> None:
        """Only these stay."""
        self._own = [self._own[row] for row in rows]
        if not rows:
            self.cache = None
            return
        length = self.length
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                setattr(layer, name, tensor[list(rows), :, tensor.shape[-2] - length :, :])

    def mask(self, device: str) -> Any:
        """[batch, length + 1] of ones and, for padding, zeros, as the next token sees it; None: there is no padding."""
        if all(own == self.length for own in self._own):
            return None
        own = self._torch.tensor(self._own, device=device)
        at = self._torch.arange(self.length + 1, device=device)
        return (at >= self.length - own[:, None]).long()
