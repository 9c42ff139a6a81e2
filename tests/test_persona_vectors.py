"""The direction of a trait at every layer: construction, rows, increments, tables, projections and cosines."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_lens.vectors.persona_vectors import PersonaVectors, cosine_matrix
from tests.vector_cases import (
    D_MODEL,
    FACTORS,
    N_LAYERS,
    SEEDS,
    ToyModel,
    assert_same_bits,
    make_provenance,
    make_statistics,
    make_vectors,
    random_tensor,
    slow_projection,
)

# Construction


def test_directions_are_kept_as_float32_on_the_cpu_whatever_came():
    directions = random_tensor(N_LAYERS, D_MODEL).double().requires_grad_()
    v = PersonaVectors.from_directions(directions, trait="evil", embedding=torch.ones(D_MODEL, dtype=torch.bfloat16))
    assert v.embedding is not None
    for tensor in (v.directions, v.residual_norm, v.embedding, v.at(0).direction):
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert not tensor.requires_grad


def test_changing_a_tensor_after_construction_changes_no_vector():
    directions = random_tensor(N_LAYERS, D_MODEL)
    v = PersonaVectors.from_directions(directions, trait="evil")
    before = v.directions.clone()
    directions.zero_()
    v.at(0).direction.zero_()
    assert_same_bits(v.directions, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_direction_that_is_not_finite_is_refused_by_trait_and_first_layer(bad):
    directions = torch.ones(N_LAYERS, D_MODEL)
    directions[2, 1] = directions[3, 0] = bad
    with pytest.raises(ValueError, match="evil: the direction at layer 2 holds NaN or infinite values"):
        PersonaVectors.from_directions(directions, trait="evil")


def test_a_direction_that_overflows_float32_is_refused():
    with pytest.raises(ValueError, match="an overflow"):
        PersonaVectors.from_directions(torch.full((1, 2), 1e300, dtype=torch.float64), trait="evil")


def test_an_embedding_row_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="evil: the embedding row holds NaN or infinite values"):
        make_vectors(embedding=torch.full((D_MODEL,), math.nan))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf])
def test_a_residual_norm_is_positive_or_not_measured(bad):
    with pytest.raises(ValueError, match="a residual norm is positive, or NaN where it was not measured"):
        replace(make_vectors(), residual_norm=torch.tensor([1.0, bad, math.nan, 1.0]))


def test_a_position_that_does_not_exist_is_refused(shapes_unchecked):
    with pytest.raises(ValueError, match=r"position is one of .*'prompt_last'.*, got 'response_last'"):
        make_vectors(position="response_last")


@pytest.mark.parametrize("shape", [(D_MODEL,), (1, N_LAYERS, D_MODEL), (0, D_MODEL)])
def test_directions_without_one_row_a_layer_are_refused(shapes_unchecked, shape):
    with pytest.raises(ValueError, match=r"directions have shape \[layer, d_model\], got .*: pass one row a layer"):
        PersonaVectors.from_directions(torch.ones(shape), trait="evil")


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (lambda: {"residual_norm": torch.ones(3)}, r"residual_norm of shape \[4\], got \[3\]"),
        (lambda: {"embedding": torch.ones(5)}, r"embedding of shape \[6\], got \[5\]"),
        (lambda: {"statistics": make_statistics(n_layers=3)}, r"statistics of shape \[4\], got \[3\]"),
        (
            lambda: {"provenance": make_provenance(ToyModel(n_layers=9))},
            r"a provenance with a model of shape \[4, 6\], got \[9, 6\]",
        ),
    ],
)
def test_parts_of_other_shapes_are_refused(shapes_unchecked, part, expected):
    with pytest.raises(ValueError, match=f"evil: the directions need {expected}"):
        replace(make_vectors(), **part())


# Rows


def test_at_gives_the_row_with_what_is_known_of_it():
    v = make_vectors(provenance=make_provenance(), position="prompt_last")
    one = v.at(2)
    assert_same_bits(one.direction, v.directions[2])
    assert (one.trait, one.layer, one.position) == ("evil", 2, "prompt_last")
    assert one.residual_norm == float(v.residual_norm[2])
    assert one.provenance is v.provenance


@pytest.mark.parametrize("layer", [-1, N_LAYERS])
def test_a_layer_outside_the_model_is_refused_with_the_convention(layer):
    with pytest.raises(ValueError, match=f"layer {layer} is outside 0 to 3; .* the paper's layer 20 is 19"):
        make_vectors().at(layer)


def test_a_residual_norm_that_was_not_measured_is_missing_and_not_zero():
    v = PersonaVectors.from_directions(torch.ones(2, 3), trait="mine")
    assert v.at(0).residual_norm is None
    assert v.relative_norms.isnan().all()


def test_relative_norms_are_norms_over_the_residual_norm():
    v = make_vectors()
    lengths = torch.tensor([math.dist(row, [0] * D_MODEL) for row in v.directions])
    torch.testing.assert_close(v.norms, lengths)
    torch.testing.assert_close(v.relative_norms, lengths / v.residual_norm)


# Increments


@given(seed=SEEDS)
def test_increments_up_to_a_layer_sum_to_its_direction_minus_the_embedding_row(seed):
    v = make_vectors(seed=seed)
    sums = v.incremental().directions.double().cumsum(dim=0)
    torch.testing.assert_close(sums.float(), v.directions - v.embedding, rtol=1e-5, atol=1e-5)


def test_increments_have_no_statistics_of_the_outputs():
    assert make_vectors(statistics=make_statistics()).incremental().statistics is None


def test_increments_of_a_one_layer_model_begin_at_the_embedding_row():
    v = PersonaVectors.from_directions(torch.ones(1, 3), trait="evil", embedding=torch.full((3,), 0.25))
    torch.testing.assert_close(v.incremental().directions, torch.full((1, 3), 0.75))


def test_increments_of_increments_are_refused():
    with pytest.raises(ValueError, match="are increments already: use them as they are"):
        make_vectors().incremental().incremental()


def test_increments_without_an_embedding_row_are_refused():
    with pytest.raises(ValueError, match="increments begin at the embedding row"):
        make_vectors(embedding=None).incremental()


# What a reader sees


def test_the_table_has_the_embedding_row_first_and_a_row_a_layer():
    v = make_vectors(statistics=make_statistics())
    table = v.table()
    assert list(table.index) == ["embedding", *range(N_LAYERS)]
    assert table.index.name == "layer"
    assert list(table.columns) == ["norm", "relative_norm", *v.statistics.by_layer]
    assert table.loc["embedding", "held_out_auc"] == 0.1
    assert math.isnan(table.loc["embedding", "relative_norm"])
    assert table.loc[3, "norm"] == pytest.approx(v.at(3).norm)
    assert table.loc[1, "placebo_auc_95"] == float(v.statistics.placebo_auc_95[1])


def test_the_table_without_embedding_row_or_statistics_has_the_norms_of_the_layers():
    table = make_vectors(embedding=None).table()
    assert list(table.index) == list(range(N_LAYERS))
    assert list(table.columns) == ["norm", "relative_norm"]
    assert list(make_vectors().table().index) == ["embedding", *range(N_LAYERS)]


# Projections


@given(seed=SEEDS, scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e25]))
def test_projection_equals_the_slow_obvious_one_at_any_scale_of_the_vectors(seed, scale):
    v = scale * make_vectors(seed=seed)
    means = random_tensor(2, 3, N_LAYERS, D_MODEL, seed=seed + 7)
    slow = [[list(map(slow_projection, rows, v.directions)) for rows in batch] for batch in means]
    torch.testing.assert_close(v.project(means), torch.tensor(slow), rtol=1e-4, atol=1e-5)


def test_means_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"the vectors are \[4, 6\] and the means \[3, 6\]"):
        make_vectors().project(torch.ones(2, 3, D_MODEL))


def test_zero_directions_are_kept_but_nothing_is_projected_on_them_or_compared():
    v = make_vectors()
    zero = v - v
    for use in (lambda: zero.project(v.directions), lambda: v.cosine_similarity(zero)):
        with pytest.raises(ValueError, match="evil - evil: the direction at layer 0 is exactly zero and has no unit"):
            use()


def make_cache(batch=2, pos=3):
    return {
        f"blocks.{layer}.hook_resid_post": random_tensor(batch, pos, D_MODEL, seed=layer) for layer in range(N_LAYERS)
    }


def test_projecting_a_cache_projects_every_token_at_every_layer():
    from transformer_lens import ActivationCache

    v, cache = make_vectors(), make_cache()
    projected = v.project_cache(ActivationCache(cache, None))
    assert projected.shape == (N_LAYERS, 2, 3)
    for layer in range(N_LAYERS):
        torch.testing.assert_close(projected[layer], v.at(layer).project(cache[v.hook_names[layer]]))
    torch.testing.assert_close(v.project_cache(cache), projected)


def test_a_cache_that_lacks_layers_is_refused_with_the_filter_to_use():
    v, cache = make_vectors(), make_cache()
    del cache["blocks.2.hook_resid_post"]
    with pytest.raises(
        ValueError, match=r"the cache lacks blocks.2.hook_resid_post: .*names_filter=vectors.hook_names"
    ):
        v.project_cache(cache)
    with pytest.raises(ValueError, match=r"blocks.2.hook_resid_post and 1 more"):
        v.project_cache({})


# Cosines


@given(seed=SEEDS, factor=FACTORS)
def test_cosine_similarity_ignores_length_and_keeps_sign(seed, factor):
    v = make_vectors(seed=seed)
    torch.testing.assert_close(v.cosine_similarity(factor * v), torch.full((N_LAYERS,), math.copysign(1, factor)))


def test_cosine_similarity_compares_positions_but_not_widths():
    v = make_vectors()
    torch.testing.assert_close(v.cosine_similarity(replace(v, position="prompt_last")), torch.ones(N_LAYERS))
    with pytest.raises(ValueError, match="differ in d_model"):
        v.cosine_similarity(PersonaVectors.from_directions(torch.ones(N_LAYERS, 5), trait="evil"))


def test_the_cosine_matrix_holds_the_cosine_of_each_pair_of_traits():
    traits = [make_vectors(name, seed=seed) for seed, name in enumerate(["evil", "optimistic", "impolite"])]
    matrix = cosine_matrix(traits, layer=1)
    for row in traits:
        for column in traits:
            expected = float(row.cosine_similarity(column)[1])
            assert matrix.loc[row.trait, column.trait] == pytest.approx(expected, abs=1e-6)


def test_a_cosine_matrix_of_unlike_vectors_is_refused():
    deeper = PersonaVectors.from_directions(torch.ones(9, D_MODEL), trait="optimistic")
    with pytest.raises(ValueError, match=r"evil and optimistic differ in n_layers \(4 and 9\)"):
        cosine_matrix([make_vectors(), deeper], layer=1)


def test_a_cosine_matrix_of_nothing_is_refused():
    with pytest.raises(ValueError, match="There are no vectors to compare"):
        cosine_matrix([], layer=0)
