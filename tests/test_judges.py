"""Coherence is 90 for a model's own text, 10 for the same words shuffled, and lower for a text that loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_lens.judges import CoherenceScale
from persona_lens.judges.coherence import distinct_four_grams, loop_words, shuffle_words

NLLS = st.lists(st.floats(0.0, 8.0), min_size=1, max_size=9)
SCALE = CoherenceScale(centre=4.0, width=0.5, distinct_floor=0.9)


@given(clean=NLLS, extra=NLLS)
def test_the_median_responses_of_the_fit_score_90_and_10(clean, extra):
    shuffled = [max(clean) + 0.1 + value for value in extra]
    scale = CoherenceScale.fit(clean, shuffled, [1.0])
    assert scale.score(float(np.median(clean)), 1.0) == pytest.approx(90)
    assert scale.score(float(np.median(shuffled)), 1.0) == pytest.approx(10)


def test_the_floor_of_distinct_four_grams_is_their_5th_percentile():
    distinct = np.linspace(0.5, 1.0, 101).tolist()
    assert CoherenceScale.fit([1.0], [2.0], distinct).distinct_floor == pytest.approx(0.525)


def test_coherence_falls_as_text_grows_unlikely():
    scores = [SCALE.score(nll, 1.0) for nll in (1.0, 3.0, 4.0, 5.0, 9.0)]
    assert scores == sorted(scores, reverse=True)
    assert scores[2] == pytest.approx(50)


def test_repetition_lowers_the_coherence_of_likely_text():
    assert SCALE.score(2.0, 0.09) == pytest.approx(SCALE.score(2.0, 1.0) / 10)


def test_distinct_text_above_the_floor_gets_no_bonus():
    assert SCALE.score(2.0, 1.0) == SCALE.score(2.0, 0.9)


@pytest.mark.parametrize("nll", [0.0, 1e3, 1e9])
def test_coherence_stays_between_0_and_100_however_unlikely_the_text(nll):
    assert 0 <= SCALE.score(nll, 1.0) <= 100


@pytest.mark.parametrize("shuffled", [[2.0, 2.0], [1.0, 1.5], [math.nan, math.nan]])
def test_a_model_that_finds_shuffled_text_as_likely_cannot_judge(shuffled):
    with pytest.raises(ValueError, match=r"Shuffled text is as likely as clean text .* cannot judge coherence"):
        CoherenceScale.fit([2.0, 2.0], shuffled, [1.0])


@pytest.mark.parametrize(
    ("tokens", "share"),
    [((1, 2, 3, 4, 5), 1.0), ((7,) * 13, 0.1), ((1, 2, 3), 1.0), ((), 1.0), ((1, 2) * 5, 2 / 7)],
)
def test_the_share_of_distinct_four_grams(tokens, share):
    assert distinct_four_grams(tokens) == pytest.approx(share)


@given(words=st.lists(st.sampled_from("one two three four".split()), max_size=20), seed=st.integers(0, 99))
def test_shuffling_keeps_the_words(words, seed):
    assert sorted(shuffle_words(" ".join(words), seed).split()) == sorted(words)


def test_shuffling_repeats_by_seed():
    text = "the quick brown fox jumps over the lazy dog"
    assert shuffle_words(text, 1) == shuffle_words(text, 1) != shuffle_words(text, 2)


@given(words=st.lists(st.sampled_from("one two three four".split()), max_size=20))
def test_looping_text_has_the_length_and_the_first_words_of_its_original(words):
    looped = loop_words(" ".join(words)).split()
    assert len(looped) == len(words)
    assert looped[:6] == words[:6]
    assert all(word == looped[place % 6] for place, word in enumerate(looped))
