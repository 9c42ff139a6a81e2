"""The statistics agree with scikit-learn's and with counting by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from sklearn.metrics import roc_auc_score

from persona_lens.statistics import auc, question_resamples, resampled_auc, spearman

# A few whole numbers, so that ties are the rule, as well as any float.
VALUES = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e6, 1e6))
SIDES = st.tuples(st.lists(VALUES, min_size=1, max_size=12), st.lists(VALUES, min_size=1, max_size=12))


def sklearn_auc(positive, negative):
    return roc_auc_score([1] * len(positive) + [0] * len(negative), [*positive, *negative])


@given(sides=SIDES)
def test_auc_is_that_of_scikit_learn_with_ties(sides):
    assert auc(*sides) == pytest.approx(sklearn_auc(*sides), abs=1e-12)


@pytest.mark.parametrize(("positive", "negative"), [([], [1.0]), ([1.0], []), ([], [])])
def test_auc_of_an_empty_side_is_missing(positive, negative):
    assert auc(positive, negative) is None


@given(sides=SIDES)
def test_auc_of_swapped_sides_is_its_complement(sides):
    assert sum(map(auc, sides, reversed(sides))) == pytest.approx(1, abs=1e-12)


@given(sides=SIDES)
def test_resampled_auc_with_unit_weights_is_the_auc(sides):
    positive, negative = map(np.array, sides)
    resampled = resampled_auc(positive, negative, np.ones((2, len(positive))), np.ones((2, len(negative))))
    np.testing.assert_allclose(resampled, auc(positive, negative), atol=1e-12)


@given(sides=SIDES, data=st.data())
def test_resampled_auc_is_that_of_rows_repeated_by_their_weights(sides, data):
    positive, negative = map(np.array, sides)
    weights = [
        data.draw(arrays.arrays(int, len(side), elements=st.integers(0, 3)).filter(lambda w: w.sum() > 0))
        for side in (positive, negative)
    ]
    resampled = resampled_auc(positive, negative, weights[0][None], weights[1][None])
    expected = sklearn_auc(np.repeat(positive, weights[0]), np.repeat(negative, weights[1]))
    assert resampled[0] == pytest.approx(expected, abs=1e-12)


def test_resampled_auc_is_nan_where_a_resample_drew_no_row_of_a_side():
    drawn = resampled_auc(np.array([1.0, 2.0]), np.array([0.0]), np.array([[0, 0], [1, 0]]), np.array([[1], [1]]))
    np.testing.assert_array_equal(drawn, [np.nan, 1.0])


@given(pairs=st.lists(st.tuples(VALUES, VALUES), min_size=3, max_size=20))
def test_spearman_is_that_of_scipy_or_missing_on_a_constant(pairs):
    x, y = zip(*pairs, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert spearman(x, y) is None
    else:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_spearman_of_two_rows_is_missing():
    assert spearman([1.0, 2.0], [3.0, 4.0]) is None


def test_spearman_of_a_monotone_relation_is_one():
    assert spearman([1.0, 2.0, 5.0, 9.0], [0.1, 0.2, 40.0, 41.0]) == pytest.approx(1)


def test_every_resample_draws_as_many_questions_as_there_are():
    counts = question_resamples(n_questions=7, n_resamples=50, seed=0)
    assert counts.shape == (50, 7)
    assert (counts.sum(axis=1) == 7).all()


def test_resamples_draw_every_question_equally_often():
    counts = question_resamples(n_questions=5, n_resamples=4000, seed=1)
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.06)


def test_resamples_repeat_by_seed():
    one, again, other = (question_resamples(6, 20, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
