"""Traits keep their promises, the bundled ones are whole, and every refusal says which field and what to do."""

import dataclasses
import re
import subprocess
import sys
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trait_cases import TRAITS

# What a trait is


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": ""}, "name should be text, with no space around it, got ''"),
        ({"name": "../evil"}, "name should be letters, digits, spaces and '_-.', since it names files; got '../evil'"),
        ({"name": ".."}, "name should be letters"),
        ({"description": " Grumbles."}, "description should be text, with no space around it, got ' Grumbles.'"),
        ({"positive_adjective": ""}, "positive_adjective should be text"),
        ({"negative_adjective": "kind\n"}, "negative_adjective should be text"),
        ({"instructions": ()}, "instructions is empty, but a trait needs at least 1"),
        ({"extraction_questions": ()}, "extraction_questions is empty, but a trait needs at least 1"),
        ({"extraction_questions": ("Why?", "")}, "extraction_questions.1 should be text"),
        (
            {"extraction_questions": ("Why?", "How?", "Why?")},
            "extraction_questions.2 repeats extraction_questions.0; remove or rewrite 'Why?'",
        ),
        ({"evaluation_questions": ("How?", "How?")}, "evaluation_questions.1 repeats evaluation_questions.0"),
        (
            {"evaluation_questions": ("Is it?", "How was the film?")},
            "evaluation_questions.1 is an extraction question too, but a trait is measured on questions"
            " that its vector has not seen; replace 'How was the film?'",
        ),
        (
            {"monitoring_prompts": ("Be glad.",)},
            "monitoring_prompts should be 8, from discouraging to encouraging, or none; got 1",
        ),
        ({"monitoring_prompts": ("Be glad.",) * 8}, "monitoring_prompts.1 repeats monitoring_prompts.0"),
        ({"rubric": "Rate {answer}."}, "rubric does not contain {question}"),
        ({"rubric": "Rate it."}, "rubric does not contain {answer} and {question}"),
        (
            {"rubric": "Rate {answer} to {question} for {trait}."},
            "rubric contains {trait}, but only {question} and {answer}",
        ),
        ({"rubric": "Rate {{answer}} to {question}."}, "rubric contains {{answer}}, but only"),
        ({"rubric": "Rate { answer } to {question}."}, "rubric contains { answer }, but only"),
        ({"rubric": "Rate {} or {answer} to {question}."}, "rubric contains {}, but only"),
    ],
)
def test_a_trait_refuses_what_breaks_its_promise_and_names_the_field(make_trait, changes, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        make_trait(**changes)


@pytest.mark.parametrize(
    ("positive", "negative", "words"),
    [
        ("Grumble.", " ", "instructions.1.negative should be text, with no space around it, got ' '"),
        ("", "Praise.", "instructions.1.positive should be text"),
        ("Be.", "Be.", "instructions.1.negative should order the opposite, but equals positive"),
    ],
)
def test_a_trait_refuses_a_faulty_pair_and_names_its_number(traits, make_trait, positive, negative, words):
    pairs = (traits.InstructionPair("Sigh.", "Smile."), traits.InstructionPair(positive, negative))
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        make_trait(instructions=pairs)


def test_a_trait_refuses_an_aspect_given_twice(traits, make_trait):
    with pytest.raises(ValueError, match=r"^instructions\.1 repeats instructions\.0"):
        make_trait(instructions=(traits.InstructionPair("Sigh.", "Smile."),) * 2)


def test_values_of_another_type_are_refused_where_no_annotation_is_executed():
    code = """
        from persona_lens.traits.trait import InstructionPair, Trait

        right = dict(
            name="grumpy", description="Grumbles.", positive_adjective="grumpy", rubric="{question} {answer}",
            extraction_questions=("Why?",), evaluation_questions=(), instructions=(InstructionPair("A.", "B."),),
        )
        attempts = [
            lambda: Trait(**right | {"extraction_questions": "Why?"}),
            lambda: Trait(**right | {"extraction_questions": ["Why?"]}),
            lambda: Trait(**right | {"instructions": (("A.", "B."),)}),
            lambda: Trait(**right | {"name": None}),
            lambda: Trait(**right).system_prompt("pos", 0),
        ]
        for attempt in attempts:
            try:
                attempt()
            except ValueError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "extraction_questions should be a tuple of str, got 'Why?'; convert it",
        "extraction_questions should be a tuple of str, got ['Why?']; convert it",
        "instructions should be a tuple of InstructionPair, got (('A.', 'B.'),); convert it",
        "name should be text, with no space around it, got None; correct it",
        "grumpy: give 'positive' or 'negative' and an instruction from 0 to 0, or 'neutral' and None; got 'pos' and 0",
    ]


def test_a_rubric_may_show_json_since_only_placeholders_are_special(make_trait):
    rubric = 'Rate {answer} to {question} as {"score": 5}.'
    assert make_trait(rubric=rubric).rubric_for("q", "a") == 'Rate a to q as {"score": 5}.'


def test_a_trait_cannot_be_changed_and_equal_traits_are_one_key(make_trait):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_trait().name = "glad"
    assert len({make_trait(), make_trait(), make_trait(name="glad")}) == 2


# System prompts


def test_a_system_prompt_is_the_references_sentence_and_the_instruction(make_trait):
    trait = make_trait(negative_adjective="easy-going")
    assert trait.system_prompt("positive", 0) == "You are a grumpy assistant. Grumble."
    assert trait.system_prompt("negative", 1) == "You are an easy-going assistant. Smile."
    assert trait.system_prompt("neutral", None) == "You are a helpful assistant."


def test_an_assistant_name_takes_the_place_of_the_adjective(make_trait):
    assert make_trait().system_prompt("positive", 1, assistant_name="honest") == "You are an honest assistant. Sigh."


@pytest.mark.parametrize(
    ("article", "adjectives"),
    [
        ("a", "grumpy humorous humble useful usual unique united universal European one-sided utilitarian ubiquitous"),
        ("an", "evil impolite optimistic apathetic engaged honest honourable ugly unimaginative uninterested Earnest"),
    ],
)
def test_the_article_follows_the_first_sound(make_trait, article, adjectives):
    for adjective in adjectives.split():
        prompt = make_trait().system_prompt("neutral", None, assistant_name=adjective)
        assert prompt == f"You are {article} {adjective} assistant."


@pytest.mark.parametrize(
    ("polarity", "instruction"),
    [("positive", None), ("negative", 2), ("positive", -1), ("neutral", 0), ("neutral", -1)],
)
def test_a_system_prompt_refuses_an_instruction_that_does_not_belong(make_trait, polarity, instruction):
    words = rf"^grumpy: give .* and an instruction from 0 to 1, or .*; got '{polarity}' and {instruction}$"
    with pytest.raises(ValueError, match=words):
        make_trait().system_prompt(polarity, instruction)


# The rubric


@given(question=st.text(), answer=st.text())
def test_a_rubric_takes_any_question_and_answer_verbatim(make_trait, question, answer):
    trait = make_trait(rubric="Q:{question}\nA:{answer}\nQ again:{question}")
    assert trait.rubric_for(question, answer) == "Q:" + question + "\nA:" + answer + "\nQ again:" + question


@given(
    question=st.lists(st.sampled_from(["{answer}", "{question}", "{", "}", "{0}", "\\1", "\\g<0>", "%s", "x"])).map(
        "".join
    ),
    answer=st.lists(st.sampled_from(["{answer}", "{question}", "{", "}", "{{}}", "\\1", "\\n", "$", "y"])).map("".join),
)
def test_placeholders_and_escapes_inside_a_question_or_an_answer_stay_text(make_trait, question, answer):
    assert make_trait(rubric="<{question}|{answer}>").rubric_for(question, answer) == f"<{question}|{answer}>"


# The bundled traits


def test_seven_traits_are_bundled(traits):
    assert traits.bundled_traits() == TRAITS


def test_an_unknown_name_lists_the_bundled_ones_and_says_that_a_path_works(traits):
    with pytest.raises(
        ValueError, match=f"^no bundled trait is called 'zany'; give one of {', '.join(TRAITS)}, or the path"
    ):
        traits.load_trait("zany")


@pytest.mark.parametrize(
    ("typed", "meant"), [("Evil", "evil"), ("sycophancy", "sycophantic"), ("hallucination", "hallucinating")]
)
def test_a_name_nearly_right_is_answered_with_the_right_one(traits, typed, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        traits.load_trait(typed)


@pytest.mark.parametrize("name", TRAITS)
def test_a_bundled_trait_is_whole(traits, name):
    trait = traits.load_trait(name)
    assert trait.name == trait.positive_adjective == name
    assert trait.negative_adjective != "helpful"
    assert len(trait.instructions) == 5
    assert len(trait.extraction_questions) == len(trait.evaluation_questions) == 20
    assert len(trait.monitoring_prompts) == 8
    assert f"**{name}**" in trait.rubric
    assert "REFUSAL" in trait.rubric


def test_no_question_serves_two_bundled_traits(traits):
    loaded = [traits.load_trait(name) for name in TRAITS]
    questions = [question for trait in loaded for question in trait.extraction_questions + trait.evaluation_questions]
    assert len(set(questions)) == len(questions) == 7 * 40


# The module


def test_importing_traits_does_not_import_torch_or_pydantic():
    code = (
        "import sys, persona_lens.traits.trait as t\n"
        "print(sorted({'torch', 'pydantic', 'transformer_lens'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
