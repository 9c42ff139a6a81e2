"""The statistics of agreement are those of scipy, scikit-learn and counting by hand, in every resample too."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from persona_lens.judges.agreement import (
    TABLE_SIZE,
    agreement_statistics,
    judge_agreement,
    resampled_kappa,
    resampled_pearson,
    resampled_ranks,
    resampled_spearman,
)
from persona_lens.statistics import N_RESAMPLES, question_resamples
from tests.agreement_cases import FIRST, QUESTIONS, ROWS, SCORES, SECOND, STATISTICS, naive, naive_interval, scored


def test_kappa_is_the_one_counted_by_hand():
    # Of 10 rows both show the trait in 4, the first alone in 1, the second alone in 1, neither in 4: they agree on
    # 0.8, and by chance on 0.5 * 0.5 + 0.5 * 0.5 = 0.5, so kappa is (0.8 - 0.5) / (1 - 0.5).
    found = judge_agreement(scored(FIRST), SECOND)
    assert found.quarters == {(True, True): 4, (True, False): 1, (False, True): 1, (False, False): 4}
    assert found.kappa.value == pytest.approx(0.6)
    assert found.agreeing.value == pytest.approx(0.8)


def test_a_score_at_the_threshold_shows_the_trait():
    found = judge_agreement(scored([70.0, 20.0, 69.9, 70.0]), [70.0, 69.9, 0.0, 100.0], threshold=70.0)
    assert found.quarters == {(True, True): 2, (True, False): 0, (False, True): 0, (False, False): 2}


def test_correlations_are_those_of_scipy():
    found = judge_agreement(scored(FIRST), SECOND)
    assert found.pearson.value == pytest.approx(stats.pearsonr(FIRST, SECOND).statistic)
    assert found.spearman.value == pytest.approx(stats.spearmanr(FIRST, SECOND).statistic)


@pytest.mark.parametrize("name", STATISTICS)
def test_intervals_are_those_of_a_loop_over_resamples_of_questions(name):
    found = getattr(judge_agreement(scored(FIRST, QUESTIONS), SECOND, seed=3), name)
    low, high = naive_interval(name, FIRST, SECOND, QUESTIONS, seed=3)
    assert (found.low, found.high, found.n) == pytest.approx((low, high, 10))


@given(rows=ROWS, seed=st.integers(0, 5))
def test_every_resample_has_the_statistics_of_its_rows_written_out(rows, seed):
    first, second, questions = zip(*rows, strict=True)
    one, other = np.array(first), np.array(second)
    _, index = np.unique(questions, return_inverse=True)
    weights = question_resamples(int(index.max()) + 1, 6, seed)[:, index]
    found = {
        "pearson": resampled_pearson(one, other, weights),
        "spearman": resampled_spearman(one, other, weights),
        "kappa": resampled_kappa(one >= 50, other >= 50, weights),
    }
    for name, values in found.items():
        expected = [naive(name, np.repeat(one, row).tolist(), np.repeat(other, row).tolist()) for row in weights]
        np.testing.assert_allclose(values, expected, atol=1e-7, err_msg=name)


@given(values=st.lists(SCORES, min_size=1, max_size=10), data=st.data())
def test_ranks_in_a_resample_are_those_of_its_rows_written_out(values, data):
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)).filter(any))
    ranks = resampled_ranks(np.array(values), np.array([counts]))[0]
    expected = stats.rankdata(np.repeat(values, counts))
    np.testing.assert_array_equal(np.repeat(ranks, counts), expected)


def test_tiny_scores_keep_their_correlation_beside_a_large_one():
    first, second = np.array([1e-7, 2e-7, 3e-7, 4e-7, 100.0]), np.array([2e-7, 1e-7, 4e-7, 3e-7, 0.0])
    weights = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    expected = [stats.pearsonr(first[:4], second[:4]).statistic, stats.pearsonr(first, second).statistic]
    np.testing.assert_allclose(resampled_pearson(first, second, weights), expected, rtol=1e-9)


def test_resamples_taken_in_parts_are_those_taken_at_once(monkeypatch):
    columns = np.array(FIRST), np.array(SECOND), np.repeat(np.arange(5), 2)
    assert N_RESAMPLES * len(FIRST) < TABLE_SIZE
    whole = agreement_statistics(*columns, threshold=50.0, seed=0)
    monkeypatch.setattr("persona_lens.judges.agreement.TABLE_SIZE", 700)
    assert agreement_statistics(*columns, threshold=50.0, seed=0) == whole
