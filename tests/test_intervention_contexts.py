"""The life of an attached intervention: nothing of it stays, whatever ends it, and one that never acted is an error."""

import gc

import pytest
import torch

from persona_lens.interventions.hooks import ablate, attachments, steer
from persona_lens.models.structure import suspended
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests.intervention_cases import TOKENS, hooks, logits, some_vectors, stream
from tests.vector_cases import random_tensor

VECTOR = PersonaVectors.from_directions(random_tensor(4, 32, seed=2), trait="sad").at(2)

# --- that nothing stays --------------------------------------------------------------------------------------------


def test_leaving_takes_off_every_hook(tiny_model):
    plain = logits(tiny_model)  # first, since transformers adds hooks of its own as a model first runs
    before = hooks(tiny_model)
    with steer(tiny_model, some_vectors(tiny_model), at="response", prompt_lengths=[1, 1]):
        assert hooks(tiny_model) != before
        assert not torch.equal(logits(tiny_model), plain)
    assert hooks(tiny_model) == before
    assert torch.equal(logits(tiny_model), plain)


@pytest.mark.parametrize("at", ["all", "response"])
def test_an_exception_takes_off_every_hook(tiny_model, at):
    before = hooks(tiny_model)
    with pytest.raises(KeyError), steer(tiny_model, some_vectors(tiny_model), at=at), ablate(tiny_model, VECTOR):
        raise KeyError
    assert hooks(tiny_model) == before
    assert attachments(tiny_model) == ()


def test_an_exception_in_the_forward_pass_takes_off_every_hook(tiny_model):
    before = hooks(tiny_model)
    with pytest.raises(ValueError, match="cannot tell the prompt"), steer(tiny_model, VECTOR, at="response"):
        logits(tiny_model)
    assert hooks(tiny_model) == before
    assert attachments(tiny_model) == ()


@pytest.mark.parametrize("fails", ["watch_passes", "_listed"])
def test_an_entry_that_fails_half_way_takes_off_what_it_attached(tiny_model, monkeypatch, fails):
    def fail(*_arguments):
        raise MemoryError

    before = hooks(tiny_model)
    with monkeypatch.context() as patch:
        patch.setattr(f"persona_lens.interventions.hooks.{fails}", fail)
        with pytest.raises(MemoryError), steer(tiny_model, VECTOR, at="response"):
            raise AssertionError("never entered")
    assert hooks(tiny_model) == before
    assert attachments(tiny_model) == ()


def test_run_with_cache_inside_leaves_the_intervention_on(tiny_model):
    with steer(tiny_model, VECTOR):
        steered = logits(tiny_model)
        stream(tiny_model)
        assert torch.equal(logits(tiny_model), steered)


def test_the_intervention_survives_reset_hooks(tiny_model):
    before = hooks(tiny_model)
    with steer(tiny_model, VECTOR):
        steered = logits(tiny_model)
        tiny_model.reset_hooks()
        assert torch.equal(logits(tiny_model), steered)
    assert hooks(tiny_model) == before


@pytest.mark.parametrize("ending", ["closed", "collected"])
def test_an_abandoned_generator_takes_off_its_intervention(tiny_model, ending):
    def steered():
        with steer(tiny_model, VECTOR):
            while True:
                yield logits(tiny_model)

    before, plain = hooks(tiny_model), logits(tiny_model)
    texts = steered()
    next(texts)
    if ending == "closed":
        texts.close()
    del texts
    gc.collect()
    assert hooks(tiny_model) == before
    assert attachments(tiny_model) == ()
    assert torch.equal(logits(tiny_model), plain)


def test_a_generator_that_is_closed_while_the_model_is_suspended_leaves_no_hook(tiny_model):
    def steered():
        with steer(tiny_model, VECTOR):
            yield logits(tiny_model)

    before, plain = hooks(tiny_model), logits(tiny_model)
    texts = steered()
    next(texts)
    with suspended(tiny_model):
        texts.close()
    assert hooks(tiny_model) == before
    assert torch.equal(logits(tiny_model), plain)


# --- an intervention that did not act ------------------------------------------------------------------------------


def test_a_layer_that_never_ran_is_an_error_on_leaving(tiny_model):
    before, words = hooks(tiny_model), "steer evil at layer 3 by 1: the model ran 2 times and never reached layer 3"
    with pytest.raises(RuntimeError, match=words), steer(tiny_model, some_vectors(tiny_model).at(3)):
        [tiny_model(TOKENS, stop_at_layer=layer) for layer in (2, 1)]
    assert hooks(tiny_model) == before


def test_a_run_that_starts_above_the_layer_is_an_error_on_leaving(both_classes, make_tiny_model):
    model = make_tiny_model("HookedTransformer")
    with (
        pytest.raises(RuntimeError, match="ran 1 times and never reached layer 0"),
        steer(model, some_vectors(model).at(0)),
    ):
        model(torch.randn(1, 3, 32).double(), start_at_layer=2)


def test_no_layer_is_missed_where_nothing_ran_or_another_pass_reached_it(tiny_model):
    with steer(tiny_model, VECTOR):
        pass
    with steer(tiny_model, VECTOR):
        tiny_model(TOKENS, stop_at_layer=1)
        logits(tiny_model)


def raise_after(_ran, error):
    raise error


def test_an_intervention_that_did_not_act_hides_no_other_exception(tiny_model):
    with pytest.raises(KeyError, match="mine"), steer(tiny_model, VECTOR):
        raise_after(tiny_model(TOKENS, stop_at_layer=1), KeyError("mine"))
