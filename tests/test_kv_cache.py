"""Keys and values with room for more are those of Hugging Face's cache, whatever is done to them."""

import copy

import torch
from transformers.cache_utils import DynamicLayer

from persona_lens.models.kv_cache import ROOM, GrowingLayer


def _tokens(count: int, seed: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randn(2, rows, 2, count, 4, generator=torch.Generator().manual_seed(seed))
    return drawn[0], drawn[1]


def test_a_layer_grows_as_by_concatenation_past_the_room_it_took():
    ours, plain = GrowingLayer(), DynamicLayer()
    for step, count in enumerate([5, *[1] * (2 * ROOM + 3), 4, 1, 1]):
        new = _tokens(count, step)
        for got, expected in zip(ours.update(*new), plain.update(*new), strict=True):
            assert torch.equal(got, expected), step
    assert ours.get_seq_length() == plain.get_seq_length()


def test_single_tokens_are_written_and_not_copied():
    layer = GrowingLayer()
    layer.update(*_tokens(5, 0))
    first = layer.update(*_tokens(1, 1))[0].data_ptr()
    places = {layer.update(*_tokens(1, step))[0].data_ptr() for step in range(2, ROOM + 1)}
    assert places == {first}


def test_rows_that_were_selected_or_put_in_place_grow_apart_from_the_room():
    layer, plain = GrowingLayer(), DynamicLayer()
    for one in (layer, plain):
        one.update(*_tokens(5, 0))
        one.update(*_tokens(1, 1))
    selected, plainly_selected = copy.copy(layer), copy.copy(plain)
    for one in (selected, plainly_selected):
        one.batch_select_indices(torch.tensor([2, 0]))
        one.update(*_tokens(1, 2, rows=2))
    for one in (layer, plain):
        one.update(*_tokens(1, 3))
        one.reorder_cache(torch.tensor([1, 2, 0]))
        one.update(*_tokens(1, 2))
    assert torch.equal(selected.keys, plainly_selected.keys)
    assert torch.equal(layer.keys, plain.keys)
    assert torch.equal(layer.values, plain.values)
