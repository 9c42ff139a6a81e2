"""The direction of a trait at one layer: construction, unit, projection and cosine."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_lens.vectors.persona_vector import PersonaVector
from tests.vector_cases import (
    D_MODEL,
    FACTORS,
    N_LAYERS,
    SEEDS,
    make_vectors,
    random_tensor,
    slow_projection,
)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_direction_that_is_not_finite_is_refused_by_trait_and_layer(bad):
    with pytest.raises(ValueError, match="evil: the direction at layer 17 holds NaN or infinite values"):
        PersonaVector("evil", 17, torch.tensor([1.0, bad]))


def test_a_direction_with_layers_is_no_single_vector(shapes_unchecked):
    with pytest.raises(ValueError, match=r"one layer's direction has shape \[d_model\], got \[4, 6\]"):
        PersonaVector("evil", 0, torch.ones(N_LAYERS, D_MODEL))


@given(seed=SEEDS, factor=FACTORS)
def test_a_unit_has_norm_one_and_the_sign_of_its_vector(seed, factor):
    v = make_vectors(seed=seed).at(0)
    assert (factor * v).unit.norm == pytest.approx(1)
    torch.testing.assert_close((factor * v).unit.direction, math.copysign(1, factor) * v.unit.direction)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_zero_direction_is_kept_but_has_no_unit(layer):
    v = make_vectors().at(layer)
    zero = v - v
    refused = f"evil - evil: the direction at layer {layer} is exactly zero and has no unit vector"
    for use in (lambda: zero.unit, lambda: zero.project(v.direction), lambda: zero.cosine_similarity(v)):
        with pytest.raises(ValueError, match=refused):
            use()


@given(seed=SEEDS, scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e25]))
def test_projection_equals_the_slow_obvious_one_at_any_scale_of_the_vector(seed, scale):
    v = (scale * make_vectors(seed=seed)).at(1)
    activations = random_tensor(2, 3, D_MODEL, seed=seed + 7)
    slow = [[slow_projection(activation, v.direction) for activation in batch] for batch in activations]
    torch.testing.assert_close(v.project(activations), torch.tensor(slow), rtol=1e-4, atol=1e-5)


def test_projections_of_half_precision_activations_are_computed_in_float32():
    v, activations = make_vectors().at(0), random_tensor(5, D_MODEL).bfloat16()
    assert v.project(activations).dtype == torch.float32
    torch.testing.assert_close(v.project(activations), v.project(activations.float()))


def test_projections_carry_gradients_to_the_activations():
    v, activations = make_vectors().at(0), random_tensor(5, D_MODEL).requires_grad_()
    v.project(activations).sum().backward()
    torch.testing.assert_close(activations.grad, v.unit.direction.expand(5, -1))


def test_activations_of_another_width_are_refused():
    with pytest.raises(ValueError, match="the vector is 6 wide and the activations are 5"):
        make_vectors().at(0).project(torch.ones(2, 5))


@given(seed=SEEDS, factor=FACTORS)
def test_cosine_similarity_ignores_length_and_keeps_sign(seed, factor):
    v = make_vectors(seed=seed).at(1)
    assert v.cosine_similarity(factor * v) == pytest.approx(math.copysign(1, factor))
