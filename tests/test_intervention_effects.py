"""Attached interventions on both model classes: what they do to the residual stream, and in which order."""

import pytest
import torch

from persona_lens.interventions.hooks import ablate, attachments, cap, intervene, steer
from persona_lens.interventions.values import Ablate, Cap, Steer, When
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests import naive, tiny
from tests.intervention_cases import EXACT, IDS, TOKENS, logits, projections, some_vectors, stream
from tests.vector_cases import random_tensor


@pytest.fixture(params=["llama", "gpt2"])
def pair(request, tiny_model, tiny_gpt2, tiny_hf_model, tiny_hf_gpt2):
    """A tiny model and the plain Hugging Face model of equal weights, for each architecture."""
    return (tiny_model, tiny_hf_model) if request.param == "llama" else (tiny_gpt2, tiny_hf_gpt2)


# --- what they do --------------------------------------------------------------------------------------------------


def slow_edit(kind, vector):
    """The formula of an intervention, one plain Hugging Face layer at a time."""
    direction = vector.double()
    unit = direction / direction.norm()

    def edit(resid):
        projection = (resid @ unit)[..., None]
        return {
            "steer": resid - 1.5 * direction,
            "ablate": resid - projection * unit,
            "cap": resid + (projection.clamp(-0.5, 0.5) - projection) * unit,
        }[kind]

    return edit


@pytest.mark.parametrize("kind", ["steer", "ablate", "cap"])
def test_every_layer_acts_with_its_own_direction_as_on_the_plain_model(pair, kind):
    model, hf_model = pair
    vectors = some_vectors(model)
    value = {"steer": Steer(vectors, -1.5), "ablate": Ablate(vectors), "cap": Cap(vectors, 0.5, -0.5)}[kind]
    with intervene(model, value):
        found, found_logits = stream(model), logits(model)
    with naive.edited(hf_model, {layer: slow_edit(kind, row) for layer, row in enumerate(vectors.directions)}):
        for row, ids in enumerate(IDS):
            assert naive.relative_error(found[:, row], naive.residual_stream(hf_model, ids)[1:]) < 1e-5
            torch.testing.assert_close(found_logits[row], naive.logits(hf_model, ids), rtol=1e-5, atol=1e-5)


def test_a_single_vector_acts_at_its_layer_alone(tiny_model):
    vector, plain = some_vectors(tiny_model).at(2), stream(tiny_model)
    with steer(tiny_model, vector, 3.0):
        found = stream(tiny_model)
    assert torch.equal(found[:2], plain[:2])
    torch.testing.assert_close(found[2], plain[2] + 3 * vector.direction.double(), **EXACT)


@pytest.mark.parametrize("together", ["one value", "one call", "one call around another kind"])
def test_two_ablated_directions_are_both_gone_although_not_orthogonal(tiny_model, together):
    first, second = some_vectors(tiny_model), some_vectors(tiny_model, "kind", seed=1)
    second = first + 0.3 * second
    nothing = Steer(first, 0.0)
    values = {
        "one value": [Ablate([first, second])],
        "one call": [Ablate(first), Ablate(second)],
        "one call around another kind": [nothing, Ablate(first), Ablate(second), nothing],
    }[together]
    with intervene(tiny_model, *values):
        assert float(projections(tiny_model, first).abs().max()) < 1e-10
        assert float(projections(tiny_model, second).abs().max()) < 1e-10


@pytest.mark.parametrize("coefficient", [0.0, torch.zeros(2, 4)], ids=["number", "matrix"])
def test_a_coefficient_of_zero_changes_no_bit(tiny_model, coefficient):
    plain = logits(tiny_model)
    with steer(tiny_model, some_vectors(tiny_model), coefficient):
        assert torch.equal(logits(tiny_model), plain)


def test_steering_inside_steering_back_changes_nothing(pair):
    model, _ = pair
    vectors, plain = some_vectors(model), logits(model)
    with steer(model, -vectors, 2.0), steer(model, vectors, 2.0):
        torch.testing.assert_close(logits(model), plain, **EXACT)


def test_nothing_is_left_of_an_ablated_direction_at_its_hook_point(pair):
    model, _ = pair
    vectors = some_vectors(model)
    assert float(projections(model, vectors).abs().min(dim=-1).values.max()) > 0.01
    with ablate(model, vectors):
        assert float(projections(model, vectors).abs().max()) < 1e-10


def test_ablating_around_activations_leaves_their_projection(pair):
    model, _ = pair
    vectors, around = some_vectors(model), random_tensor(model.cfg.n_layers, model.cfg.d_model, seed=4)
    unit = vectors.directions.double() / vectors.directions.double().norm(dim=-1, keepdim=True)
    expected = (around.double() * unit).sum(dim=-1)[:, None, None].expand(-1, *TOKENS.shape)
    with ablate(model, vectors, around=around):
        torch.testing.assert_close(projections(model, vectors), expected, **EXACT)


def test_a_cap_holds_every_layer_within_its_bounds(pair):
    model, _ = pair
    vectors = some_vectors(model)
    assert float(projections(model, vectors).abs().max()) > 0.5
    with cap(model, vectors, maximum=0.25, minimum=-0.5):
        capped = projections(model, vectors)
    assert -0.5 - 1e-10 < float(capped.min()) < -0.49
    assert 0.24 < float(capped.max()) < 0.25 + 1e-10


def test_a_cap_leaves_tokens_that_were_within_its_bounds(tiny_model):
    vector, plain = some_vectors(tiny_model).at(1), stream(tiny_model)
    inside = projections(tiny_model, some_vectors(tiny_model))[1] < 0.25
    with cap(tiny_model, vector, maximum=0.25):
        found = stream(tiny_model)
    assert torch.equal((found[1] == plain[1]).all(dim=-1), inside)
    assert bool(inside.any())
    assert not bool(inside.all())


def test_a_condition_acts_exactly_on_the_tokens_that_pass_it(tiny_model):
    vectors, probes = some_vectors(tiny_model), some_vectors(tiny_model, "kind", seed=1)
    plain, passes = stream(tiny_model)[1], projections(tiny_model, probes)[1] > 0.2
    with steer(tiny_model, vectors.at(1), 2.0, when=When(probes.at(1), above=0.2)):
        found = stream(tiny_model)[1]
    expected = torch.where(passes[..., None], plain + 2 * vectors.directions[1].double(), plain)
    torch.testing.assert_close(found, expected, **EXACT)
    assert bool(passes.any())
    assert not bool(passes.all())


def with_silent_blocks(hf_model):
    """The model with blocks that add nothing to the stream."""
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "c_proj")):
                parameter.zero_()
    return hf_model


@pytest.mark.parametrize("architecture", [tiny.llama, tiny.gpt2])
def test_increments_shift_the_stream_by_each_layers_vector_less_the_embedding_row(
    make_tiny_model, model_class, tiny_tokenizer, architecture
):
    model = make_tiny_model(model_class, with_silent_blocks(architecture(tiny_tokenizer)))
    whole = (10 * some_vectors(model).directions).round()  # whole numbers, whose differences float32 holds exactly
    for embedding in (torch.zeros(model.cfg.d_model), (10 * random_tensor(model.cfg.d_model, seed=5)).round()):
        vectors = PersonaVectors.from_directions(whole, trait="evil", embedding=embedding)
        plain = stream(model)
        with steer(model, vectors.incremental()):
            shift = stream(model) - plain
        expected = (whole - embedding).double()[:, None, None, :]
        torch.testing.assert_close(shift, expected.expand_as(shift), **EXACT)


# --- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "one call"])
@pytest.mark.parametrize("order", ["steer, ablate", "ablate, steer"])
def test_interventions_act_in_the_order_in_which_they_are_given(tiny_model, order, nested):
    vectors = some_vectors(tiny_model)
    values = {"steer": Steer(vectors, 2.0), "ablate": Ablate(vectors)}
    first, second = (values[name] for name in order.split(", "))
    if nested:
        with intervene(tiny_model, first), intervene(tiny_model, second):
            found = projections(tiny_model, vectors)
    else:
        with intervene(tiny_model, first, second):
            found = projections(tiny_model, vectors)
    left = 2 * vectors.norms.double() if order == "ablate, steer" else torch.zeros(4).double()
    torch.testing.assert_close(found, left[:, None, None].expand_as(found), rtol=1e-6, atol=1e-10)


def test_the_attached_interventions_are_known_outermost_first(tiny_model):
    vectors = some_vectors(tiny_model)
    with steer(tiny_model, vectors.at(2)) as outer, ablate(tiny_model, vectors) as inner:
        assert attachments(tiny_model) == (outer, inner)
        assert (outer.layers, inner.layers) == ([2], [0, 1, 2, 3])
    assert attachments(tiny_model) == ()
