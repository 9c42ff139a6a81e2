"""Capability against the obvious way: every letter and text by itself, one row, on the plain Hugging Face model."""

from typing import Any

import pytest
import torch
from tokenizers import normalizers

from persona_lens.chat.batches import Conversation
from persona_lens.evaluation.capability import measure_capability
from persona_lens.evaluation.capability_result import Question, mmlu_sample
from persona_lens.interventions.hooks import steer
from persona_lens.interventions.values import Ablate, Steer
from persona_lens.models.adapters import adapted
from tests.capability_cases import (
    QUIET,
    TEXTS,
    adapter_folder,
    flat,
    letters_of,
    likelihoods_of,
    slow_letters,
    slow_texts,
    some_questions,
)
from tests.chat_cases import with_template
from tests.intervention_cases import some_vectors

# PEFT asks transformers 5.23 by an old name.
OLD_NAME = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CLOSE = 1e-5  # a text's likelihood is float32


@pytest.fixture(params=["llama", "gpt2"])
def pair(request, tiny_model, tiny_gpt2, tiny_hf_model, tiny_hf_gpt2):
    """A tiny model and the plain Hugging Face model of equal weights, for each architecture."""
    return (tiny_model, tiny_hf_model) if request.param == "llama" else (tiny_gpt2, tiny_hf_gpt2)


def measured(model, questions=None, texts=TEXTS, **parts):
    questions = some_questions() if questions is None else questions
    return measure_capability(model, questions, texts=texts, **QUIET, **parts)


def assert_as_slow(found, hf_model, tokenizer, additions=None, at="all"):
    expected = slow_letters(hf_model, tokenizer, additions, at)
    assert flat(letters_of(found)) == pytest.approx(flat(expected), abs=CLOSE)
    assert likelihoods_of(found) == pytest.approx(slow_texts(hf_model, tokenizer, additions, at), abs=CLOSE)


def test_letters_and_texts_have_the_likelihoods_of_one_row_at_a_time(pair, tiny_tokenizer):
    model, hf_model = pair
    assert_as_slow(measured(model), hf_model, tiny_tokenizer)


@pytest.mark.parametrize("token_budget", [1, 150, 100_000])
def test_batches_and_order_change_nothing(tiny_model, token_budget):
    expected = letters_of(measured(tiny_model))
    found = measured(tiny_model, some_questions()[::-1], token_budget=token_budget)
    assert flat(letters_of(found)[::-1]) == pytest.approx(flat(expected), abs=1e-9)


def test_a_letter_of_several_tokens_counts_as_a_whole(tiny_model, tiny_hf_model, tiny_tokenizer, monkeypatch):
    tokenizer = with_template(tiny_tokenizer, tiny_tokenizer.chat_template)
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("zz")
    assert len(tokenizer("A", add_special_tokens=False).input_ids) > 1
    monkeypatch.setattr(tiny_model, "_tokenizer" if "_tokenizer" in vars(tiny_model) else "tokenizer", tokenizer)
    assert_as_slow(measured(tiny_model), tiny_hf_model, tokenizer)


def test_a_conversation_is_a_text_and_an_empty_answer_is_missing(tiny_model):
    spoken = Conversation.from_messages(
        [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": TEXTS[0][0]},
            {"role": "assistant", "content": TEXTS[0][1]},
        ]
    )
    found = measured(tiny_model, (), [TEXTS[0], spoken, ("Why?", " ")])
    first, second, third = likelihoods_of(found)
    assert (first, third) == (second, None)
    assert (found.nll.n, found.summary()["texts_without_response"]) == (2, 1)
    assert found.accuracy == (None, None, None, 0)


@pytest.mark.parametrize("at", ["all", "response", "prompt"])
def test_steering_acts_on_the_tokens_that_it_names(pair, tiny_tokenizer, at):
    model, hf_model = pair
    vector = some_vectors(model).at(1)
    found = measured(model, interventions=[Steer(vector, 2.0)], at=at)
    assert_as_slow(found, hf_model, tiny_tokenizer, {1: 2.0 * vector.direction}, at)
    plain, idle = measured(model), measured(model, interventions=[Steer(vector, 0.0)], at=at)
    assert letters_of(found) != letters_of(plain) == letters_of(idle)
    assert letters_of(measured(model, system_prompt="Be short.")) != letters_of(plain)


@pytest.mark.parametrize("at", ["all", "response", "prompt"])
def test_a_context_around_the_call_acts_as_the_argument_does(tiny_model, at):
    vector = some_vectors(tiny_model).at(2)
    with steer(tiny_model, vector, -1.5, at=at):
        around = measured(tiny_model)
    given = measured(tiny_model, interventions=[Steer(vector, -1.5)], at=at)
    assert around == given
    assert f"at {at}" in given.interventions[0]


def test_a_context_around_the_call_acts_before_the_argument(tiny_model):
    vectors = some_vectors(tiny_model)
    with steer(tiny_model, vectors.at(1), 2.0):
        found = measured(tiny_model, interventions=[Ablate(vectors.at(1))], at="all")
    ablated = measured(tiny_model, interventions=[Ablate(vectors.at(1))], at="all")
    assert flat(letters_of(found)) == pytest.approx(flat(letters_of(ablated)), abs=CLOSE)
    assert len(found.interventions) == 2


@OLD_NAME
def test_an_adapter_and_steering_act_together(make_tiny_model, tiny_tokenizer, tmp_path):
    folder, with_adapter = adapter_folder(tiny_tokenizer, tmp_path / "adapter")
    model = make_tiny_model("TransformerBridge")
    vector = some_vectors(model).at(1)
    found = measured(model, adapter=folder, interventions=[Steer(vector, 2.0)])
    assert_as_slow(found, with_adapter, tiny_tokenizer, {1: 2.0 * vector.direction}, "response")
    with adapted(model, folder):
        around = measured(model, interventions=[Steer(vector, 2.0)])
    assert (around.answers, around.texts) == (found.answers, found.texts)
    assert around.adapter == "one that was on the model"
    before = measured(model)
    found = measured(model, adapter=folder)
    assert_as_slow(found, with_adapter, tiny_tokenizer)
    assert found.adapter == folder.name
    assert measured(model) == before  # it is off again
    assert letters_of(found) != letters_of(before)


@OLD_NAME
def test_a_hooked_transformer_takes_no_adapter(both_classes, make_tiny_model, tiny_tokenizer, tmp_path):
    folder, _ = adapter_folder(tiny_tokenizer, tmp_path / "adapter")
    with pytest.raises(ValueError, match="needs a TransformerBridge"):
        measured(make_tiny_model("HookedTransformer"), adapter=folder)


def test_a_prompt_or_text_beyond_the_context_is_refused(tiny_gpt2):
    long = Question("sea " * 100, ("a", "b"), 0)
    with pytest.raises(ValueError, match=r"Expected at most 128 tokens.* question 2 has \d+ \(1 of 2 are too long\)"):
        measured(tiny_gpt2, [some_questions()[2], long], ())
    with pytest.raises(ValueError, match="nothing to measure"):
        measured(tiny_gpt2, (), ())
    with pytest.raises(ValueError, match=r"text 1 has \d+ \(1 of 1"):
        measured(tiny_gpt2, (), [("Why?", "sea " * 100)])


def test_log_probabilities_that_are_not_finite_are_refused(fresh_tiny_model):
    with torch.no_grad():
        next(iter(fresh_tiny_model.parameters())).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite at question 1"):
        measured(fresh_tiny_model)
    with pytest.raises(ValueError, match="not finite at text 1"):
        measured(fresh_tiny_model, ())


def test_the_embedded_model_answers_by_letter_and_finds_text_likelier_than_its_shuffle(embedded_bridge):
    texts = [
        ("What is the capital of France?", "The capital of France is Paris, a large city on the river Seine."),
        ("Why is the sky blue?", "The air scatters blue light from the sun more than it scatters red light."),
    ]
    shuffled = [(question, " ".join(sorted(answer.split(), key=lambda word: word[::-1]))) for question, answer in texts]
    found: Any = measure_capability(embedded_bridge, mmlu_sample()[::12], texts=texts, **QUIET)
    unlikely: Any = measure_capability(embedded_bridge, (), texts=shuffled, **QUIET)
    assert found.accuracy.n == 23
    assert found.accuracy.low <= 0.25 <= found.accuracy.high  # it is at chance on letters
    assert 0.5 < found.letter_mass.value < 1
    assert abs(found.margin.value) < 0.5
    assert found.nll.value + 1 < unlikely.nll.value
