"""Steer, ablate and cap as pure functions of the residual stream: their formulas, identities, and what they leave."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_lens.interventions.values import Ablate, Cap, Steer, When
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests.vector_cases import D_MODEL, FACTORS, N_LAYERS, SEEDS, make_vectors, random_tensor, slow_projection

RESID = random_tensor(2, 5, D_MODEL, seed=50).double()
SOME = torch.tensor([[True, False, True, True, False], [False, False, True, False, True]])
EVIL, KIND, SAD = (make_vectors(trait, seed=seed) for seed, trait in enumerate(["evil", "kind", "sad"]))
EACH_KIND = [
    Steer(EVIL.at(1), -1.5),
    Steer(EVIL.at(1), torch.tensor([0.5, -2.0])),
    Ablate([EVIL.at(1), KIND.at(1)]),
    Ablate(EVIL.at(1), random_tensor(D_MODEL, seed=9)),
    Cap(EVIL.at(1), 0.1, -0.1),
]


def projections(resid, vector):
    """Of every token, in plain Python."""
    return [[slow_projection(token, vector.direction) for token in row] for row in resid]


def assert_projections(resid, vector, expected):
    torch.testing.assert_close(torch.tensor(projections(resid, vector)), torch.tensor(expected), rtol=0, atol=1e-6)


def orthogonal_part(resid, vector):
    unit = vector.direction.double() / vector.direction.double().norm()
    return resid - (resid @ unit)[..., None] * unit


def assert_same_up_to_rounding(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


# --- all kinds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", EACH_KIND, ids=str)
def test_only_the_given_positions_change_and_the_input_stays_as_it_is(each):
    before = RESID.clone()
    everywhere, found = each.apply(RESID), each.apply(RESID, SOME)
    assert torch.equal(RESID, before)
    assert torch.equal(found[SOME], everywhere[SOME])
    assert torch.equal(found[~SOME], RESID[~SOME])
    assert not torch.equal(found, RESID)


@pytest.mark.parametrize("each", EACH_KIND, ids=str)
def test_one_value_serves_activations_of_several_dtypes_and_keeps_them(each):
    tolerances = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 0.1, torch.float16: 0.02}
    for dtype, tolerance in tolerances.items():
        found = each.apply(RESID.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), each.apply(RESID), rtol=0, atol=tolerance)


@pytest.mark.parametrize("each", EACH_KIND, ids=str)
def test_a_value_that_was_used_in_inference_mode_can_be_trained_through(each):
    used = replace(each)  # a value that nothing has used yet
    with torch.inference_mode():
        used.apply(RESID)
    resid = RESID.clone().requires_grad_()
    used.apply(resid * 1).sum().backward()
    assert bool(resid.grad.isfinite().all())


def test_every_layer_is_changed_along_its_own_vector():
    for layer in range(N_LAYERS):
        assert torch.equal(Ablate(EVIL).apply(RESID, layer=layer), Ablate(EVIL.at(layer)).apply(RESID))
        assert torch.equal(Steer(EVIL, 2.0).apply(RESID, layer=layer), Steer(EVIL.at(layer), 2.0).apply(RESID))


# --- steer ---------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, coefficient=FACTORS)
def test_steering_adds_the_coefficient_times_the_vector(seed, coefficient):
    vector = make_vectors(seed=seed).at(2)
    found = Steer(vector, coefficient).apply(RESID)
    for old, new in zip(RESID.reshape(-1, D_MODEL).tolist(), found.reshape(-1, D_MODEL).tolist(), strict=True):
        slow = [h + coefficient * v for h, v in zip(old, vector.direction.tolist(), strict=True)]
        assert new == pytest.approx(slow, abs=1e-10)


@pytest.mark.parametrize("coefficient", [0, 0.0, torch.zeros(2), torch.zeros(2, 1)], ids=["int", "0.0", "[2]", "[2,1]"])
def test_a_coefficient_of_zero_gives_back_the_same_bits(coefficient):
    steer = Steer(EVIL.at(1), coefficient)
    assert torch.equal(steer.apply(RESID), RESID)
    assert steer.acting_layers == ()


@given(seed=SEEDS, coefficient=FACTORS)
def test_steering_by_the_negated_vector_undoes_steering(seed, coefficient):
    vector = make_vectors(seed=seed).at(0)
    assert_same_up_to_rounding(Steer(-vector, coefficient).apply(Steer(vector, coefficient).apply(RESID)), RESID)


def test_several_vectors_at_one_layer_add_up():
    both = Steer([EVIL.at(1), KIND, SAD.at(0)], 0.5).apply(RESID, layer=1)
    assert_same_up_to_rounding(both, Steer(KIND.at(1), 0.5).apply(Steer(EVIL.at(1), 0.5).apply(RESID)))


def test_a_row_of_coefficients_steers_its_row_alone():
    table = torch.tensor([[1.0, 0.0, -2.0, 0.5], [0.0, 3.0, 0.25, 0.5]])
    for layer in range(N_LAYERS):
        found = Steer(EVIL, table).apply(RESID, layer=layer)
        for row in range(2):
            alone = Steer(EVIL.at(layer), float(table[row, layer])).apply(RESID[row : row + 1])
            assert_same_up_to_rounding(found[row : row + 1], alone)


def test_rows_say_which_row_of_the_coefficients_each_row_of_the_batch_is():
    table = torch.tensor([[1.0], [0.0], [-2.0]])
    found = Steer(EVIL.at(1), table).apply(RESID, rows=torch.tensor([2, 0]))
    assert torch.equal(found, Steer(EVIL.at(1), table[[2, 0]]).apply(RESID))


def test_columns_of_coefficients_follow_the_vectors_in_their_order():
    table = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    found = Steer([KIND.at(1), EVIL.at(1)], table).apply(RESID)
    by_columns = Steer(EVIL.at(1), table[:, 1]).apply(Steer(KIND.at(1), table[:, 0]).apply(RESID))
    assert_same_up_to_rounding(found, by_columns)


def test_layers_whose_column_is_zero_are_left_out():
    assert Steer(EVIL, torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0]])).acting_layers == (1, 3)


def test_coefficients_that_the_caller_changes_later_change_nothing():
    table = torch.ones(2, 1)
    steer = Steer(EVIL.at(1), table)
    table.fill_(7)
    assert torch.equal(steer.apply(RESID), Steer(EVIL.at(1), torch.ones(2, 1)).apply(RESID))


def test_a_dose_is_the_step_over_the_stored_residual_norm():
    steer = Steer(EVIL, -2.0)
    for layer, dose in enumerate(steer.doses):
        assert dose == pytest.approx(-2 * float(EVIL.directions[layer].norm()) / float(EVIL.residual_norm[layer]))
    assert f"{max(steer.doses, key=abs):+.2f} of the residual norm" in str(steer)


def test_a_dose_is_unknown_where_the_residual_norm_is():
    own = PersonaVectors.from_directions(random_tensor(N_LAYERS, D_MODEL), trait="own")
    assert Steer(own.at(1), 2.0).doses == (None,)
    assert str(Steer(own.at(1), 2.0)) == "steer own at layer 1 by 2"


# --- ablate --------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_ablating_leaves_no_projection_and_touches_nothing_else(seed, scale):
    vector = (scale * make_vectors(seed=seed)).at(1)
    found = Ablate(vector).apply(RESID)
    assert_same_up_to_rounding(found, orthogonal_part(RESID, vector))
    assert max(abs(value) for row in projections(found, vector) for value in row) < 1e-12


def test_ablating_twice_is_ablating_once():
    once = Ablate([EVIL.at(1), KIND.at(1)]).apply(RESID)
    assert_same_up_to_rounding(Ablate([EVIL.at(1), KIND.at(1)]).apply(once), once)


@given(seed=SEEDS)
def test_directions_that_are_not_orthogonal_are_removed_together(seed):
    pair = [make_vectors(seed=seed).at(1), make_vectors(seed=seed + 1).at(1)]
    found = Ablate(pair).apply(RESID)
    for vector in pair:
        assert_projections(found, vector, [[0.0] * 5] * 2)


def test_a_direction_that_is_given_twice_counts_once():
    assert_same_up_to_rounding(Ablate([EVIL.at(1), -2 * EVIL.at(1)]).apply(RESID), Ablate(EVIL.at(1)).apply(RESID))


@given(seed=SEEDS)
def test_ablating_around_activations_gives_their_projection_and_touches_nothing_else(seed):
    around = random_tensor(D_MODEL, seed=seed)
    found = Ablate(EVIL.at(1), around).apply(RESID)
    assert_projections(found, EVIL.at(1), [[slow_projection(around, EVIL.at(1).direction)] * 5] * 2)
    assert_same_up_to_rounding(orthogonal_part(found, EVIL.at(1)), orthogonal_part(RESID, EVIL.at(1)))


def test_around_has_a_row_for_every_layer():
    around = random_tensor(N_LAYERS, D_MODEL, seed=3)
    for layer in range(N_LAYERS):
        found = Ablate(EVIL, around).apply(RESID, layer=layer)
        assert torch.equal(found, Ablate(EVIL.at(layer), around[layer]).apply(RESID))


def test_half_precision_is_ablated_to_its_own_rounding():
    exact = orthogonal_part(RESID.bfloat16().double(), EVIL.at(1))
    assert torch.equal(Ablate(EVIL.at(1)).apply(RESID.bfloat16()), exact.bfloat16())


# --- cap -----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, bounds=st.lists(st.floats(-2, 2), min_size=2, max_size=2).map(sorted))
def test_a_cap_holds_the_projection_within_its_bounds_and_touches_nothing_else(seed, bounds):
    vector = make_vectors(seed=seed).at(1)
    found = Cap(vector, bounds[1], bounds[0]).apply(RESID)
    clipped = [[min(max(value, bounds[0]), bounds[1]) for value in row] for row in projections(RESID, vector)]
    assert_projections(found, vector, clipped)
    assert_same_up_to_rounding(orthogonal_part(found, vector), orthogonal_part(RESID, vector))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_token_within_its_bounds_keeps_its_bits(dtype):
    resid = RESID.to(dtype)
    found = Cap(EVIL.at(1), maximum=0.3).apply(resid)
    inside = torch.tensor(projections(resid, EVIL.at(1))) < 0.299
    assert bool(inside.any())
    assert not bool(inside.all())
    assert torch.equal(found[inside], resid[inside])


def test_one_bound_leaves_the_other_side_open():
    vector = EVIL.at(1)
    plain = projections(RESID, vector)
    for each, side in ((Cap(vector, minimum=0.2), max), (Cap(vector, maximum=0.2), min)):
        assert_projections(each.apply(RESID), vector, [[side(value, 0.2) for value in row] for row in plain])


def test_bounds_follow_their_vectors_whatever_layers_these_belong_to():
    second = KIND.at(2).orthogonal_to(EVIL.at(2))
    value = Cap([EVIL.at(2), KIND.at(1), second], maximum=torch.tensor([-0.5, 0.25, 0.1]))
    for layer, held in ((1, [(KIND.at(1), 0.25)]), (2, [(EVIL.at(2), -0.5), (second, 0.1)])):
        found = value.apply(RESID, layer=layer)
        for vector, bound in held:
            before = projections(RESID, vector)
            assert max(map(max, before)) > bound
            assert_projections(found, vector, [[min(each, bound) for each in row] for row in before])


# --- when ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [{"above": 0.1}, {"below": -0.1}, {"above": -0.5, "below": 0.5}])
@pytest.mark.parametrize("kind", [Steer, Ablate])
def test_a_condition_lets_exactly_the_tokens_that_pass_be_changed(kind, bounds):
    low, high = bounds.get("above", -math.inf), bounds.get("below", math.inf)
    passes = torch.tensor([[low < value < high for value in row] for row in projections(RESID, KIND.at(1))])
    assert bool(passes.any())
    assert not bool(passes.all())
    found = kind(EVIL.at(1), when=When(KIND.at(1), **bounds)).apply(RESID)
    assert torch.equal(found[passes], kind(EVIL.at(1)).apply(RESID)[passes])
    assert torch.equal(found[~passes], RESID[~passes])


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"above": 0.5}, [False, False, True]),
        ({"below": 0.5}, [True, False, False]),
        ({"above": 0.25, "below": 0.75}, [False, True, False]),
    ],
    ids=str,
)
def test_a_projection_that_equals_a_threshold_does_not_pass_it(bounds, expected):
    probe = PersonaVectors.from_directions(torch.tensor([[4.0, 0.0]]), trait="kind").at(0)
    resid = torch.tensor([[[0.25, 9.0], [0.5, 9.0], [0.75, 9.0]]])
    assert When(probe, **bounds).holds(resid, layer=0).tolist() == [expected]


def test_a_condition_narrows_the_positions():
    when = When(KIND.at(1), above=0.1)
    found = Steer(EVIL.at(1), when=when).apply(RESID, SOME)
    assert torch.equal(found, Steer(EVIL.at(1)).apply(RESID, SOME & when.holds(RESID, layer=1)))


def test_a_condition_reads_the_vector_of_the_layer():
    steer = Steer(EVIL, when=When(KIND, above=0.1))
    for layer in range(N_LAYERS):
        alone = Steer(EVIL.at(layer), when=When(KIND.at(layer), above=0.1))
        assert torch.equal(steer.apply(RESID, layer=layer), alone.apply(RESID))


# --- directions made orthogonal ------------------------------------------------------------------------------------


@given(seed=SEEDS)
def test_orthogonal_to_leaves_no_cosine_with_any_of_the_others(seed):
    vector, *others = [make_vectors(seed=seed + step).at(1) for step in range(3)]
    rest = vector.orthogonal_to(*others)
    assert all(abs(rest.cosine_similarity(other)) < 1e-5 for other in others)


def test_orthogonal_to_takes_only_what_the_others_span():
    rest = EVIL.at(1).orthogonal_to(KIND.at(1))
    torch.testing.assert_close(rest.direction.double(), orthogonal_part(EVIL.at(1).direction.double(), KIND.at(1)))
    assert rest.trait == "(evil without kind)"


@pytest.mark.parametrize("others", [[2 * EVIL.at(1)], [EVIL.at(1) + KIND.at(1), EVIL.at(1) - KIND.at(1)]])
def test_orthogonal_to_refuses_where_nothing_is_left(others):
    with pytest.raises(ValueError, match="evil: nothing of it is orthogonal to"):
        EVIL.at(1).orthogonal_to(*others)
