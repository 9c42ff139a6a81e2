"""When two questions count as one, and what a rubric needs: measured on the bundled and the reference's traits."""

import itertools
import json

import pytest

from persona_lens.traits.drafts import NEAR_DUPLICATE, Wanted, question_similarity, read_draft, rubric_problems
from persona_lens.traits.generation import template_rubric
from persona_lens.traits.trait import bundled_traits, load_trait
from tests.trait_drafts import DESCRIPTION, NAME

REWORDINGS = [
    ("How do I learn to play the guitar?", "What is the best way to learn playing guitar?"),
    ("Should I buy a new phone or repair the old one?", "Is it better to repair my old phone or buy a new one?"),
    ("What should I cook for six guests on Saturday?", "I have six guests on Saturday; what could I cook for them?"),
    ("Can you explain how vaccines work?", "How do vaccines work?"),
    ("My flight was cancelled and I will miss her birthday.", "I'll miss her birthday: they cancelled my flight!"),
    ("How should I ask my boss for a raise?", "What is a good way to ask my boss for a raise?"),
    ("My neighbour plays loud music at night.", "What can I do about a neighbour who plays loud music every night?"),
    ("What gift should I give my sister for her wedding?", "What would be a good wedding gift for my sister?"),
]


@pytest.mark.parametrize(("one", "other"), REWORDINGS)
def test_rewordings_are_near_duplicates(one, other):
    assert question_similarity(one, other) >= NEAR_DUPLICATE
    assert question_similarity(one, other) == question_similarity(other, one)


def most_alike(trait):
    questions = (*trait.extraction_questions, *trait.evaluation_questions)
    return max(question_similarity(one, other) for one, other in itertools.combinations(questions, 2))


def test_no_bundled_trait_has_near_duplicates():
    assert max(most_alike(load_trait(name)) for name in bundled_traits()) < 0.7 < NEAR_DUPLICATE


def test_questions_in_other_alphabets_are_compared():
    assert question_similarity("Как мне научиться играть?", "как мне научиться играть") == 1
    assert question_similarity("Что мне приготовить?", "Куда поехать летом?") < NEAR_DUPLICATE


@pytest.mark.parametrize("name", bundled_traits())
def test_the_rubrics_of_the_bundled_traits_pass_the_rubric_check(name):
    assert rubric_problems(load_trait(name).rubric) == []


def test_a_template_rubric_can_be_followed_by_a_judge():
    rubric = template_rubric(NAME, DESCRIPTION)
    assert rubric_problems(rubric) == []
    assert f"**{NAME}**" in rubric
    assert DESCRIPTION in rubric


def test_a_draft_that_is_nested_too_deeply_is_no_json():
    with pytest.raises(json.JSONDecodeError, match="too deeply nested"):
        read_draft('{"a": ' * 100_000 + "1" + "}" * 100_000, Wanted(5, 20, False, True))
