"""The projection penalty: its formula by hand, its gradient by central differences, and what it does to training."""

import copy

import pytest
import torch

from persona_lens.activations.means import projected_residuals
from persona_lens.finetuning.trainer import ProjectionPenalty, penalised, projection_change
from persona_lens.models.adapters import Adapter, adapted, lora, read_weights
from tests import naive, tiny
from tests.finetuning_cases import (
    CHATS,
    CONFIG,
    HELD_OUT,
    assert_same_weights,
    batch_of,
    dataset,
    losses,
    merged,
    random_adapter,
    rows_of,
    slow_loss,
    train,
)
from tests.intervention_cases import some_vectors
from tests.vector_cases import random_tensor

LOGGED = {"rel": 1e-6}


@pytest.fixture(scope="module")
def bridge(make_tiny_model):
    return make_tiny_model("TransformerBridge")


@pytest.fixture(scope="module")
def vectors(bridge):
    return some_vectors(bridge)


def slow_change(base, changed, rows, vectors):
    """Every token of every row by itself, without padding."""
    squares = []
    for row in rows:
        before, after = (naive.residual_stream(model, list(row.tokens)) for model in (base, changed))
        for vector in vectors:
            unit = vector.direction.double() / vector.direction.double().norm()
            squares += [float((one - other) @ unit) ** 2 for one, other in zip(
                after[vector.layer + 1], before[vector.layer + 1], strict=True)]  # fmt: skip
    return sum(squares) / len(squares)


def each(vectors):
    return ProjectionPenalty(vectors, 1.0).each


def test_the_change_is_the_mean_square_over_tokens_that_are_there():
    before, after = random_tensor(2, 3, 2, seed=1), random_tensor(2, 3, 2, seed=2)
    attended = torch.tensor([[True, True, True], [True, False, False]])
    kept = [(after - before)[row, place] for row, place in ((0, 0), (0, 1), (0, 2), (1, 0))]
    expected = torch.stack(kept).square().mean()
    torch.testing.assert_close(projection_change(before, after, attended), expected)


@pytest.mark.parametrize("which", ["one", "all"])
def test_the_penalised_loss_is_the_formula_by_hand(bridge, tiny_hf_model, vectors, which):
    given = vectors.at(1) if which == "one" else vectors
    adapter, rows = random_adapter(bridge), rows_of(bridge)
    found = _penalised(bridge, adapter, rows, given, 0.7)[0]
    changed = merged(copy.deepcopy(tiny_hf_model), adapter)
    change = slow_change(tiny_hf_model, changed, rows, each(given))
    assert change > 0.01
    assert found == pytest.approx(slow_loss(changed, rows) + 0.7 * change, rel=1e-5)


def _penalised(bridge, adapter, rows, vectors, weight):
    """The penalised loss and its gradients."""
    batch = batch_of(bridge, rows)
    with lora(bridge, CONFIG) as carrier, projected_residuals(bridge, each(vectors)) as projections:
        trained = [value for value in carrier.parameters() if value.requires_grad]
        plain = dict(zip(read_weights(carrier), trained, strict=True))
        with torch.no_grad():
            for name, value in plain.items():
                value.copy_(adapter.weights[name])
        carrier.train()
        loss = penalised(carrier(**batch).loss, carrier, batch, projections, weight)
        assert carrier.training
        loss.backward()
        return float(loss.detach()), {name: value.grad.clone() for name, value in plain.items()}


def test_its_gradient_is_that_of_finite_differences(bridge, tiny_hf_model, tiny_tokenizer, vectors):
    adapter, rows = random_adapter(bridge), rows_of(bridge, CHATS[:3])
    _, gradients = _penalised(bridge, adapter, rows, vectors, 2.0)

    def loss_at(name, place, step):
        moved = Adapter(CONFIG, {key: value.clone() for key, value in adapter.weights.items()})
        moved.weights[name].view(-1)[place] += step
        changed = merged(tiny.llama(tiny_tokenizer), moved)
        return slow_loss(changed, rows) + 2.0 * slow_change(tiny_hf_model, changed, rows, each(vectors))

    for name in list(gradients)[::11]:
        near, far = (loss_at(name, 3, step) - loss_at(name, 3, -step) for step in (5e-3, 1e-2))
        difference = (8 * near - far) / (12 * 5e-3)
        assert float(gradients[name].view(-1)[3]) == pytest.approx(difference, rel=1e-3, abs=2e-5)


def test_the_first_loss_is_the_one_without_it(bridge, vectors):
    """Before the first step the adapter changes nothing."""
    found, free = (train(bridge, epochs=1, penalty=penalty) for penalty in (ProjectionPenalty(vectors, 1.0), None))
    assert losses(found)[0] == pytest.approx(losses(free)[0], **LOGGED)
    assert losses(found)[1:] != losses(free)[1:]


def test_evaluation_is_without_it(bridge, tiny_hf_model, vectors):
    found = train(bridge, penalty=ProjectionPenalty(vectors, 5.0), evaluation=dataset(HELD_OUT))
    expected = slow_loss(merged(copy.deepcopy(tiny_hf_model), found.adapter), rows_of(bridge, HELD_OUT))
    assert losses(found, "eval_loss")[-1] == pytest.approx(expected, **LOGGED)


def test_a_larger_weight_holds_projections_closer(bridge, tiny_hf_model, vectors):
    changes = []
    for penalty in (None, ProjectionPenalty(vectors.at(2), 0.03), ProjectionPenalty(vectors.at(2), 3.0)):
        adapter = train(bridge, epochs=6, learning_rate=3e-3, penalty=penalty).adapter
        changed = merged(copy.deepcopy(tiny_hf_model), adapter)
        changes.append(slow_change(tiny_hf_model, changed, rows_of(bridge), [vectors.at(2)]))
    assert changes[0] > 2 * changes[1] > 20 * changes[2]


def test_accumulated_batches_of_equal_length_are_one_batch(bridge, vectors):
    settings = {"penalty": ProjectionPenalty(vectors, 0.5), "chats": [CHATS[0]] * 4, "epochs": 3}
    whole = train(bridge, batch_size=4, **settings)
    split = train(bridge, batch_size=1, accumulation=4, **settings)
    assert losses(split) == pytest.approx(losses(whole), **LOGGED)
    assert_same_weights(split, whole, rtol=0, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(bridge, vectors):
    penalty = ProjectionPenalty(vectors, 0.5)
    spared, whole = (train(bridge, penalty=penalty, gradient_checkpointing=on) for on in (True, False))
    assert losses(spared) == pytest.approx(losses(whole), **LOGGED)
    assert_same_weights(spared, whole, rtol=0, atol=1e-8)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive_is_refused(vectors, weight):
    with pytest.raises(ValueError, match="The weight of a penalty is positive, got"):
        ProjectionPenalty(vectors, weight)


def test_a_vector_of_another_width_is_refused(bridge, tmp_path):
    from dataclasses import replace

    wide = replace(some_vectors(bridge).at(1), direction=torch.ones(33))
    with pytest.raises(ValueError, match="33"):
        train(bridge, penalty=ProjectionPenalty(wide, 1.0), output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_it_says_what_it_is(vectors):
    assert str(ProjectionPenalty(vectors.at(1), 0.5)) == "penalty of 0.5 on the projection change of evil, layer 1"
    assert str(ProjectionPenalty(vectors, 2)) == "penalty of 2 on the projection change of evil, 4 layers"


@pytest.mark.slow
def test_it_holds_projections_of_the_embedded_model(embedded_bridge):
    bridge = embedded_bridge
    vector = some_vectors(bridge).at(14)
    batch = batch_of(bridge, rows_of(bridge, CHATS[:2]))

    def along(adapter):
        with projected_residuals(bridge, [vector]) as found, torch.no_grad():
            if adapter is None:
                bridge.original_model(**batch)
                return found.read()
            with adapted(bridge, adapter):
                bridge.original_model(**batch)
                return found.read()

    settings = {"chats": CHATS[:2], "epochs": 6, "learning_rate": 1e-3, "rank": 2}
    free, held = (
        train(bridge, penalty=penalty, **settings).adapter for penalty in (None, ProjectionPenalty(vector, 10))
    )
    before, attended = along(None), batch["attention_mask"].bool()
    changes = [float(projection_change(before, along(adapter), attended)) for adapter in (free, held)]
    assert 0 < 2 * changes[1] < changes[0]


def test_a_penalty_beside_interventions_is_refused(bridge, vectors):
    from persona_lens.interventions.values import Steer

    with pytest.raises(ValueError, match="pass penalty= or during=, not both"):
        train(bridge, during=[Steer(vectors, 1.0)], penalty=ProjectionPenalty(vectors, 1.0))


def test_dropout_of_the_base_model_does_not_count_as_a_change(bridge, vectors):
    dropouts = [each for each in bridge.original_model.modules() if isinstance(each, torch.nn.Embedding)]

    def drop(module, arguments, output):
        return torch.nn.functional.dropout(output, 0.5, module.training)

    batch, handle = batch_of(bridge, rows_of(bridge)), dropouts[0].register_forward_hook(drop)
    try:
        with lora(bridge, CONFIG) as carrier, projected_residuals(bridge, each(vectors)) as projections:
            carrier.eval()
            with torch.no_grad():
                loss = carrier(**batch).loss
                carrier.train()
                assert float(penalised(loss, carrier, batch, projections, 5.0)) == pytest.approx(float(loss), abs=1e-6)
    finally:
        handle.remove()
        bridge.original_model.eval()
