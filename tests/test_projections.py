"""Passes that stop after a layer, and the projection of every token as a pass runs, on both model classes."""

import pytest
import torch

from tests import naive, tiny
from tests.intervention_cases import IDS, TOKENS, some_vectors

MASK = torch.ones_like(TOKENS, dtype=torch.bool)
EXACT = {"rtol": 0, "atol": 1e-10}
ROUNDED = {"rtol": 0, "atol": 1e-5}  # where a vector, or a constant of TransformerLens, was rounded to float32


@pytest.fixture(params=["llama", "gpt2"])
def pair(request, tiny_model, tiny_gpt2, tiny_hf_model, tiny_hf_gpt2):
    """A tiny model and the plain Hugging Face model of equal weights, for each architecture."""
    return (tiny_model, tiny_hf_model) if request.param == "llama" else (tiny_gpt2, tiny_hf_gpt2)


def run(model, **options):
    from persona_lens.models.forward import forward

    return forward(model, TOKENS, MASK, **options)


def project(model, vectors, **options):
    from persona_lens.activations.means import projected_residuals

    with projected_residuals(model, vectors) as found:
        run(model, **options)
    return found.read()


def _tolerance(model):
    return ROUNDED if type(model).__name__ == "HookedTransformer" else EXACT


def slow(hf_model, vector, ids):
    stream = naive.residual_stream(hf_model, ids)[vector.layer + 1]
    return stream @ (vector.direction.double() / vector.direction.double().norm())


# --- passes that stop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_pass_that_stops_after_a_layer_runs_no_block_above_it_and_unembeds_nothing(tiny_model, layer):
    from persona_lens.models.structure import residual_points

    ran = []
    watched = {f"point {place}": point for place, point in enumerate(residual_points(tiny_model))}
    watched["unembed"] = tiny_model.unembed
    handles = [module.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, module in watched.items()]
    try:
        assert run(tiny_model, stop_after=layer) == (None, None)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [f"point {place}" for place in range(layer + 2)]


def test_a_pass_that_stops_leaves_no_hook_and_the_next_one_runs_whole(tiny_model):
    before, expected = tiny.hook_counts(tiny_model), run(tiny_model, last_logits=None)[0]
    run(tiny_model, stop_after=0)
    assert tiny.hook_counts(tiny_model) == before
    assert torch.equal(run(tiny_model, last_logits=None)[0], expected)


def test_an_error_within_a_pass_that_stops_is_raised_and_leaves_no_hook(tiny_model):
    from persona_lens.models.structure import residual_points

    def fail(*_):
        raise RuntimeError("out of memory")

    before = tiny.hook_counts(tiny_model)
    handle = residual_points(tiny_model)[1].register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            run(tiny_model, stop_after=2)
    finally:
        handle.remove()
    assert tiny.hook_counts(tiny_model) == before


@pytest.mark.parametrize("options", [{"last_logits": 1}, {"keep_past": True}])
def test_a_pass_that_stops_has_neither_logits_nor_a_past(tiny_model, options):
    with pytest.raises(ValueError, match="stops after a layer has no logits, and keys and values of some layers only"):
        run(tiny_model, stop_after=1, **options)


# --- projections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [False, True])
def test_every_token_is_projected_on_every_vector_in_their_order(pair, stops):
    model, hf_model = pair
    evil, kind = some_vectors(model), some_vectors(model, "kind", seed=5)
    vectors = [kind.at(2), evil.at(0), evil.at(2), kind.at(0), evil.at(1)]
    found = project(model, vectors, stop_after=2 if stops else None)
    expected = torch.stack([torch.stack([slow(hf_model, each, ids) for each in vectors], dim=-1) for ids in IDS])
    torch.testing.assert_close(found, expected, **_tolerance(model))
    assert (found.dtype, found.device.type) == (torch.float64, "cpu")


def test_the_last_layer_is_read_before_the_final_norm(pair):
    model, hf_model = pair
    last = some_vectors(model).at(model.cfg.n_layers - 1)
    expected = torch.stack([slow(hf_model, last, ids) for ids in IDS])
    torch.testing.assert_close(project(model, [last])[..., 0], expected, **_tolerance(model))


def test_interventions_that_are_attached_already_are_seen(tiny_model):
    from persona_lens.interventions.hooks import steer

    vector = some_vectors(tiny_model).at(1)
    plain = project(tiny_model, [vector])
    with steer(tiny_model, vector, 3.0):
        steered = project(tiny_model, [vector], stop_after=1)
    torch.testing.assert_close(steered, plain + 3 * vector.norm, **ROUNDED)


def test_the_layers_are_those_of_the_vectors_and_no_hook_stays(tiny_model):
    from persona_lens.activations.means import projected_residuals

    vectors, before = some_vectors(tiny_model), tiny.hook_counts(tiny_model)
    with projected_residuals(tiny_model, [vectors.at(2), vectors.at(0), vectors.at(2)]) as found:
        assert found.layers == [0, 2]
        assert tiny.hook_counts(tiny_model) != before
    assert tiny.hook_counts(tiny_model) == before


def test_vectors_that_are_none_or_of_another_width_are_refused(tiny_model, tiny_gpt2):
    from persona_lens.activations.means import projected_residuals

    with pytest.raises(ValueError, match="pass at least one vector"), projected_residuals(tiny_model, []):
        pass
    other = some_vectors(tiny_gpt2).at(1)
    with pytest.raises(ValueError, match="24"), projected_residuals(tiny_model, [other]):
        pass
