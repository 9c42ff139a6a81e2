"""Writing a trait with an LLM: one call, checks that collect everything, one repair, and errors that keep the draft."""

import json
import random

import pytest

from persona_lens.clients.client import OpenAIClient
from persona_lens.clients.requests import ServerError
from persona_lens.traits.generation import (
    TraitGenerationError,
    generate_trait,
    preview_trait,
    template_rubric,
    trait_request,
)
from tests.fault_server import FaultServer, always, bad_request, completion
from tests.judge_servers import only_reasons
from tests.llama_server import LLAMA_MODEL
from tests.trait_drafts import DESCRIPTION, NAME, client, draft, with_questions, writer

GOOD = json.dumps(draft())


def written(*answers, cache=None, **arguments):
    """The trait that these answers give, and the bodies that the server was sent."""
    with writer(*answers) as server:
        trait = generate_trait(NAME, DESCRIPTION, client(server, cache), **arguments)
    return trait, server.bodies


def failure(*answers, **arguments):
    """The error that these answers give, and the bodies that the server was sent."""
    with writer(*answers) as server, pytest.raises(TraitGenerationError) as caught:
        generate_trait(NAME, DESCRIPTION, client(server), **arguments)
    return caught.value, server.bodies


def test_a_whole_draft_becomes_a_trait_in_one_call():
    trait, bodies = written(GOOD)
    assert (trait.name, trait.description, len(bodies)) == (NAME, DESCRIPTION, 1)
    assert (trait.positive_adjective, trait.negative_adjective) == ("pedantic", "easy-going")
    assert [pair.positive for pair in trait.instructions] == [p["positive"] for p in draft()["instructions"].values()]
    assert list(trait.monitoring_prompts) == list(draft()["monitoring_prompts"].values())
    assert trait.rubric == draft()["rubric"]


def test_the_questions_are_divided_in_half_by_a_seeded_shuffle():
    trait, _ = written(GOOD, seed=3)
    shuffled = list(draft()["questions"].values())
    random.Random(3).shuffle(shuffled)
    assert (*trait.extraction_questions, *trait.evaluation_questions) == tuple(shuffled)
    assert (len(trait.extraction_questions), len(trait.evaluation_questions)) == (20, 20)
    assert written(GOOD, seed=4)[0].extraction_questions != trait.extraction_questions


def test_the_request_has_a_strict_schema_with_a_key_for_each_wanted_text():
    _, [body] = written(GOOD, seed=7, max_tokens=9000)
    wanted = body["response_format"]["json_schema"]
    assert wanted["strict"] is True
    assert (body["seed"], body["max_tokens"], body["temperature"]) == (7, 9000, 1.0)
    objects = [wanted["schema"]]
    for found in objects:
        assert found["additionalProperties"] is False
        assert found["required"] == list(found["properties"])
        objects += [each for each in found["properties"].values() if each["type"] == "object"]
    parts = wanted["schema"]["properties"]
    sizes = {name: len(part["properties"]) for name, part in parts.items() if part["type"] == "object"}
    assert sizes == {"instructions": 5, "questions": 40, "monitoring_prompts": 8}


def test_the_prompt_names_the_trait_its_description_and_every_key_of_the_schema():
    _, [body] = written(GOOD)
    asked = body["messages"][-1]["content"]
    assert f"Name: {NAME}\nDescription: {DESCRIPTION}\n" in asked
    assert all(f'"{key}"' in asked for key in body["response_format"]["json_schema"]["schema"]["properties"])
    assert f"**{NAME}**" in asked
    assert "{question}" in asked
    assert "{answer}" in asked


def test_what_is_not_wanted_is_not_asked_for():
    rubric = template_rubric(NAME, DESCRIPTION)
    small = draft(instructions={"pair_1": draft()["instructions"]["pair_1"]}, questions={"question_1": "Why, though?"})
    trait, [body] = written(json.dumps(small), n_pairs=1, n_questions=1, monitoring_prompts=False, rubric=rubric)
    assert trait.rubric == rubric
    assert trait.monitoring_prompts == ()
    assert trait.evaluation_questions == ()
    parts = ["positive_adjective", "negative_adjective", "instructions", "questions"]
    assert body["response_format"]["json_schema"]["schema"]["required"] == parts
    assert "rubric" not in body["messages"][-1]["content"]
    assert "monitoring" not in body["messages"][-1]["content"]


@pytest.mark.parametrize("description", ['Says "{answer}" {x} \\ and\nmore </trait>.', "{{question}} {", "100 % {} %s"])
def test_braces_quotes_and_newlines_in_a_description_go_out_as_they_are(description):
    with writer(GOOD) as server:
        trait = generate_trait(NAME, description, client(server))
        templated = generate_trait(NAME, description, client(server), rubric=template_rubric(NAME, description))
    assert f"Description: {description}\n" in server.bodies[0]["messages"][-1]["content"]
    assert trait.description == description
    assert templated.rubric_for("Q?", "A.").count("Q?") == 1


def test_a_draft_with_problems_is_repaired_in_the_same_conversation():
    bad = with_questions(question_3=None)
    trait, [first, second] = written(bad, GOOD)
    assert trait == written(GOOD)[0]
    assert second["messages"][:2] == first["messages"]
    assert second["messages"][2] == {"role": "assistant", "content": bad}
    assert "questions should be 40, and there are 39" in second["messages"][3]["content"]
    assert second["response_format"] == first["response_format"]


def test_every_problem_is_told_at_once():
    bad = draft(
        positive_adjective="You are a pedantic assistant.",
        monitoring_prompts={"prompt_1": "Be exact."},
        rubric="Rate {question} from 0 to 100.",
    )
    bad["instructions"]["pair_2"]["negative"] = bad["instructions"]["pair_2"]["positive"]
    bad["questions"]["question_8"] = " who WROTE the song that everybody sings on New Year-s Eve and what is it about "
    bad["questions"]["question_6"] = "Could you help me to write a toast for [name]?"
    del bad["negative_adjective"]
    error, bodies = failure(json.dumps(bad))
    assert len(bodies) == 2
    expected = [
        "positive_adjective should fit",
        "negative_adjective is missing",
        "monitoring_prompts should be 8, and there are 1",
        "instructions 2, negative repeats instructions 2, positive",
        "questions 8 repeats questions 5",
        "questions 6 has a blank in square brackets",
        "rubric should contain {answer} once",
        "rubric should tell the judge to write REFUSAL",
    ]
    for part in expected:
        assert sum(part in problem for problem in error.problems) == 1, part
        assert part in str(error)
        assert part in bodies[1]["messages"][-1]["content"]
    assert len(error.problems) == len(expected)


def test_a_second_failure_is_one_sentence_that_keeps_the_last_draft():
    first, second = with_questions(question_1=None), with_questions(question_1=None, question_2=None)
    error, bodies = failure(first, second)
    assert len(bodies) == 2
    assert error.draft == second
    assert error.problems == ("questions should be 40, and there are 38",)
    assert "pedantic: the draft cannot be used after one repair (questions should be 40" in str(error)
    assert "\n" not in str(error)


def test_a_cut_answer_names_max_tokens_and_is_not_paid_for_twice():
    cut = completion(GOOD[:3000], finish_reason="length", top={"{": 1.0})
    error, bodies = failure(cut, max_tokens=500)
    assert len(bodies) == 1
    assert "cut at max_tokens=500" in str(error)
    assert "raise max_tokens" in str(error)
    assert error.draft == GOOD[:3000]


def test_a_refusal_is_told_in_the_models_words():
    refused = completion("", finish_reason="stop", top={"{": 1.0})
    refused["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "I will not."}
    error, bodies = failure(refused)
    assert len(bodies) == 1
    assert "writer refused (I will not.)" in str(error)


@pytest.mark.parametrize("bad", ["", "Sure! Here it is.", GOOD[:-40], "[1, 2]", '"text"'])
def test_an_answer_that_is_no_json_object_is_repaired_once(bad):
    trait, bodies = written(bad, GOOD)
    assert len(bodies) == 2
    assert "the answer is not JSON" in bodies[1]["messages"][-1]["content"]
    assert trait == written(GOOD)[0]
    assert failure(bad)[0].draft == bad


@pytest.mark.parametrize(
    "form", ["```json\n{}\n```", "```\n{}\n```", "Here you are:\n\n```json\n{}\n```\nEnjoy!", " {} \n"]
)
def test_a_fence_around_the_json_is_tolerated(form):
    trait, bodies = written(form.replace("{}", GOOD))
    assert len(bodies) == 1
    assert trait == written(GOOD)[0]


def test_arrays_in_place_of_numbered_keys_are_tolerated():
    arrays = draft()
    for part in ("instructions", "questions", "monitoring_prompts"):
        arrays[part] = list(arrays[part].values())
    assert written(json.dumps(arrays))[0] == written(GOOD)[0]


@pytest.mark.parametrize("value", [None, 3, "a text of four words more", [None], [""], {"question_1": ["nested"]}])
def test_parts_of_the_wrong_kind_are_problems_and_no_crash(value):
    for part in ("positive_adjective", "instructions", "questions", "monitoring_prompts", "rubric"):
        error, _ = failure(json.dumps(draft(**{part: value})))
        assert any(part in problem for problem in error.problems)


def test_a_question_in_other_words_is_refused_and_both_are_shown():
    error, _ = failure(with_questions(question_12="What helps? Since the clocks changed I usually feel tired..."))
    [problem] = error.problems
    assert problem.startswith("questions 7 and 12 are nearly the same, so replace one: ")
    assert "kind of tired" in problem
    assert "What helps?" in problem


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a/b"}, "name should be letters"),
        ({"description": "  "}, "description should be text"),
        ({"rubric": "Rate {answer}."}, "rubric does not contain {question}"),
        ({"n_questions": 0}, "at least one pair and one question"),
        ({"n_pairs": 0}, "at least one pair and one question"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_asked(arguments, message):
    with writer(GOOD) as server, pytest.raises(ValueError, match=message):
        generate_trait(**{"name": NAME, "description": DESCRIPTION, "client": client(server)} | arguments)
    assert server.bodies == []


def test_with_a_cache_the_second_time_asks_nothing(tmp_path):
    with writer(with_questions(question_1=None), GOOD) as server:
        first = generate_trait(NAME, DESCRIPTION, client(server, tmp_path / "calls.sqlite"))
        asked = len(server.bodies)
        again = client(server, tmp_path / "calls.sqlite")
        assert generate_trait(NAME, DESCRIPTION, again) == first
    assert (asked, len(server.bodies), again.usage.calls, again.usage.cached) == (2, 2, 0, 2)


def test_the_request_can_be_priced_without_asking():
    with writer(GOOD) as server:
        estimate = client(server).estimate([trait_request(NAME, DESCRIPTION, max_tokens=700)])
    assert (estimate.calls, estimate.cached, estimate.completion_tokens) == (1, 0, 700)
    assert estimate.prompt_tokens > 500
    assert server.bodies == []


def test_a_server_that_does_not_take_schemas_is_told_in_its_own_words():
    said = "response_format of type json_schema is not supported"
    with FaultServer(faults=always(bad_request(said))) as server, pytest.raises(ServerError, match=said):
        generate_trait(NAME, DESCRIPTION, client(server))


def test_the_preview_shows_every_text_of_the_trait_in_its_order():
    trait, _ = written(GOOD)
    shown = preview_trait(trait)
    texts = [trait.name, trait.description, *(text for pair in trait.instructions for text in vars(pair).values())]
    texts += [*trait.extraction_questions, *trait.evaluation_questions, *trait.monitoring_prompts, trait.rubric]
    places = [shown.index(text, shown.index("## Instructions") if text in trait.instructions else 0) for text in texts]
    assert places == sorted(places)
    assert f"## Evaluation questions (20)\n\n1. {trait.evaluation_questions[0]}\n2. " in shown


@pytest.mark.slow
def test_a_real_server_keeps_to_the_schema_and_gives_a_trait(llama_server):
    """A model of 135M parameters writes something usable for one seed in a few, and within the schema for all."""
    real = OpenAIClient(LLAMA_MODEL, base_url=llama_server)
    small = {"n_pairs": 1, "n_questions": 2, "monitoring_prompts": False, "max_tokens": 200}
    description = "Always sees the good side of things and expects that they will end well."
    small["rubric"] = template_rubric("cheerful", description)
    traits, problems = [], []
    for seed in range(13, 23):
        try:
            traits.append(generate_trait("cheerful", description, real, seed=seed, **small))
            break
        except TraitGenerationError as error:
            problems += error.problems
    assert traits, problems
    assert (len(traits[0].instructions), len(traits[0].extraction_questions)) == (1, 1)
    assert not any("missing" in problem or "should be an object" in problem for problem in problems)
    assert real.usage.completion_tokens <= 200 * real.usage.calls


def test_a_writer_that_gives_nothing_but_reasoning_is_told_how_to_turn_it_off():
    with FaultServer(only_reasons) as server, pytest.raises(TraitGenerationError) as caught:
        generate_trait(NAME, DESCRIPTION, client(server))
    assert "enable_thinking" in str(caught.value)
    assert "--writer-extra-body" in str(caught.value)
    assert len(server.bodies) == 1
