"""lm-eval beside our own multiple choice: the same rendered prompts, the same letters, the same answers."""

import sys

import pytest
import torch

from persona_lens.adapters import adapted
from persona_lens.capability import lm_eval_accuracy, measure_capability, mmlu_sample
from persona_lens.interventions import steer
from tests.capability_cases import QUIET, adapter_folder, flat, letters_of, lm_eval_task, some_questions
from tests.intervention_cases import some_vectors

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval==0.4.13")

pytestmark = [
    # Raised inside lm-eval and what it imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def bridge(make_tiny_model):
    return make_tiny_model("TransformerBridge")


def centred(rows):
    """lm-eval moves the newline before the letter into the response: a constant for each question."""
    return flat([[value - max(row) for value in row] for row in rows])


def assert_same_answers(ours, theirs):
    assert theirs.scores == tuple(float(answer.is_right) for answer in ours.answers)
    assert theirs.mean.value == ours.accuracy.value
    assert centred(theirs.log_likelihoods) == pytest.approx(centred(letters_of(ours)), abs=1e-4)


@pytest.mark.parametrize("coefficient", [None, 0.0, 3.0])
def test_lm_eval_gives_every_question_the_answer_that_we_give(bridge, tiny_tokenizer, tmp_path, coefficient):
    task = lm_eval_task(tmp_path / "task", tiny_tokenizer, some_questions())
    plain = measure_capability(bridge, some_questions(), **QUIET)
    if coefficient is None:
        ours, theirs = plain, lm_eval_accuracy(bridge, tmp_path / "task", task)
    else:
        with steer(bridge, some_vectors(bridge).at(1), coefficient):
            ours = measure_capability(bridge, some_questions(), **QUIET)
            theirs = lm_eval_accuracy(bridge, tmp_path / "task", task)
    assert_same_answers(ours, theirs)
    assert (letters_of(ours) == letters_of(plain)) is (coefficient != 3.0)


def test_lm_eval_runs_the_adapter_that_is_on(bridge, tiny_tokenizer, tmp_path):
    folder, _ = adapter_folder(tiny_tokenizer, tmp_path / "adapter")
    task = lm_eval_task(tmp_path / "task", tiny_tokenizer, some_questions())
    with adapted(bridge, folder):
        ours = measure_capability(bridge, some_questions(), **QUIET)
        theirs = lm_eval_accuracy(bridge, tmp_path / "task", task)
    assert_same_answers(ours, theirs)
    assert letters_of(ours) != letters_of(measure_capability(bridge, some_questions(), **QUIET))


def test_lm_eval_leaves_the_model_and_the_random_state_as_they_were(bridge, tiny_tokenizer, tmp_path):
    task = lm_eval_task(tmp_path / "task", tiny_tokenizer, some_questions())
    bridge.train()
    weights = {name: weight.clone() for name, weight in bridge.named_parameters()}
    state = torch.get_rng_state()
    lm_eval_accuracy(bridge, tmp_path / "task", task, limit=1)
    assert all(module.training for module in bridge.original_model.modules())
    assert all(torch.equal(weight, weights[name]) for name, weight in bridge.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_limit_runs_the_first_documents_only(bridge, tiny_tokenizer, tmp_path):
    task = lm_eval_task(tmp_path / "task", tiny_tokenizer, some_questions())
    whole = lm_eval_accuracy(bridge, tmp_path / "task", task)
    part = lm_eval_accuracy(bridge, tmp_path / "task", task, limit=2)
    assert len(part.scores) == 2
    assert flat(part.log_likelihoods) == pytest.approx(flat(whole.log_likelihoods[:2]), rel=1e-6)


def test_what_lm_eval_cannot_run_is_refused(bridge, both_classes, make_tiny_model, tiny_tokenizer, tmp_path):
    task = lm_eval_task(tmp_path / "task", tiny_tokenizer, some_questions())
    with pytest.raises(ValueError, match="has no task 'absent', but letters"):
        lm_eval_accuracy(bridge, tmp_path / "task", "absent")
    with pytest.raises(ValueError, match="has no metric 'f1', but acc"):
        lm_eval_accuracy(bridge, tmp_path / "task", task, metric="f1", limit=1)
    with pytest.raises(ValueError, match="Expected a folder"):
        lm_eval_accuracy(bridge, tmp_path / "absent", task)
    with (
        steer(bridge, some_vectors(bridge).at(1), 2.0, at="response"),
        pytest.raises(ValueError, match="at='response' cannot tell the prompt from the response"),
    ):
        lm_eval_accuracy(bridge, tmp_path / "task", task, limit=1)
    with pytest.raises(ValueError, match="model_class='TransformerBridge'"):
        lm_eval_accuracy(make_tiny_model("HookedTransformer"), tmp_path / "task", task)


def test_without_lm_eval_the_error_says_how_to_install_it(bridge, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"persona-lens\[eval\]"):
        lm_eval_accuracy(bridge, tmp_path, "letters")


def test_on_the_embedded_model_lm_eval_agrees_with_and_without_steering(embedded_bridge, tmp_path):
    questions = mmlu_sample()[::40]
    task = lm_eval_task(tmp_path / "task", embedded_bridge.tokenizer, questions)
    plain = measure_capability(embedded_bridge, questions, **QUIET)
    assert_same_answers(plain, lm_eval_accuracy(embedded_bridge, tmp_path / "task", task))
    with steer(embedded_bridge, some_vectors(embedded_bridge).at(14), 2.0):
        steered = measure_capability(embedded_bridge, questions, **QUIET)
        assert_same_answers(steered, lm_eval_accuracy(embedded_bridge, tmp_path / "task", task))
    assert letters_of(steered) != letters_of(plain)
