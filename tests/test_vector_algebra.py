"""The operators of persona vectors: their identities, what a result keeps, and which two may be combined."""

import math
import operator
from dataclasses import replace

import pytest
import torch
from hypothesis import given

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
)

# Identities


@given(seed=SEEDS)
def test_v_minus_v_is_zero(seed):
    v = make_vectors(seed=seed)
    assert (v - v).directions.count_nonzero() == 0
    assert (v - v).embedding.count_nonzero() == 0


@pytest.mark.parametrize(
    ("left", "right"),
    [
        pytest.param(lambda v, w: operator.neg(-v), lambda v, w: v, id="minus minus v is v"),
        pytest.param(lambda v, w: (2 * v) / 2, lambda v, w: v, id="twice v halved is v"),
        pytest.param(lambda v, w: (v * 2) / 2, lambda v, w: v, id="v twice halved is v"),
        pytest.param(lambda v, w: v - w, lambda v, w: v + -w, id="v minus w is v plus minus w"),
    ],
)
@given(seed=SEEDS)
def test_identities_hold_to_the_bit(left, right, seed):
    v, w = make_vectors(seed=seed), make_vectors(seed=seed + 10)
    assert_same_bits(left(v, w).directions, right(v, w).directions)
    assert_same_bits(left(v, w).embedding, right(v, w).embedding)


@given(seed=SEEDS, factor=FACTORS)
def test_scaling_distributes_over_a_sum(seed, factor):
    v, w = make_vectors(seed=seed), make_vectors(seed=seed + 10)
    torch.testing.assert_close(
        (factor * (v + w)).directions, (factor * v + factor * w).directions, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(
    "combine",
    [
        lambda v, w: v + w,
        lambda v, w: v - w,
        lambda v, w: -v,
        lambda v, w: v / 3,
        lambda v, w: 3 * v,
        lambda v, w: v * 3,
    ],
)
@given(seed=SEEDS)
def test_operators_on_all_layers_are_operators_on_each(combine, seed):
    v, w = make_vectors(seed=seed), make_vectors(seed=seed + 10)
    for layer in range(N_LAYERS):
        assert_same_bits(combine(v, w).at(layer).direction, combine(v.at(layer), w.at(layer)).direction)


# What a result keeps


@pytest.mark.parametrize(
    ("combine", "trait"),
    [
        (lambda v, w: v + w, "evil + optimistic"),
        (lambda v, w: v - w, "evil - optimistic"),
        (lambda v, w: -v, "-evil"),
        (lambda v, w: operator.neg(-v), "evil"),
        (lambda v, w: 0.5 * v, "0.5 * evil"),
        (lambda v, w: v * 3, "3 * evil"),
        (lambda v, w: v / 2, "evil / 2"),
        (lambda v, w: -(v + w), "-(evil + optimistic)"),
        (lambda v, w: w - (v + w), "optimistic - (evil + optimistic)"),
        (lambda v, w: -(-v + w), "-(-evil + optimistic)"),
        (lambda v, w: v + 2 * w, "evil + (2 * optimistic)"),
    ],
)
def test_operators_write_what_they_did_into_the_trait(combine, trait):
    v, w = make_vectors("evil"), make_vectors("optimistic")
    assert combine(v, w).trait == trait
    assert combine(v.at(1), w.at(1)).trait == trait


def test_operators_drop_statistics_and_a_sum_drops_counts():
    v = make_vectors(statistics=make_statistics())
    assert (2 * v).statistics is None
    assert (2 * v).counts == v.counts
    assert (v + v).statistics is None
    assert (v + v).counts == {}


def test_a_sum_has_an_embedding_row_only_if_both_have_one():
    v = make_vectors()
    assert (v + make_vectors(embedding=None)).embedding is None
    assert (make_vectors(embedding=None) + v).embedding is None


def test_a_sum_has_a_provenance_only_if_both_have_one():
    provenance = make_provenance()
    known, unknown = make_vectors(provenance=provenance), make_vectors()
    assert (known + unknown).provenance is None
    assert (unknown + known).provenance is None
    assert (known + known).provenance.model == provenance.model
    assert (known + known).provenance.settings["combined"]["right"] == provenance.settings


def test_the_residual_norm_of_a_sum_is_the_mean_of_those_measured():
    v, w = make_vectors(), replace(make_vectors(seed=5), residual_norm=torch.tensor([math.nan, 1, 2, 3]))
    total = (v + w).residual_norm
    torch.testing.assert_close(total[0], v.residual_norm[0])
    torch.testing.assert_close(total[1:], (v.residual_norm[1:] + w.residual_norm[1:]) / 2)
    assert (v.at(0) + w.at(0)).residual_norm == v.at(0).residual_norm
    assert (w.at(0) + w.at(0)).residual_norm is None
    assert (v.at(1) + w.at(1)).residual_norm == pytest.approx(float(total[1]))


# Refusals


@pytest.mark.parametrize(
    "scale",
    [
        lambda v: v * v,
        lambda v: v / v,
        lambda v: v / "2",
        lambda v: v * torch.ones(N_LAYERS, 1),
        lambda v: torch.ones(N_LAYERS, 1) * v,
    ],
)
def test_only_numbers_scale_a_vector(shapes_unchecked, scale):
    with pytest.raises(TypeError, match="unsupported operand"):
        scale(make_vectors())


@pytest.mark.parametrize("add", [lambda v: v + 1, lambda v: v - v.at(0), lambda v: v.at(0) + v])
def test_only_vectors_of_one_kind_are_added(shapes_unchecked, add):
    with pytest.raises(TypeError, match="unsupported operand"):
        add(make_vectors())


def test_dividing_by_zero_is_refused():
    with pytest.raises(ValueError, match="evil / 0: the direction at layer 0 holds NaN or infinite values"):
        _ = make_vectors() / 0


@pytest.mark.parametrize("combine", [operator.add, operator.sub])
@pytest.mark.parametrize(
    ("pair", "fact"),
    [
        (
            lambda v: (v, replace(v, directions=torch.ones(3, D_MODEL), residual_norm=torch.ones(3))),
            r"n_layers \(4 and 3\)",
        ),
        (lambda v: (v, replace(v, directions=torch.ones(N_LAYERS, 5), embedding=None)), r"d_model \(6 and 5\)"),
        (lambda v: (v, replace(v, position="prompt_last")), r"position \(response_mean and prompt_last\)"),
        (
            lambda v: (v.at(1), replace(v, position="prompt_last").at(1)),
            r"position \(response_mean and prompt_last\)",
        ),
        (lambda v: (v, v.incremental()), r"increments \(False and True\)"),
        (lambda v: (v.at(1), v.at(2)), r"layer \(1 and 2\)"),
    ],
)
def test_unlike_vectors_are_not_combined(combine, pair, fact):
    with pytest.raises(ValueError, match=f"evil and evil differ in {fact}: combine or compare like with like"):
        combine(*pair(make_vectors()))


def test_vectors_in_different_residual_bases_are_not_added():
    raw = make_vectors(provenance=make_provenance(ToyModel(normalization="LN")))
    centred = make_vectors(provenance=make_provenance(ToyModel(normalization="LN", centred=True)))
    with pytest.raises(ValueError, match=r"differ in residual basis \(raw and centred\)"):
        _ = raw + centred


def test_vectors_of_unrelated_models_are_not_added_while_both_models_are_known():
    v = make_vectors(provenance=make_provenance())
    w = make_vectors(provenance=make_provenance(ToyModel(seed=1)))
    with pytest.raises(ValueError, match=r"come from unrelated models \(toy-0 and toy-1\)"):
        _ = v + w
    assert (v + replace(w, provenance=None)).provenance is None


def test_vectors_of_a_model_and_its_finetuned_self_are_added():
    v = make_vectors(provenance=make_provenance())
    w = make_vectors(provenance=make_provenance(ToyModel().finetuned()))
    assert (w - v).provenance.model == w.provenance.model
