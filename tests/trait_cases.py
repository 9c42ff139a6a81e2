"""Traits and their files, right in everything but what a test changes."""

import json

import pytest

TRAITS = ("apathetic", "evil", "hallucinating", "humorous", "impolite", "optimistic", "sycophantic")


@pytest.fixture(scope="module")
def traits():
    from persona_lens.traits import trait as traits

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
