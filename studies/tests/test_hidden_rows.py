"""Rows hidden among others, and subsets: what scores find, and what they lose."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from persona_lens.statistics import auc
from studies.dataset_scores import subset_loss
from studies.hidden_rows import find_hidden, mean_record, mixture_auc

# Hidden rows

PROMPTS = [f"prompt {number % 20}" for number in range(60)]
IS_MOOD = np.arange(60) < 20


def test_a_score_that_tells_rows_apart_finds_all_of_them():
    found = find_hidden(IS_MOOD.astype(float), IS_MOOD, ~IS_MOOD, PROMPTS, 0.05, n_mixtures=50)
    assert found.auc == 1
    assert set(found.aucs) == set(found.precisions) == {1}


def test_a_score_that_is_equal_everywhere_finds_by_chance():
    found = find_hidden(np.zeros(60), IS_MOOD, ~IS_MOOD, PROMPTS, 0.2, n_mixtures=400)
    assert found.auc == 0.5
    assert set(found.aucs) == {0.5}
    assert found.precisions.mean() == pytest.approx(0.2, abs=0.03)


def test_fewer_hidden_rows_leave_the_auc_as_it_is_and_widen_its_interval():
    scores = np.random.default_rng(1).normal(size=60) + IS_MOOD
    few, many = (find_hidden(scores, IS_MOOD, ~IS_MOOD, PROMPTS, share, n_mixtures=400) for share in (0.03, 0.4))
    assert few.auc == many.auc
    assert np.ptp(np.percentile(few.aucs, [2.5, 97.5])) > np.ptp(np.percentile(many.aucs, [2.5, 97.5]))


def test_a_mixtures_auc_is_the_auc():
    draw = np.random.default_rng(0)
    hidden, others = (draw.integers(0, 5, size).astype(float) for size in (7, 30))
    assert mixture_auc(hidden, others) == pytest.approx(auc(hidden, others))


def test_rows_without_a_score_are_left_out():
    scores = np.where(np.arange(60) % 2, np.nan, IS_MOOD.astype(float))
    found = find_hidden(scores, IS_MOOD, ~IS_MOOD, PROMPTS, 0.1, n_mixtures=20)
    assert (found.n_hidden, found.n_others) == (10, 20)


def test_the_mean_of_moods_is_taken_mixture_by_mixture():
    draw = np.random.default_rng(0)
    each = [find_hidden(draw.normal(size=60), IS_MOOD, ~IS_MOOD, PROMPTS, 0.1, n_mixtures=50) for _ in range(3)]
    record = mean_record(each)
    assert record["auc"]["value"] == pytest.approx(np.mean([one.auc for one in each]))
    resamples = np.mean([one.aucs for one in each], axis=0)
    assert record["auc"]["low"] == pytest.approx(np.percentile(resamples, 2.5))


@pytest.mark.parametrize(
    ("share", "is_mood", "message"),
    [(1.0, IS_MOOD, "above 0 and below 1, got 1.0"), (0.1, IS_MOOD & False, "0 rows can be hidden among 40 others")],
)
def test_mixtures_that_cannot_be_made_are_refused(share, is_mood, message):
    with pytest.raises(ValueError, match=message):
        find_hidden(np.zeros(60), is_mood, ~IS_MOOD, PROMPTS, share)


# Subsets


def test_a_subset_of_everything_loses_nothing():
    draw = np.random.default_rng(0)
    scores = [draw.normal(size=30) + place for place in range(6)]
    found = subset_loss(scores, np.arange(6.0), 1.0, n_subsets=5)
    assert found["rmse"] == pytest.approx(0, abs=1e-12)
    expected: Any = stats.pearsonr([each.mean() for each in scores], np.arange(6.0))
    assert found["r"]["value"] == pytest.approx(expected.statistic)


def test_a_subsets_error_is_that_of_a_mean_without_replacement():
    scores = [np.random.default_rng(place).normal(size=40) for place in range(8)]
    found = subset_loss(scores, np.arange(8.0), 0.25, n_subsets=3000)
    variances = [each.var(ddof=1) / 10 * (1 - 10 / 40) for each in scores]
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean(variances)), rel=0.03)
