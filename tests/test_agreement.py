"""Two judges are compared on the same rows: what is matched, counted, undefined, refused and shown."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from persona_lens.interop.responses import read_reference_csv
from persona_lens.judges.agreement import (
    TABLE_SIZE,
    agreement_statistics,
    judge_agreement,
    resampled_kappa,
    resampled_pearson,
    resampled_ranks,
    resampled_spearman,
)
from persona_lens.judges.classifier import SentimentJudge
from persona_lens.judges.scores import score_rollouts
from persona_lens.rollouts.rows import Rollout
from persona_lens.statistics import N_RESAMPLES, Estimate, question_resamples
from persona_lens.traits.trait import load_trait
from tests.agreement_cases import (
    FIRST,
    QUESTIONS,
    ROWS,
    SCORES,
    SECOND,
    STATISTICS,
    naive,
    naive_interval,
    numbers,
    scored,
)

UNDEFINED = (None, None, None)

# --- what must hold for any scores ---------------------------------------------------------------------------------


@given(rows=ROWS)
def test_agreement_is_symmetric(rows):
    first, second, questions = map(list, zip(*rows, strict=True))
    one = judge_agreement(scored(first, questions), scored(second, questions))
    other = judge_agreement(scored(second, questions), scored(first, questions))
    assert numbers(one) == pytest.approx(numbers(other), abs=1e-7)
    assert one.quarters[True, False] == other.quarters[False, True]


@given(rows=ROWS, shuffle=st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(rows, shuffle):
    first, second, questions = map(list, zip(*rows, strict=True))
    judged, others = scored(first, questions), scored(second, questions)
    plain = judge_agreement(judged, others)
    assert judge_agreement(judged, shuffle.sample(others, len(others))) == plain
    mixed = judge_agreement(shuffle.sample(judged, len(judged)), others)
    assert numbers(mixed) == pytest.approx(numbers(plain), abs=1e-7)
    assert set(mixed.pairs) == set(plain.pairs)


@given(scores=st.lists(SCORES, min_size=3, max_size=10, unique=True))
def test_a_judge_agrees_with_itself(scores):
    found = judge_agreement(scored(scores), scores)
    assert (found.pearson.value, found.spearman.value, found.agreeing.value) == pytest.approx((1, 1, 1))
    one_side = len({score >= 50 for score in scores}) == 1
    assert found.kappa.value is None if one_side else found.kappa.value == pytest.approx(1)


def test_a_judge_and_its_reverse_disagree_wholly():
    found = judge_agreement(scored(FIRST), [100 - score - 1e-3 for score in FIRST])
    assert (found.pearson.value, found.spearman.value, found.kappa.value) == pytest.approx((-1, -1, -1))


# --- what is undefined ---------------------------------------------------------------------------------------------


def test_a_constant_side_has_no_correlation():
    found = judge_agreement(scored(FIRST), [70.0] * len(FIRST))
    assert found.pearson[:3] == found.spearman[:3] == UNDEFINED
    assert found.kappa.value == 0


def test_scores_that_differ_by_rounding_are_constant():
    almost = [50.0, 50.0, 50.00000000000001, 50.0]
    found = judge_agreement(scored([1.0, 2.0, 3.0, 4.0]), almost)
    assert found.pearson[:3] == found.spearman[:3] == UNDEFINED


def test_kappa_is_undefined_where_no_row_shows_the_trait():
    found = judge_agreement(scored([1.0, 2.0, 3.0]), [4.0, 2.0, 3.0])
    assert found.kappa == Estimate(None, None, None, 3)
    assert found.agreeing == Estimate(1.0, 1.0, 1.0, 3)


def test_one_question_has_no_interval():
    found = judge_agreement(scored(FIRST, ["why"] * 10), SECOND)
    assert found.pearson == Estimate(pytest.approx(stats.pearsonr(FIRST, SECOND).statistic), None, None, 10)


def test_rows_without_any_common_score_have_no_statistics():
    found = judge_agreement(scored([None, 3.0]), [3.0, None])
    assert [found.pearson, found.spearman, found.kappa, found.agreeing] == [Estimate(None, None, None, 0)] * 4
    assert "Pearson undefined" in str(found)


# --- missing scores ------------------------------------------------------------------------------------------------


def test_a_missing_score_is_counted_and_compared_with_nothing():
    first, second = [*FIRST, None, 50.0, None, None], [*SECOND, 3.0, None, None, 90.0]
    questions = [*QUESTIONS, "a", "b", "f", "f"]
    found = judge_agreement(scored(first, questions), second)
    assert found.missing == {"first": 2, "second": 1, "both": 1}
    assert (found.n, found.n_questions, len(found.pairs)) == (10, 5, 14)
    assert numbers(found) == numbers(judge_agreement(scored(FIRST, QUESTIONS), SECOND))
    assert "without a score: 2 by first only, 1 by second only, 1 by both" in str(found)


def test_coherence_is_compared_when_asked_for():
    first = scored([0.0] * 4, coherence=[90.0, 20.0, 60.0, None])
    second = scored([None] * 4, coherence=[80.0, 10.0, 70.0, 5.0])
    found = judge_agreement(first, second, of="coherence")
    assert [pair[1:] for pair in found.pairs] == [(90.0, 80.0), (20.0, 10.0), (60.0, 70.0), (None, 5.0)]
    assert found == judge_agreement(first, [80.0, 10.0, 70.0, 5.0], of="coherence")
    assert "coherence of grumpy" in str(found)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (slice(0, 5), slice(2, 10), "3 are in both, 2 only in the first and 5 only in the second"),
        (slice(0, 5), slice(0, 6), "5 are in both, 0 only in the first and 1 only in the second"),
        (slice(0, 6), slice(0, 5), "5 are in both, 1 only in the first and 0 only in the second"),
    ],
)
def test_other_rows_are_refused_with_counts(first, second, words):
    with pytest.raises(ValueError, match=words):
        judge_agreement(scored(FIRST)[first], scored(FIRST)[second])


def test_the_same_keys_with_other_responses_are_refused():
    other = scored([1.0, 2.0])
    other[1] = replace(other[1], rollout=replace(other[1].rollout, response="not so"))
    with pytest.raises(ValueError, match="1 of 2 keys have another response in the second"):
        judge_agreement(scored([1.0, 2.0]), other)


@pytest.mark.parametrize("place", ["first", "second"])
def test_repeated_rows_are_refused_where_keys_match_them(place):
    rows = {"first": scored([1.0, 2.0]), "second": scored([1.0, 2.0])}
    rows[place] += rows[place][:1]
    with pytest.raises(ValueError, match=f"1 keys repeat in the {place}"):
        judge_agreement(rows["first"], rows["second"])


@pytest.mark.parametrize("bad", [-0.1, 100.1, float("nan"), True, "5"])
def test_a_column_holds_scores_or_none(bad, shapes_unchecked):
    with pytest.raises(ValueError, match="Score 2 of the column: expected 0 to 100, or None"):
        judge_agreement(scored([1.0, 2.0]), [3.0, bad])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"second": [1.0]}, "2 rows, 1 scores"),
        ({"first": [], "second": []}, "no rows to compare"),
        ({"threshold": 100.5}, "threshold is a score from 0 to 100, got 100.5"),
        ({"names": ("a", "a")}, "got 'a' twice"),
    ],
)
def test_a_call_that_means_nothing_is_refused(change, words):
    parts = {"first": scored([1.0, 2.0]), "second": [1.0, 2.0]} | change
    with pytest.raises(ValueError, match=words):
        judge_agreement(parts.pop("first"), parts.pop("second"), **parts)


def test_scored_rollouts_among_numbers_are_refused(shapes_unchecked):
    rows = scored([1.0, 2.0])
    with pytest.raises(ValueError, match="got 1 scored rollouts among 2"):
        judge_agreement(rows, [rows[0], 2.0])


# --- how it is shown -----------------------------------------------------------------------------------------------


def test_the_summary_is_strict_json_of_the_same_numbers():
    found = judge_agreement(scored([*FIRST, None]), [*SECOND, 3.0], names=("cheap", "people"))
    read = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert read["names"] == ["cheap", "people"]
    assert read["kappa"] == found.kappa._asdict()
    assert read["missing"] == {"first": 1, "second": 0, "both": 0}
    assert read["at_or_above_threshold"] == {"both": 4, "first": 1, "second": 1, "neither": 4}
    json.dumps(judge_agreement(scored([None]), [None]).summary(), allow_nan=False)


def test_the_table_begins_with_the_rows_that_are_farthest_apart():
    table = judge_agreement(scored([10.0, None, 50.0, 90.0]), [15.0, 1.0, 50.0, 20.0]).table()
    assert table["question"].tolist() == ["question 3", "question 0", "question 2", "question 1"]
    assert table["difference"].tolist()[:3] == [-70.0, 5.0, 0.0]
    assert np.isnan(table["first"].iloc[3])


# --- the statistics are those of scipy, scikit-learn and counting by hand


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


# --- real data -----------------------------------------------------------------------------------------------------


def reference_rows(folder):
    rows = []
    for polarity, name in (("positive", "pos"), ("negative", "neg")):
        for index, row in enumerate(read_reference_csv(folder / f"qwen3-4b_evil_{name}.csv", "evil")):
            said = row.conversation
            parts = ("evil", polarity, int(said.instruction), "", said.question, index, said.response)
            rows.append((Rollout(*parts, None, "stop", "qwen3-4b", 0), row.trait_score))
    return rows


def test_a_lexicon_runs_against_the_reference_judge_of_evil(reference_data):
    pytest.importorskip("vaderSentiment", reason="vaderSentiment, the lexicon, is not installed")
    rollouts, judged = map(list, zip(*reference_rows(reference_data / "reference_rollouts"), strict=True))
    pleasant = score_rollouts(rollouts, load_trait("evil"), judge=SentimentJudge(), progress=False)
    found = judge_agreement(pleasant, judged, names=("pleasant words", "reference judge"))
    assert found.n + found.missing["first"] == 200
    # Evil answers use unpleasant words: the agreement is far below chance, and so is every resample.
    assert found.spearman.high < -0.5
    assert found.kappa.high < 0
    scores = [row.trait_score for row in pleasant]
    assert found.pearson.value == pytest.approx(stats.pearsonr(scores, judged).statistic)
    questions = [rollout.question for rollout in rollouts]
    assert found.spearman[1:3] == pytest.approx(naive_interval("spearman", scores, judged, questions), abs=1e-9)
