"""Interventions that act in training alone, whoever trains the model."""

import pytest
import torch

from persona_lens.interventions.hooks import attachments, intervene
from persona_lens.interventions.values import Cap, Steer
from persona_lens.models.structure import suspended
from tests import naive
from tests.intervention_cases import EXACT, IDS, TOKENS, hooks, logits, some_vectors


@pytest.fixture
def model(make_tiny_model, model_class):
    return make_tiny_model(model_class)


@pytest.fixture
def steer(model):
    return Steer(some_vectors(model).at(1), 3.0)


@pytest.fixture
def bridge(make_tiny_model):
    return make_tiny_model("TransformerBridge")


def test_passes_in_evaluation_mode_are_left_alone(model, steer):
    expected = logits(model.eval())
    with intervene(model, steer, only_in_training=True):
        assert torch.equal(logits(model), expected)


def test_passes_in_training_mode_are_steered(model, steer, tiny_hf_model):
    with naive.added(tiny_hf_model, 1, 3.0 * steer.vectors.direction.double()):
        expected = naive.logits(tiny_hf_model, IDS[0])
    with intervene(model.train(), steer, only_in_training=True), torch.no_grad():
        found = model(TOKENS)[0]
    torch.testing.assert_close(found.log_softmax(dim=-1), expected.to(found).log_softmax(dim=-1), rtol=0, atol=1e-5)


def test_the_mode_of_each_pass_decides(model, steer):
    free = logits(model.eval())
    with intervene(model, steer, only_in_training=True):
        found = [logits(model.train(mode)) for mode in (True, False, True, False)]
    assert torch.equal(found[1], free)
    assert torch.equal(found[3], free)
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], free)


def test_without_it_the_mode_does_not_matter(model, steer):
    with intervene(model, steer):
        assert torch.equal(logits(model.train()), logits(model.eval()))


def test_the_mode_of_the_hugging_face_model_inside_decides(bridge, steer):
    """A trainer has the model inside, and does not know the bridge."""
    inside = bridge.original_model
    free = logits(bridge)
    with intervene(bridge, steer, only_in_training=True), torch.no_grad():
        inside.train()
        trained = inside(TOKENS).logits
        inside.eval()
        assert torch.equal(inside(TOKENS).logits, free)
    with intervene(bridge, steer), torch.no_grad():
        torch.testing.assert_close(inside(TOKENS).logits, trained, **EXACT)


def test_where_only_evaluation_ran_no_absence_is_reported(model, steer):
    with intervene(model.eval(), steer, only_in_training=True) as attachment:
        logits(model)
    assert (attachment.passes, attachment.ran) == (0, set())


def test_training_passes_alone_are_counted(model, steer):
    with intervene(model, steer, only_in_training=True) as attachment:
        for mode in (True, False, True, False, False):
            logits(model.train(mode))
        assert attachment.passes == 2


def test_training_that_never_reaches_the_layer_is_an_error(model):
    late = Steer(some_vectors(model).at(3), 1.0)
    with (
        pytest.raises(RuntimeError, match="the model ran 1 times and never reached layer 3"),
        intervene(model.train(), late, only_in_training=True),
        torch.no_grad(),
    ):
        model(TOKENS, stop_at_layer=2)


def test_evaluation_that_never_reaches_the_layer_is_none(model):
    late = Steer(some_vectors(model).at(3), 1.0)
    with intervene(model.eval(), late, only_in_training=True), torch.no_grad():
        model(TOKENS, stop_at_layer=2)


def test_suspended_it_does_not_act_in_training_either(model, steer):
    free = logits(model.train())
    with intervene(model, steer, only_in_training=True) as attachment:
        assert attachments(model) == (attachment,)
        with suspended(model):
            assert attachments(model) == ()
            assert torch.equal(logits(model), free)
        assert not torch.equal(logits(model), free)
    assert attachment.passes == 1


def test_inside_another_the_other_acts_always(model, steer):
    vectors = some_vectors(model, seed=5)
    outer = Cap(vectors.at(2), maximum=0.0)
    with intervene(model, outer):
        expected = logits(model.eval())
        with intervene(model, steer, only_in_training=True):
            assert torch.equal(logits(model), expected)
            assert not torch.equal(logits(model.train()), expected)


def test_no_hook_stays(model, steer):
    before = hooks(model)
    with pytest.raises(KeyboardInterrupt), intervene(model, steer, only_in_training=True):
        raise KeyboardInterrupt
    assert hooks(model) == before


def test_positions_are_those_of_training_passes(model, steer):
    with intervene(model.train(), steer, at="response", prompt_lengths=[3, 4], only_in_training=True):
        trained = logits(model)
        logits(model.eval())
        assert torch.equal(logits(model.train()), trained)
    with intervene(model, steer, at="response", prompt_lengths=[3, 4]):
        assert torch.equal(logits(model), trained)


def test_evaluation_passes_of_other_batches_need_no_positions(model, steer):
    """What does not act asks for no positions, which an evaluation's other batches would not fit."""
    with intervene(model.eval(), steer, at="response", prompt_lengths=[3, 4], only_in_training=True):
        assert logits(model, TOKENS[:1]).shape[0] == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_it(bridge, steer, checkpointing):
    inside = bridge.original_model
    if checkpointing:
        inside.activation_checkpointing_enable() if hasattr(
            inside, "activation_checkpointing_enable"
        ) else inside.gradient_checkpointing_enable()
    weight = inside.get_parameter("model.embed_tokens._original_component.weight")
    gradients = []
    for context in (intervene(bridge, steer, only_in_training=True), intervene(bridge, steer)):
        with context:
            inside.train()
            inside(TOKENS, labels=TOKENS).loss.backward()
        gradients.append(weight.grad.clone())
        weight.grad = None
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)
