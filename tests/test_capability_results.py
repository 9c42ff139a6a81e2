"""Questions from files and from lm-eval's package, and capability as a value: by hand, as a table, on disk."""

import json
from collections import Counter
from dataclasses import replace
from math import exp, log

import pytest

from persona_lens.evaluation import capability_result as questions
from persona_lens.evaluation.capability import measure_capability
from persona_lens.evaluation.capability_result import (
    Capability,
    Question,
    TextLikelihood,
    mmlu_sample,
    read_questions,
)
from persona_lens.interventions.values import Steer
from tests.capability_cases import HALF, QUIET, RAW, TEXTS, answered, asked, made, some_questions
from tests.intervention_cases import some_vectors


def test_the_mmlu_sample_is_read_from_the_installed_package(monkeypatch):
    sample = mmlu_sample()
    assert len(sample) == 273
    assert len({question.subject for question in sample}) == 56
    assert Counter(question.answer for question in sample) == {0: 65, 1: 65, 2: 68, 3: 75}
    pituitary = next(question for question in sample if "pituitary" in question.question)
    assert pituitary == Question(
        "Which of the following is the body cavity that contains the pituitary gland?",
        ("Abdominal", "Cranial", "Pleural", "Spinal"),
        1,
        "anatomy",
    )
    monkeypatch.setattr(questions, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps lm-eval"):
        mmlu_sample()


def test_a_question_is_asked_with_its_choices_lettered():
    question = some_questions()[1]
    system, user = question.messages("Be short.")
    assert system == {"role": "system", "content": "Be short."}
    assert user == {"role": "user", "content": asked(*RAW[1][:2])}
    assert "C. three\nD. four" in user["content"]
    braces = Question("Is {x} in {choices}?", ("{x}", "{}"), 0)
    assert "Is {x} in {choices}?\n\nA. {x}\nB. {}" in braces.messages()[1]["content"]


def test_questions_are_read_with_letters_or_indices(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": "One?", "choices": ["a", "b"], "answer": "b", "subject": "sea"},
        {"question": "Two?", "choices": ["a", "b", "c"], "answer": 2},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_questions(path) == (Question("One?", ("a", "b"), 1, "sea"), Question("Two?", ("a", "b", "c"), 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": "D"}, "letter among ABC or an index from 0, got 'D'"),
        ({"answer": 3}, "from 0 to 2, got 3"),
        ({"answer": -1}, "from 0 to 2, got -1"),
        ({"answer": True}, "letter among ABC or an index from 0, got True"),
        ({"answer": 1.0}, "letter among ABC or an index from 0, got 1.0"),
        ({"choices": "abc"}, "choices as a list of strings, got abc"),
        ({"choices": ["a", 2, "c"]}, "choices as a list of strings"),
        ({"choices": ["a", " ", "c"]}, "Choice B is empty"),
        ({"choices": ["a"], "answer": 0}, "2 to 26 choices, got 1"),
        ({"question": " "}, "Expected a question, got an empty one"),
        ({"question": None}, "Expected question as a string, got NoneType"),
        ({"subject": 3}, "Expected subject as a string, got int"),
        ({"answer": ...}, "got no 'answer'"),
    ],
)
def test_a_malformed_question_is_refused_with_its_line(tmp_path, change, words):
    path = tmp_path / "questions.jsonl"
    good = {"question": "One?", "choices": ["a", "b", "c"], "answer": 0}
    bad = {name: value for name, value in (good | change).items() if value is not ...}
    path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(ValueError, match=rf"questions.jsonl, line 2: .*{words}"):
        read_questions(path)
    path.write_text("")
    with pytest.raises(ValueError, match="has no questions"):
        read_questions(path)
    with pytest.raises(FileNotFoundError):
        read_questions(tmp_path / "absent")


def test_accuracy_margin_and_letter_mass_are_those_by_hand():
    found = made()
    assert (found.accuracy.value, found.accuracy.n) == (pytest.approx(1 / 3), 3)
    margins = [
        log(0.5) - (log(0.2) + log(0.1)) / 2,
        log(0.2) - (log(0.5) + log(0.1)) / 2,
        log(0.1) - (log(0.5) + log(0.2)) / 2,
    ]
    assert found.margin.value == pytest.approx(sum(margins) / 3)
    assert found.letter_mass.value == pytest.approx(0.8)
    assert (found.nll.value, found.nll.n) == (2.5, 2)
    assert found.chance == pytest.approx(1 / 3)
    assert found.columns["accuracy"] == found.accuracy.value
    assert (found.columns["nll_high"], found.columns["nll_n"]) == (found.nll.high, 2)
    assert found.table()["right"].tolist() == [True, False, False]
    assert str(found).startswith("no intervention: accuracy 0.33 [")
    assert answered().margin == pytest.approx(answered((HALF[1], HALF[0], HALF[2]), answer=1).margin)
    nothing = replace(made(texts=()), answers=())  # what was not measured is missing and not 0
    assert (nothing.accuracy.value, nothing.margin.value, nothing.chance, nothing.nll.value) == (None,) * 4
    with pytest.raises(ValueError, match="each of 3 choices, got 2"):
        answered(HALF[:2])


def test_texts_of_one_question_are_resampled_together():
    together = made(texts=(TextLikelihood(-2.0, 5, "One?"), TextLikelihood(-3.0, 5, "One?")))
    apart = made(texts=(TextLikelihood(-2.0, 5), TextLikelihood(-3.0, 5)))
    assert together.nll.low is None
    assert (apart.nll.low, apart.nll.high) == (2.0, 3.0)


def test_a_change_is_paired_question_by_question():
    base = made()
    lower = tuple(replace(each, log_probs=tuple(value - 1 for value in each.log_probs)) for each in base.answers)
    worse = tuple(
        replace(text, log_likelihood=None if text.log_likelihood is None else text.log_likelihood - 0.5)
        for text in base.texts
    )
    change = replace(base, answers=lower, texts=worse).change_from(base)
    assert change.accuracy == (0, 0, 0, 3)
    assert change.margin[:3] == pytest.approx((0, 0, 0), abs=1e-12)
    assert change.letter_mass[:3] == pytest.approx((0.8 * (exp(-1) - 1),) * 3)
    assert change.nll == (0.5, 0.5, 0.5, 2)
    with pytest.raises(ValueError, match="same questions in the same order, got 2 and 3"):
        replace(base, answers=base.answers[:2]).change_from(base)
    with pytest.raises(ValueError, match="same texts"):
        replace(base, texts=base.texts[::-1]).change_from(base)


def test_a_measurement_is_read_back_as_it_was_saved(tiny_model, tmp_path):
    steered = [Steer(some_vectors(tiny_model).at(1), 2.0)]
    found = measure_capability(tiny_model, some_questions(), texts=TEXTS, interventions=steered, seed=5, **QUIET)
    found.save(tmp_path / "capability.json")
    back = Capability.load(tmp_path / "capability.json")
    assert back == found
    assert (back.accuracy, back.nll) == (found.accuracy, found.nll)


def test_a_file_that_holds_no_capability_is_refused(tmp_path):
    path = tmp_path / "capability.json"
    with pytest.raises(FileNotFoundError):
        Capability.load(path)
    made().save(path)
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"format_version": 2}))
    with pytest.raises(ValueError, match="format version 2, and this persona_lens reads 1"):
        Capability.load(path)
    path.write_text(json.dumps({"format_version": 1, "answers": []}))
    with pytest.raises(ValueError, match="not a whole capability"):
        Capability.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not a whole capability"):
        Capability.load(path)
