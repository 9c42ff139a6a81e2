"""Statistics of the layers: their shapes and what a reader sees of them."""

import math
from dataclasses import replace

import pytest
import torch

from tests.vector_cases import N_LAYERS, make_statistics


def test_statistics_need_one_value_a_layer(shapes_unchecked):
    with pytest.raises(ValueError, match=r"split_half has shape \[1\]: every statistic needs one value a layer"):
        replace(make_statistics(), split_half=torch.ones(1))


def test_the_embedding_row_needs_the_statistics_of_the_layers():
    with pytest.raises(ValueError, match=r"missing or unknown: .*'auc'.*'held_out_auc'"):
        replace(make_statistics(), embedding={"auc": 0.5})


def test_the_repr_names_the_best_layer():
    statistics = make_statistics()
    auc = statistics.held_out_auc
    assert f"best held_out_auc: {float(auc.max()):.3f} at layer {int(auc.argmax())}" in repr(statistics)


def test_the_best_layer_of_undefined_statistics_is_undefined():
    unknown = replace(make_statistics(), held_out_auc=torch.full((N_LAYERS,), math.nan))
    assert "best held_out_auc: undefined" in repr(unknown)
