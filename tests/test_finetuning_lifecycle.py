"""What finetuning leaves behind, which is nothing, and what it refuses, before or while it trains."""

import copy
import math
import os
import sys

import pytest
import torch

from persona_lens.finetuning import training
from persona_lens.finetuning.finetune import finetune
from persona_lens.finetuning.trainer import ProjectionPenalty, TrainingDiverged
from persona_lens.interventions.values import Ablate, Steer
from persona_lens.models.adapters import adapted, lora
from tests.conftest import has_hooked_transformer
from tests.finetuning_cases import (
    CHATS,
    HELD_OUT,
    Interrupted,
    dataset,
    generators,
    losses,
    random_adapter,
    state_of,
    train,
)
from tests.intervention_cases import logits, some_vectors


@pytest.fixture(scope="module")
def bridge(make_tiny_model):
    model = make_tiny_model("TransformerBridge")
    logits(model)  # the first pass of a bridge attaches hooks of its own
    return model


@pytest.fixture(scope="module")
def adapter(bridge):
    return random_adapter(bridge)


@pytest.fixture(autouse=True)
def nothing_is_left(bridge, adapter, shapes_unchecked):
    """Of any run below, whether it ended well or not; checkers of types draw from the global generator."""
    state, drawn, outputs, environment = state_of(bridge), generators(), logits(bridge), environment_now()
    yield
    after = state_of(bridge)
    assert {name for name in state.keys() | after.keys() if state.get(name) != after.get(name)} == set()
    assert generators() == drawn
    assert torch.equal(logits(bridge), outputs)
    assert environment_now() == environment


def environment_now():
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


@pytest.fixture(params=["interventions", "penalty"])
def everything(bridge, request):
    vectors = some_vectors(bridge)
    held = {
        "interventions": {"during": [Steer(vectors.at(1), 1.0), Ablate(vectors)]},
        "penalty": {"penalty": ProjectionPenalty(vectors, 0.1)},
    }
    return {
        **held[request.param],
        "evaluation": dataset(HELD_OUT),
        "gradient_checkpointing": True,
        "dropout": 0.1,
    }


def test_a_whole_run_leaves_nothing_behind(bridge, everything):
    assert train(bridge, **everything).rows == {"trained": 6, "cut": 0, "dropped": 0}


def test_a_model_in_training_stays_in_training(bridge):
    bridge.original_model.train()
    bridge.blocks[1].eval()
    before = state_of(bridge)
    train(bridge, epochs=1)
    assert state_of(bridge) == before
    bridge.original_model.eval()


def test_weights_that_train_still_train(bridge):
    for number, weight in enumerate(bridge.original_model.parameters()):
        weight.requires_grad_(number % 3 == 0)
    before = state_of(bridge)
    train(bridge, epochs=1)
    assert state_of(bridge) == before
    bridge.original_model.requires_grad_(True)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()])
@pytest.mark.parametrize("at", [1, 4])
def test_an_interrupted_run_leaves_nothing_behind(bridge, everything, tmp_path, error, at):
    with pytest.raises(type(error)), Interrupted(bridge, at, error):
        train(bridge, output=tmp_path, **everything)


def test_a_run_interrupted_while_it_evaluates_leaves_nothing_behind(bridge, everything, monkeypatch):
    monkeypatch.setattr(training.Trainer, "evaluation_loop", lambda *_, **__: sys.exit("stopped"))
    with pytest.raises(SystemExit):
        train(bridge, **everything)


def test_steering_into_the_void_stops_with_a_sentence(bridge):
    with pytest.raises(TrainingDiverged, match=r"The loss is nan at step 1: lower learning_rate, a coefficient or"):
        train(bridge, during=[Steer(some_vectors(bridge), 1e300)])


def test_a_run_that_diverges_stops_and_writes_no_adapter(bridge, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"The (loss|grad_norm) is (nan|inf) at step \d"):
        train(bridge, learning_rate=1e38, output=tmp_path, epochs=10)
    assert not (tmp_path / "finetuning.json").exists()


def test_an_evaluation_that_is_no_number_stops_it(bridge, monkeypatch):
    monkeypatch.setattr(training.Trainer, "_evaluated", [], raising=False)
    whole = training.Trainer.evaluation_loop

    def broken(self, *args, **kwargs):
        found = whole(self, *args, **kwargs)
        found.metrics["eval_loss"] = math.nan
        return found

    monkeypatch.setattr(training.Trainer, "evaluation_loop", broken)
    with pytest.raises(TrainingDiverged, match="The eval_loss is nan at step 3"):
        train(bridge, evaluation=dataset(HELD_OUT))


def test_an_intervention_on_another_copy_is_an_error_in_the_first_step(bridge, make_tiny_model, monkeypatch):
    other = make_tiny_model("TransformerBridge")
    steps = []

    def elsewhere(_model, config):
        return lora(other, config)

    monkeypatch.setattr(training, "lora", elsewhere)
    monkeypatch.setattr(torch.optim.AdamW, "step", _counting(torch.optim.AdamW.step, steps))
    with pytest.raises(RuntimeError, match="the first step of training never reached its layers"):
        train(bridge, during=[Steer(some_vectors(bridge).at(1), 1.0)])
    assert len(steps) == 1


def _counting(step, steps):
    def counted(self, *args, **kwargs):
        steps.append(1)
        return step(self, *args, **kwargs)

    return counted


def test_a_target_that_is_absent_is_refused_before_anything_is_written(bridge, tmp_path):
    message = (
        r"^The model runs no linear module 'c_attn': pass targets of this architecture, which has down_proj, "
        r"gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj\.$"
    )
    with pytest.raises(ValueError, match=message):
        train(bridge, targets=["q_proj", "c_attn"], output=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("targets", [[], "", "q_proj"])
def test_targets_that_mean_nothing_are_refused(bridge, targets):
    with pytest.raises(ValueError, match=r"name at least one target|runs no linear module"):
        train(bridge, targets=targets)


def test_a_vector_of_another_model_is_refused_before_anything_is_written(bridge, tiny_tokenizer, tmp_path):
    from dataclasses import replace

    vectors = some_vectors(bridge)
    wide = replace(vectors.at(1), direction=torch.ones(33))
    with pytest.raises(ValueError, match="33"):
        train(bridge, during=[Steer(wide, 1.0)], output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_hooked_transformer_is_refused_before_the_dataset_is_read(make_tiny_model):
    if not has_hooked_transformer():
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    model = make_tiny_model("HookedTransformer")
    with pytest.raises(ValueError, match=r"needs a TransformerBridge.*got HookedTransformer: load the model with"):
        finetune(model, "no such file.jsonl")


def test_a_model_that_carries_an_adapter_is_refused(bridge, adapter):
    with adapted(bridge, adapter), pytest.raises(ValueError, match="carries an adapter already"):
        train(bridge)


def test_results_do_not_share_memory_with_the_model(bridge):
    found = train(bridge, epochs=1)
    kept = copy.deepcopy(found.adapter.weights)
    train(bridge, CHATS[:2], seed=3)
    assert all(torch.equal(value, kept[name]) for name, value in found.adapter.weights.items())


def test_progress_is_shown_on_standard_error_alone(bridge, capsys):
    train(bridge, epochs=1, progress=True, evaluation=dataset(HELD_OUT))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "training: 100%" in printed.err


def test_without_progress_nothing_is_shown(bridge, capfd):
    assert losses(train(bridge, epochs=1))
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
