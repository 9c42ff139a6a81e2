"""Traits keep their promises, the bundled ones are whole, and every refusal says which field and what to do."""

import dataclasses
import json
import re
import subprocess
import sys
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

TRAITS = ("apathetic", "evil", "hallucinating", "humorous", "impolite", "optimistic", "sycophantic")


@pytest.fixture(scope="module")
def traits():
    from persona_lens import traits

    return traits


@pytest.fixture(scope="module")
def make_trait(traits):
    """A trait that is right in everything but what a test changes."""

    def make(**changes):
        right = {
            "name": "grumpy",
            "description": "Finds fault with everything.",
            "positive_adjective": "grumpy",
            "instructions": (
                traits.InstructionPair(positive="Grumble.", negative="Praise."),
                traits.InstructionPair(positive="Sigh.", negative="Smile."),
            ),
            "extraction_questions": ("How is the soup?", "How was the film?"),
            "evaluation_questions": ("How is the tea?",),
            "rubric": "How grumpy is {answer} to {question}?",
        }
        return traits.Trait(**(right | changes))

    return make


@pytest.fixture
def trait_file(make_trait, tmp_path):
    """Writes a trait's JSON after an edit of its content and gives the path."""

    def write(edit):
        content = json.loads(make_trait().to_json())
        edit(content)
        path = tmp_path / "grumpy.json"
        path.write_text(json.dumps(content))
        return path

    return write


def reference_content():
    return {
        "instruction": [{"pos": "Grumble.", "neg": "Praise."}],
        "questions": ["How is the soup?"],
        "eval_prompt": "Rate the trait **grumpy**. A grumpy answer finds fault.\n\nQ: {question}\n\nA: {answer}",
    }


@pytest.fixture
def reference_file(tmp_path):
    """Writes a file in the reference's layout with some keys changed, or left out where None, and gives the path."""

    def write(filename="grumpy.json", **changes):
        path = tmp_path / filename
        content = {key: value for key, value in (reference_content() | changes).items() if value is not None}
        path.write_text(json.dumps(content))
        return path

    return write


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
        from persona_lens.traits import InstructionPair, Trait

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


# Our JSON

stripped = st.text(min_size=1).filter(lambda text: text == text.strip())


@given(
    texts=st.lists(stripped, min_size=14, max_size=14, unique=True),
    pairs=st.lists(st.tuples(stripped, stripped).filter(lambda pair: pair[0] != pair[1]), min_size=1, unique=True),
    watched=st.booleans(),
)
def test_any_trait_saved_is_loaded_again_equal(traits, make_trait, tmp_path_factory, texts, pairs, watched):
    trait = make_trait(
        description=texts[0],
        positive_adjective=texts[1],
        negative_adjective=texts[2],
        instructions=tuple(traits.InstructionPair(*pair) for pair in pairs),
        extraction_questions=tuple(texts[:2]),
        evaluation_questions=tuple(texts[2:5]),
        monitoring_prompts=tuple(texts[5:13]) if watched else (),
    )
    path = tmp_path_factory.mktemp("saved") / "own.json"
    trait.save(path)
    loaded = traits.load_trait(path)
    assert loaded == trait
    assert type(loaded) is traits.Trait


def test_saved_json_says_its_format_version_and_keeps_the_order_of_the_fields(make_trait):
    assert list(json.loads(make_trait().to_json())) == [
        "format_version", "name", "description", "positive_adjective", "negative_adjective", "instructions",
        "extraction_questions", "evaluation_questions", "monitoring_prompts", "rubric",
    ]  # fmt: skip


def test_a_file_may_leave_out_what_has_a_default(traits, make_trait, trait_file):
    def edit(content):
        del content["negative_adjective"], content["monitoring_prompts"]

    assert traits.load_trait(trait_file(edit)) == make_trait()


def test_a_byte_order_mark_from_a_windows_editor_is_no_obstacle(traits, make_trait, tmp_path):
    path = tmp_path / "grumpy.json"
    path.write_text(make_trait().to_json(), encoding="utf-8-sig")
    assert traits.load_trait(str(path)) == make_trait()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.pop("rubric"), "rubric is missing; add it"),
        (lambda c: c.pop("format_version"), "format_version is missing; add it"),
        (
            lambda c: c.update(format_version=2, mood="bad"),
            "format_version should be 1, got 2; correct it, or update persona_lens",
        ),
        (lambda c: c.update(mood="bad"), "mood is not a field of such a file; remove it or correct its name"),
        (
            lambda c: c["instructions"][1].update(negatve=c["instructions"][1].pop("negative")),
            "instructions.1.negatve is not a field of such a file",
        ),
        (lambda c: c["instructions"][1].pop("negative"), "instructions.1.negative is missing; add it"),
        (
            lambda c: c["instructions"][1].update(negative=5),
            "instructions.1.negative should be a valid string, got 5; correct it",
        ),
        (
            lambda c: c["instructions"][1].update(negative=""),
            "instructions.1.negative should be text, with no space around it, got ''; correct it",
        ),
        (
            lambda c: c.update(instructions=["Grumble."]),
            "instructions.0 should be an object, got 'Grumble.'; correct it",
        ),
        (
            lambda c: c.update(extraction_questions="How is the soup?"),
            "extraction_questions should be a valid array, got 'How is the soup?'; correct it",
        ),
        (lambda c: c.update(extraction_questions=[]), "extraction_questions is empty"),
        (
            lambda c: c.update(evaluation_questions=["How is the soup?"]),
            "evaluation_questions.0 is an extraction question",
        ),
        (lambda c: c.update(monitoring_prompts=["Be glad."]), "monitoring_prompts should be 8"),
        (lambda c: c.update(rubric="Rate {answer}."), "rubric does not contain {question}"),
    ],
)
def test_a_faulty_file_is_refused_in_one_line_with_its_path_and_field(traits, trait_file, edit, words):
    path = trait_file(edit)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {words}')}") as refusal:
        traits.load_trait(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            b'{"name": "grumpy",\n"rubric": }',
            "this is not JSON, expected value at line 2 column 11; correct the text there",
        ),
        (b"", "this is not JSON, EOF while parsing a value at line 1 column 0"),
        (b'{"name": "\xff"}', "this is not JSON, invalid unicode code point at line 1 column 11"),
        (b'["grumpy"]', "the file should be an object, got ['grumpy']; correct it"),
    ],
)
def test_a_file_that_is_not_a_json_object_is_refused_with_line_and_column(traits, tmp_path, text, words):
    path = tmp_path / "grumpy.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {words}')}"):
        traits.load_trait(path)


@pytest.mark.parametrize("missing", ["grumpy.json", "."])
def test_a_path_that_is_no_file_is_not_found(traits, tmp_path, missing):
    with pytest.raises(FileNotFoundError, match=r"is not a file; give the path of a trait's JSON file"):
        traits.load_trait(tmp_path / missing)


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


@pytest.mark.parametrize("name", TRAITS)
def test_the_two_instructions_of_a_bundled_pair_are_two_sentences_of_like_length(traits, name):
    for pair in traits.load_trait(name).instructions:
        lengths = [len(text.split()) for text in (pair.positive, pair.negative)]
        assert all(33 <= length <= 50 for length in lengths)
        assert max(lengths) <= 1.25 * min(lengths)
        assert pair.positive.count(".") == pair.negative.count(".") == 2


@pytest.mark.parametrize("name", TRAITS)
def test_bundled_questions_are_short_and_do_not_ask_for_the_trait(traits, name):
    trait = traits.load_trait(name)
    for question in trait.extraction_questions + trait.evaluation_questions:
        assert 8 <= len(question.split()) <= 20
        assert name[:6] not in question.lower()


def test_no_question_serves_two_bundled_traits(traits):
    loaded = [traits.load_trait(name) for name in TRAITS]
    questions = [question for trait in loaded for question in trait.extraction_questions + trait.evaluation_questions]
    assert len(set(questions)) == len(questions) == 7 * 40


# The reference's files


@pytest.mark.parametrize("name", TRAITS)
def test_the_references_files_survive_a_round_trip(traits, reference_data, tmp_path, name):
    folder = reference_data / "reference_traits"
    files = [f"trait_data_{kind}/{name}.json" for kind in ("extract", "eval")]
    trait = traits.read_reference_trait(*(folder / file for file in files))
    traits.write_reference_trait(trait, tmp_path)
    for file in files:
        assert json.loads((tmp_path / file).read_text()) == json.loads((folder / file).read_text())


@pytest.mark.parametrize("name", TRAITS)
def test_a_trait_of_the_reference_has_the_papers_counts_and_a_description(traits, reference_data, name):
    folder = reference_data / "reference_traits"
    trait = traits.read_reference_trait(
        folder / "trait_data_extract" / f"{name}.json", folder / "trait_data_eval" / f"{name}.json"
    )
    assert (trait.name, trait.positive_adjective, trait.negative_adjective) == (name, name, "helpful")
    assert (len(trait.instructions), len(trait.extraction_questions), len(trait.evaluation_questions)) == (5, 20, 20)
    assert trait.monitoring_prompts == ()
    assert trait.description in trait.rubric
    assert trait.description.endswith(".")
    assert "**" not in trait.description


@pytest.mark.parametrize("name", TRAITS)
def test_bundled_wording_is_our_own(traits, reference_data, name):
    folder = reference_data / "reference_traits"
    theirs = traits.read_reference_trait(
        folder / "trait_data_extract" / f"{name}.json", folder / "trait_data_eval" / f"{name}.json"
    )

    def runs_of_eight_words(trait):
        pairs = [text for pair in trait.instructions for text in (pair.positive, pair.negative)]
        texts = [trait.description, trait.rubric, *pairs, *trait.extraction_questions, *trait.evaluation_questions]
        words = [re.findall(r"\w+", text.lower()) for text in texts]
        return {tuple(each[start : start + 8]) for each in words for start in range(len(each) - 7)}

    assert not runs_of_eight_words(traits.load_trait(name)) & runs_of_eight_words(theirs)


def test_a_bundled_trait_survives_the_references_layout_but_for_what_it_cannot_hold(traits, tmp_path):
    trait = traits.load_trait("humorous")
    traits.write_reference_trait(trait, tmp_path / "new" / "folder")
    extract, evaluation = (
        tmp_path / "new" / "folder" / f"trait_data_{kind}" / "humorous.json" for kind in ("extract", "eval")
    )
    read = traits.read_reference_trait(
        extract, evaluation, description=trait.description, negative_adjective=trait.negative_adjective
    )
    assert read == dataclasses.replace(trait, monitoring_prompts=())


def test_what_the_reference_leaves_out_is_filled_in_by_rule_or_by_the_caller(traits, reference_file):
    path = reference_file()
    by_rule = traits.read_reference_trait(path)
    assert (by_rule.name, by_rule.description) == ("grumpy", "A grumpy answer finds fault.")
    assert (by_rule.positive_adjective, by_rule.negative_adjective) == ("grumpy", "helpful")
    assert by_rule.evaluation_questions == ()
    by_caller = traits.read_reference_trait(
        path, name="grump", description="Grumbles.", positive_adjective="grouchy", negative_adjective="sunny"
    )
    assert (by_caller.name, by_caller.description) == ("grump", "Grumbles.")
    assert (by_caller.positive_adjective, by_caller.negative_adjective) == ("grouchy", "sunny")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"questions": None}, ": questions is missing; add it"),
        ({"instruction": [{"pos": "Grumble."}]}, ": instruction.0.neg is missing; add it"),
        ({"instruction": [{"pos": "Grumble.", "neg": 1}]}, ": instruction.0.neg should be a valid string, got 1"),
        ({"score": 1}, ": score is not a field of such a file"),
        (
            {"eval_prompt": "{question} {answer}"},
            ": eval_prompt describes no trait named in bold; give description='...'",
        ),
        ({"instruction": []}, ", read as a trait: instructions is empty"),
        ({"questions": ["Why?", "Why?"]}, ", read as a trait: extraction_questions.1 repeats extraction_questions.0"),
    ],
)
def test_a_faulty_reference_file_is_refused_with_its_path_and_field(traits, reference_file, changes, words):
    path = reference_file(**changes)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}{words}')}"):
        traits.read_reference_trait(path)


@pytest.mark.parametrize(
    "changes", [{"instruction": [{"pos": "A.", "neg": "B."}]}, {"eval_prompt": "{question} {answer}"}]
)
def test_two_files_of_different_traits_are_refused(traits, reference_file, changes):
    extract, evaluation = reference_file(), reference_file("other.json", questions=["Who?"], **changes)
    words = f"{extract} and {evaluation} differ in more than their questions; give one trait's two files"
    with pytest.raises(ValueError, match=re.escape(words)):
        traits.read_reference_trait(extract, evaluation)


def test_the_same_file_given_twice_is_refused_since_its_questions_are_not_disjoint(traits, reference_file):
    with pytest.raises(ValueError, match=r"read as a trait: evaluation_questions\.0 is an extraction question too"):
        traits.read_reference_trait(reference_file(), reference_file())


def test_each_reader_refuses_the_others_files_and_names_the_right_reader(traits, trait_file, reference_file):
    with pytest.raises(ValueError, match=r"read_reference_trait the reference code's"):
        traits.load_trait(reference_file())
    with pytest.raises(ValueError, match=r"load_trait reads persona_lens's own form"):
        traits.read_reference_trait(trait_file(lambda content: None))


def test_a_trait_without_evaluation_questions_does_not_fit_the_references_layout(traits, make_trait, tmp_path):
    with pytest.raises(
        ValueError, match=r"^grumpy: evaluation_questions is empty, but the reference has a file of them"
    ):
        traits.write_reference_trait(make_trait(evaluation_questions=()), tmp_path)


# The module


def test_importing_traits_does_not_import_torch_or_pydantic():
    code = (
        "import sys, persona_lens.traits; print(sorted({'torch', 'pydantic', 'transformer_lens'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
