"""The sentiment judge: valence of words from 0 to 100, and missing where there is no text."""

import sys

import pytest

from persona_lens.judges.classifier import SentimentJudge
from persona_lens.judges.scores import Score
from persona_lens.rollouts.rows import Rollout
from persona_lens.traits.trait import load_trait

TEXTS = ["I am sure everything will turn out wonderfully", "it is hopeless and will fail", "The table is made of wood."]


@pytest.fixture(scope="module")
def trait():
    return load_trait("optimistic")


@pytest.fixture(scope="module")
def judge():
    pytest.importorskip("vaderSentiment", reason="vaderSentiment, the lexicon, is not installed")
    return SentimentJudge()


@pytest.fixture
def score(judge, trait):
    def score(*texts):
        rows = [
            Rollout("optimistic", "positive", 0, "S", "How is it?", sample, text, None, "stop", "engine", 0)
            for sample, text in enumerate(texts)
        ]
        return judge.score(trait, rows)

    return score


def test_hopeful_text_scores_above_neutral_and_hopeless_text_below(score):
    hopeful, hopeless, neutral = (row.trait_score for row in score(*TEXTS))
    assert hopeless < neutral == 50 < hopeful


def test_the_score_is_the_compound_valence_from_0_to_100(score):
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    expected = [SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in TEXTS]
    found = score(*TEXTS)
    assert [row.trait_score for row in found] == [50 * (1 + compound) for compound in expected]
    assert [row.evidence["compound"] for row in found] == expected


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_response_has_no_score(score, text):
    assert score(text) == [Score(None, None)]


def test_long_text_in_one_mood_saturates_within_the_scale(score):
    pleasant, unpleasant = (row.trait_score for row in score("wonderful! " * 500, "horrible! " * 500))
    assert 0 <= unpleasant < 1
    assert 99 < pleasant <= 100


def test_the_score_of_a_response_does_not_depend_on_its_batch(score):
    assert score(*TEXTS, "") == [found for text in [*TEXTS, ""] for found in score(text)]


def test_without_the_package_it_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match=r'needs the package vaderSentiment.*pip install "persona-lens\[embed'):
        SentimentJudge()
