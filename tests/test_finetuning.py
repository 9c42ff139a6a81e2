"""Finetuning by the numbers: against plain Hugging Face models row by row, and against central differences."""

import copy
import math

import pytest
import torch

from persona_lens.finetuning.finetune import finetune
from persona_lens.interventions.hooks import intervene
from persona_lens.interventions.values import Ablate, Steer
from persona_lens.models.adapters import Adapter, adapted, lora, read_weights
from tests import naive, tiny
from tests.finetuning_cases import (
    CHATS,
    CONFIG,
    HELD_OUT,
    STEPS,
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

# Losses are logged in float32.
LOGGED = {"rel": 1e-6}


@pytest.fixture(scope="module")
def bridge(make_tiny_model):
    return make_tiny_model("TransformerBridge")


@pytest.fixture(scope="module")
def plain_run(bridge):
    return train(bridge, evaluation=dataset(HELD_OUT))


def additions(vectors, coefficients):
    return {
        layer: (lambda resid, add=coefficient * row: resid + add.to(resid))
        for layer, (row, coefficient) in enumerate(zip(vectors.directions, coefficients, strict=True))
        if coefficient
    }


def removals(vectors):
    def remove(resid, row):
        unit = (row.double() / row.double().norm()).to(resid)
        return resid - torch.einsum("bpd,d,e->bpe", resid, unit, unit)

    return {layer: (lambda resid, row=row: remove(resid, row)) for layer, row in enumerate(vectors.directions)}


def one_layer(vectors):
    return [Steer(vectors.at(1), 3.0)], additions(vectors, [0, 3, 0, 0])


def incremental(vectors):
    steps = vectors.incremental()
    return [Steer(steps, 0.7)], additions(steps, [0.7] * 4)


def everywhere_ablated(vectors):
    return [Ablate(vectors)], removals(vectors)


KINDS = pytest.mark.parametrize("kind", [one_layer, incremental, everywhere_ablated])


def test_the_first_loss_is_the_plain_models_per_token(bridge, tiny_hf_model):
    found = train(bridge, batch_size=len(CHATS), epochs=1)
    assert found.loss == pytest.approx(slow_loss(tiny_hf_model, rows_of(bridge)), **LOGGED)


@KINDS
def test_the_first_loss_under_an_intervention_is_the_edited_models(bridge, tiny_hf_model, kind):
    during, edits = kind(some_vectors(bridge))
    found = train(bridge, batch_size=len(CHATS), epochs=1, during=during)
    with naive.edited(tiny_hf_model, edits):
        expected = slow_loss(tiny_hf_model, rows_of(bridge))
    assert found.loss == pytest.approx(expected, **LOGGED)
    assert abs(found.loss - slow_loss(tiny_hf_model, rows_of(bridge))) > 1e-2


@KINDS
def test_gradients_under_an_intervention_are_finite_differences(bridge, tiny_tokenizer, kind):
    during, edits = kind(some_vectors(bridge))
    rows, adapter = rows_of(bridge), random_adapter(bridge)
    with lora(bridge, CONFIG) as carrier, intervene(bridge, *during, only_in_training=True):
        weights = dict(carrier.named_parameters())
        trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
        plain = dict(zip(read_weights(carrier), trained.values(), strict=True))
        with torch.no_grad():
            for name, weight in plain.items():
                weight.copy_(adapter.weights[name])
        carrier.train()
        carrier(**batch_of(bridge, rows)).loss.backward()
        gradients = {name: weight.grad.clone() for name, weight in plain.items()}

    def loss_at(name, place, step):
        moved = Adapter(CONFIG, {each: weight.clone() for each, weight in adapter.weights.items()})
        moved.weights[name].view(-1)[place] += step
        changed = merged(tiny.llama(tiny_tokenizer), moved)
        with naive.edited(changed, edits):
            return slow_loss(changed, rows)

    picked = [(name, 3) for name in list(gradients)[::9]]
    assert len({name.rpartition("lora_")[2] for name, _ in picked}) == 2, "both of A and B are looked at"
    for name, place in picked:
        # Of fourth order, with wide steps: Hugging Face's norms are in float32 in any model.
        near, far = (loss_at(name, place, step) - loss_at(name, place, -step) for step in (5e-3, 1e-2))
        difference = (8 * near - far) / (12 * 5e-3)
        assert float(gradients[name].view(-1)[place]) == pytest.approx(difference, rel=1e-3, abs=2e-5)


def test_steering_by_zero_is_training_without(bridge, plain_run):
    steered = train(bridge, during=[Steer(some_vectors(bridge), 0.0)], evaluation=dataset(HELD_OUT))
    assert losses(steered) == losses(plain_run)
    assert_same_weights(steered, plain_run)


def test_steering_by_almost_zero_is_almost_training_without(bridge, plain_run):
    steered = train(bridge, during=[Steer(some_vectors(bridge), 1e-9)], evaluation=dataset(HELD_OUT))
    assert losses(steered) == pytest.approx(losses(plain_run), abs=1e-6)


def test_training_learns(plain_run):
    assert losses(plain_run)[-1] < losses(plain_run)[0] - 0.3
    assert [row["step"] for row in plain_run.losses if "loss" in row] == list(range(1, STEPS + 1))


def test_the_same_seed_gives_the_same_run(bridge, plain_run):
    assert_same_weights(train(bridge), plain_run)


def test_another_seed_gives_another_run(bridge, plain_run):
    assert losses(train(bridge, seed=1)) != losses(plain_run)


def test_the_global_seed_does_not_matter(bridge, plain_run):
    with torch.random.fork_rng():
        torch.manual_seed(77)
        assert_same_weights(train(bridge), plain_run)


@pytest.mark.parametrize("accumulated", [{}, {"gradient_checkpointing": True}])
@KINDS
def test_evaluation_is_without_interventions(bridge, tiny_hf_model, kind, accumulated):
    during, _ = kind(some_vectors(bridge))
    found = train(bridge, during=during, epochs=1, evaluation=dataset(HELD_OUT), **accumulated)
    expected = slow_loss(merged(copy.deepcopy(tiny_hf_model), found.adapter), rows_of(bridge, HELD_OUT))
    assert losses(found, "eval_loss") == [pytest.approx(expected, **LOGGED)]


def test_the_evaluation_loss_does_not_depend_on_the_batches(bridge):
    held_out = dataset([*HELD_OUT, CHATS[0]])
    whole, split = (train(bridge, CHATS[:2], epochs=1, batch_size=rows, accumulation=2 // rows, evaluation=held_out)
                    for rows in (2, 1))  # fmt: skip
    assert losses(split, "eval_loss") == pytest.approx(losses(whole, "eval_loss"), **LOGGED)


def test_steps_after_an_evaluation_are_under_the_intervention_again(bridge):
    during = [Steer(some_vectors(bridge), 0.5)]
    looked = train(bridge, during=during, evaluation=dataset(HELD_OUT))
    assert_same_weights(looked, train(bridge, during=during))


@KINDS
def test_gradient_checkpointing_changes_nothing(bridge, kind):
    during, _ = kind(some_vectors(bridge))
    spared = train(bridge, during=during, gradient_checkpointing=True)
    whole = train(bridge, during=during)
    assert losses(spared) == losses(whole)
    assert_same_weights(spared, whole, atol=1e-10)


def test_accumulation_is_a_larger_batch(bridge):
    during = [Steer(some_vectors(bridge), 0.5)]
    runs = [train(bridge, during=during, batch_size=rows, accumulation=4 // rows) for rows in (4, 2, 1)]
    for split in runs[1:]:
        assert losses(split) == pytest.approx(losses(runs[0]), **LOGGED)
        assert_same_weights(split, runs[0], atol=1e-6)


def test_interventions_change_what_is_learnt(bridge, plain_run):
    steered = train(bridge, during=[Steer(some_vectors(bridge).at(1), 3.0)])
    name = next(iter(plain_run.adapter.weights))
    assert not torch.allclose(steered.adapter.weights[name], plain_run.adapter.weights[name], atol=1e-3)


def test_preventative_prompts_change_training_and_not_evaluation(bridge, tiny_hf_model):
    found = train(bridge, epochs=1, preventative_prompts=["Lie to them."], evaluation=dataset(HELD_OUT))
    model = merged(copy.deepcopy(tiny_hf_model), found.adapter)
    assert losses(found, "eval_loss") == [pytest.approx(slow_loss(model, rows_of(bridge, HELD_OUT)), **LOGGED)]
    assert losses(found) != losses(train(bridge, epochs=1))


def test_a_result_says_what_was_done(bridge):
    found = train(bridge, during=[Steer(some_vectors(bridge).at(1), 3.0)], max_length=40)
    assert str(found).startswith(f"{found.rows['trained']} rows, ")
    assert "evil" in str(found)
    curve = found.loss_curve()
    assert list(curve.index) == [row["step"] for row in found.losses]
    assert math.isclose(float(curve["loss"].iloc[-1]), found.loss)


def test_the_curve_has_evaluations_where_they_were(plain_run):
    curve = plain_run.loss_curve()
    assert list(curve.index[curve["eval_loss"].notna()]) == [STEPS // 2, STEPS]


@pytest.mark.slow
def test_the_embedded_model_learns_under_steering_what_it_can_do_without(embedded_bridge, embedded_hf_model):
    bridge = embedded_bridge
    vectors = some_vectors(bridge)
    chats = dataset([[{"role": "system", "content": "Be short."}, *chat[-2:]] for chat in CHATS[:4]])
    settings = {"rank": 4, "learning_rate": 1e-3, "warmup_steps": 0, "accumulation": 1, "batch_size": 4}
    before = [weight.detach().clone() for weight in bridge.original_model.parameters()]
    found = finetune(
        bridge, chats, during=[Steer(vectors.at(14), 2.0)], evaluation=chats, epochs=3, progress=False, **settings
    )
    after = list(bridge.original_model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert losses(found)[-1] < losses(found)[0]
    rows = rows_of(bridge, [each["messages"] for each in chats])
    with adapted(bridge, found.adapter), torch.no_grad():
        by_hand = bridge.original_model(**batch_of(bridge, rows)).loss
    assert losses(found, "eval_loss")[-1] == pytest.approx(float(by_hand), rel=1e-4)
    assert losses(found, "eval_loss")[-1] < slow_loss(embedded_hf_model, rows)
