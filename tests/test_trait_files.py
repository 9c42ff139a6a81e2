"""Files of traits, ours and the reference's: read back as written, or refused with the field and what to do."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trait_cases import TRAITS

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
