"""Keys and values that grow by one token at a time without being copied each time.

Hugging Face's cache appends by concatenation, so a decode step copies all that was kept before it. Here the first
single token takes room for those that follow, and each of them is written into it.
Knows nothing about models beyond the cache that they are given.
"""

from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 32
"""Tokens for which room is taken at a time: the copies of 32 steps become one, and at most 31 places stay empty."""


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, `[batch kv_head pos d_head]`, as the start of tensors with room for more."""

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values so far."""
        kept, values = self.keys, self.values
        if kept is None or values is None or not kept.numel() or key_states.shape[-2] != 1:
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        length = kept.shape[-2]
        if self._room is None or not _starts(kept, self._room[0]):
            self._room = (_with_room(kept), _with_room(values))
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., length : length + 1, :] = new
        self.keys, self.values = (room[..., : length + 1, :] for room in self._room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows, in tensors of their own."""
        super().reorder_cache(cast(Any, beam_idx))
        self._room = None


def _starts(kept: Tensor, room: Tensor) -> bool:
    """Whether what is kept is still the start of the room, with a place left: reordered rows stand elsewhere."""
    same_rows = kept.data_ptr() == room.data_ptr() and kept.shape[0] == room.shape[0]
    return same_rows and kept.shape[-2] < room.shape[-2]


def _with_room(kept: Tensor) -> Tensor:
    roomy = kept.new_empty((*kept.shape[:-2], kept.shape[-2] + ROOM, kept.shape[-1]))
    roomy[..., : kept.shape[-2], :] = kept
    return roomy


def growing_cache(config: Any) -> DynamicCache:
    """An empty cache for a Hugging Face model; other kinds of layers, such as sliding windows, are its own."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
