"""The statistics agree with scikit-learn's and with counting by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from sklearn.metrics import roc_auc_score

from persona_lens.statistics import (
    N_RESAMPLES,
    Estimate,
    auc,
    mean_estimate,
    question_resamples,
    resampled_auc,
    resampled_means,
    slopes,
    spearman,
)

# A few whole numbers, so that ties are the rule, as well as any float.
VALUES = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e6, 1e6))
SIDES = st.tuples(st.lists(VALUES, min_size=1, max_size=12), st.lists(VALUES, min_size=1, max_size=12))


def sklearn_auc(positive, negative):
    return roc_auc_score([1] * len(positive) + [0] * len(negative), [*positive, *negative])


@given(sides=SIDES)
def test_auc_is_that_of_scikit_learn_with_ties_and_of_swapped_sides_its_complement(sides):
    assert auc(*sides) == pytest.approx(sklearn_auc(*sides), abs=1e-12)
    assert sum(map(auc, sides, reversed(sides))) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("positive", "negative"), [([], [1.0]), ([1.0], []), ([], [])])
def test_auc_of_an_empty_side_is_missing(positive, negative):
    assert auc(positive, negative) is None


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


@given(pairs=st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=20))
def test_spearman_is_that_of_scipy_or_missing_on_a_constant_and_below_three_rows(pairs):
    x, y = zip(*pairs, strict=True)
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        assert spearman(x, y) is None
    else:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_resamples_draw_as_many_questions_as_there_are_equally_often_and_repeat_by_seed():
    counts = question_resamples(n_questions=5, n_resamples=4000, seed=1)
    assert counts.shape == (4000, 5)
    assert (counts.sum(axis=1) == 5).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.06)
    np.testing.assert_array_equal(counts, question_resamples(5, 4000, seed=1))
    assert (counts != question_resamples(5, 4000, seed=2)).any()


# --- means, slopes and their intervals -----------------------------------------------------------------------------

SCORES = st.lists(st.one_of(st.none(), st.floats(0, 100)), min_size=1, max_size=12)


def drawn_values(values, questions, names, counts):
    """The rows of one resample, each written out as often as its question was drawn; missing ones are not there."""
    return [
        value
        for name, count in zip(names, counts, strict=True)
        for value, question in zip(values, questions, strict=True)
        if question == name and value is not None
        for _ in range(count)
    ]


@given(values=SCORES, data=st.data())
def test_resampled_means_are_those_of_rows_repeated_as_often_as_their_question_was_drawn(values, data):
    questions = [data.draw(st.integers(0, 3)) for _ in values]
    weights = question_resamples(4, 5, seed=data.draw(st.integers(0, 9)))
    numbers = np.array([np.nan if value is None else value for value in values])
    found = resampled_means(numbers, np.array(questions), weights)
    for mean, counts in zip(found, weights, strict=True):
        rows = drawn_values(values, questions, range(4), counts)
        assert np.isnan(mean) if not rows else mean == pytest.approx(sum(rows) / len(rows), abs=1e-9)


def test_an_interval_is_that_of_a_loop_over_resamples_of_questions():
    values = [0.0, 10.0, None, 35.0, 80.0, 20.0, None]
    questions = ["b", "a", "a", "c", "d", "b", "e"]
    means = []
    for counts in question_resamples(5, N_RESAMPLES, 3):
        rows = drawn_values(values, questions, ["b", "a", "c", "d", "e"], counts)
        means += [sum(rows) / len(rows)] if rows else []
    low, high = np.percentile(means, [2.5, 97.5])
    assert mean_estimate(values, questions, seed=3) == pytest.approx((29.0, low, high, 5))


def test_a_mean_over_one_question_has_no_interval_and_over_no_row_no_value():
    assert mean_estimate([10.0, None, 30.0], ["why"] * 3) == Estimate(20.0, None, None, 2)
    assert mean_estimate([None, float("nan")], ["a", "b"]) == Estimate(None, None, None, 0)


def test_an_estimate_leaves_out_undefined_resamples_and_has_no_interval_without_a_value():
    resamples = np.array([1.0, np.nan, 2.0, 3.0, np.nan])
    assert Estimate.of(2.0, resamples, 7) == pytest.approx((2.0, *np.percentile([1, 2, 3], [2.5, 97.5]), 7))
    assert Estimate.of(float("nan"), np.array([1.0, 2.0]), 4) == Estimate(None, None, None, 4)
    assert Estimate.of(1.0, np.array([1.0, np.nan]), 4) == Estimate(1.0, None, None, 4)


def test_an_estimate_reads_as_a_number_with_its_interval():
    texts = [str(Estimate(12.34, *ends, 5)) for ends in ((1.0, 20.06), (None, None))]
    assert [*texts, str(Estimate(None, None, None, 0))] == ["12.3 [1.0, 20.1]", "12.3", "-"]


@given(x=st.lists(st.integers(-20, 20).map(float), min_size=2, max_size=6, unique=True), seed=st.integers(0, 99))
def test_slopes_are_those_of_polyfit_and_undefined_where_a_point_is(x, seed):
    y = np.random.default_rng(seed).uniform(0, 100, (3, len(x)))
    expected = [np.polyfit(x, row, 1)[0] for row in y]
    np.testing.assert_allclose(slopes(np.array(x), y), expected, rtol=1e-9, atol=1e-9)
    y[1, 0] = np.nan
    assert np.isnan(slopes(np.array(x), y)).tolist() == [False, True, False]


@given(sides=SIDES)
def test_resampled_auc_with_unit_weights_is_the_auc(sides):
    positive, negative = map(np.array, sides)
    resampled = resampled_auc(positive, negative, np.ones((2, len(positive))), np.ones((2, len(negative))))
    np.testing.assert_allclose(resampled, auc(positive, negative), atol=1e-12)


@given(values=SCORES)
def test_a_mean_is_over_the_rows_that_have_a_value(values):
    known = [value for value in values if value is not None]
    found = mean_estimate(values, [str(index) for index in range(len(values))])
    assert found.n == len(known)
    assert found.value == (pytest.approx(sum(known) / len(known), abs=1e-9) if known else None)


def test_an_interval_repeats_by_seed():
    one, again, other = (mean_estimate([1.0, 5.0, 6.0], ["a", "b", "c"], seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one.value == other.value
