"""A key-value cache that grows by one token at a time without being copied each time.

Hugging Face's `DynamicLayer` appends by concatenation, so every decode step copies all keys and values before it. Here
`keys` and `values` are the start of larger tensors (the room). The first single token allocates a room with 32 free
places, and each token after it is written into the next place; attention gets views of the part that is filled. When
the room is full, or `keys` no longer is its start, a new room is allocated, which is one copy for 32 tokens.

A room is written in place, so two caches must never share one. `Past.select` copies the layer objects and then calls
`reorder_cache`, which makes new tensors and drops the room.
"""

from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 32
"""Places that are allocated at a time: one copy for 32 steps, and at most 31 places that stay empty."""


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, `[batch kv_head pos d_head]`, as views of tensors with room for more."""

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values so far."""
        keys, values = self.keys, self.values
        # The prompt is appended once, and needs no room.
        if keys is None or values is None or not keys.numel() or key_states.shape[-2] != 1:
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        length = keys.shape[-2]
        if self._room is None or not _has_place(keys, self._room[0]):
            self._room = (_with_room(keys), _with_room(values))
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., length : length + 1, :] = new
        self.keys, self.values = (room[..., : length + 1, :] for room in self._room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows, in new tensors."""
        super().reorder_cache(cast(Any, beam_idx))
        self._room = None


def _has_place(keys: Tensor, room: Tensor) -> bool:
    """Whether the keys are still the start of the room (others may have replaced them), and a place is free."""
    same_rows = keys.data_ptr() == room.data_ptr() and keys.shape[0] == room.shape[0]
    return same_rows and keys.shape[-2] < room.shape[-2]


def _with_room(states: Tensor) -> Tensor:
    room = states.new_empty((*states.shape[:-2], states.shape[-2] + ROOM, states.shape[-1]))
    room[..., : states.shape[-2], :] = states
    return room


def growing_cache(config: Any) -> DynamicCache:
    """An empty cache for a Hugging Face model; its other kinds of layers, such as sliding windows, stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
