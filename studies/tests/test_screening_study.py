"""The screening study: its numbers from planted records, its pieces on a tiny model, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from studies.pictures import plot_screening_pairs, plot_screening_runs, plot_screening_scores
from studies.screening_study_result import read_screening_study
from studies.tests.screening_study_cases import CALM, SETS, write_study


@pytest.fixture
def study(tmp_path: Path) -> Any:
    return read_screening_study(write_study(tmp_path))


# What the pieces say together


def test_a_correlation_is_scipys_over_the_sets(study):
    x = [each["scores"]["response"]["1"]["grim"] for each in study.sets.values()]
    y = [each["traits"]["grim"]["value"] for each in study.sets.values()]
    expected: Any = stats.pearsonr(x, y)
    found = study.correlation("grim", "response")
    assert found.value == pytest.approx(expected.statistic)
    assert found[1:3] == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.n == len(SETS)


def test_the_diagonal_of_the_correlations_is_the_own_mood(study):
    table = study.correlations()
    assert list(table.columns) == list(table.index) == list(CALM)
    assert [table.loc[mood, mood] for mood in CALM] == [study.correlation(mood).value for mood in CALM]
    assert table.loc["grim", "calm"] == study.correlation("grim", vectors="calm").value


def test_a_difference_of_correlations_is_paired_over_resampled_sets(study):
    draw = np.random.default_rng(0)
    counts = draw.multinomial(len(SETS), np.full(len(SETS), 1 / len(SETS)), size=2000)
    slow = []
    for each in counts:
        rows = np.repeat(np.arange(len(SETS)), each)
        if len(set(rows.tolist())) < 3:
            continue
        of = {
            form: np.mean([np.corrcoef(study.dataset_scores(m, form)[rows], study.after(m)[rows])[0, 1] for m in CALM])
            for form in ("difference", "response")
        }
        slow.append(of["difference"] - of["response"])
    found = study.correlation_difference("difference", "response")
    means = [np.mean([study.correlation(mood, form).value for mood in CALM]) for form in ("difference", "response")]
    assert found.value == pytest.approx(means[0] - means[1])
    assert found[1:3] == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.02)


def test_a_moods_own_sets_can_be_left_out(study):
    chosen = [each["mood"] != "grim" for each in study.sets.values()]
    expected = np.corrcoef(study.dataset_scores("grim")[chosen], study.after("grim")[chosen])[0, 1]
    found = study.correlation("grim", without_own=True)
    assert (found.value, found.n) == (pytest.approx(expected), len(SETS) - 2)
    means = [study.correlation(mood, without_own=True).value for mood in CALM]
    assert study.mean_correlation(without_own=True).value == pytest.approx(np.mean(means))


def test_a_form_differs_by_nothing_from_itself(study):
    assert study.correlation_difference("proxy", "proxy")[:3] == pytest.approx((0, 0, 0))


def test_the_classifiers_score_has_no_layer(study):
    assert study.mean_correlation("classifier", layer=0) == study.mean_correlation("classifier")


def test_every_layer_has_its_own_correlation(study):
    table = study.layer_table()
    assert list(table.index) == [0, 1]
    assert table.loc[0, "proxy"] == study.mean_correlation("proxy", 0).value != table.loc[1, "proxy"]


def test_a_subsets_error_is_in_units_of_the_sets_spread(study):
    assert study.subset_table().loc[0.1].to_dict() == pytest.approx({"error": 0.25, "r": 0.8})


def test_sets_are_compared_prompt_by_prompt_and_missing_answers_are_left_out(study):
    high, low = (study.run("grim", choice, is_filtered=False) for choice in ("high", "low"))
    found = study.difference(high, low)
    assert found.value == pytest.approx(np.mean([39, 45, 36]))
    assert found.n == 3


def test_a_set_that_is_not_measured_is_none(study):
    assert study.run("grim", "high", is_filtered=True) is None


def test_predictions_hold_where_the_whole_interval_is_above_the_bound(study):
    found = {each.what: each for each in study.predictions()}
    assert found["grim: high above random"].held
    assert not found["grim: random above low"].held
    assert found["grim: random above low"].found.value == pytest.approx(np.mean([-1, 5, -4]))
    assert found["mean AUC of rows hidden at 5% among neutral ones"].held
    assert found["r of the projection difference above that of the plain projection"].found.n == len(SETS)
    assert list(study.prediction_table().index) == list(found)


def test_tables_have_a_row_for_each_piece(study):
    assert set(study.run_table().index) == {"grim_high", "grim_random", "grim_low"}
    assert study.run_table().loc["grim_high", "own_rows"] == 3
    assert study.pair_table("ordered").loc[("sycophancy", "text", 1), "value"] == 0.9
    assert study.hidden_table().loc[("neutral", "difference", 0.05), "value"] == 0.95
    assert study.hidden_table("precision", "grim").loc[("neutral", "difference", 0.05), "value"] == 0.8


def test_pieces_that_are_not_there_yet_are_empty(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"layer": 1}))
    found = read_screening_study(tmp_path)
    assert found.predictions() == []
    assert found.moods == []


def test_a_folder_without_a_study_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no screening study"):
        read_screening_study(tmp_path)


# Pictures


def test_pictures_are_drawn_from_a_study(study):
    pytest.importorskip("plotly")

    shown = str(plot_screening_scores(study, "proxy").to_json())
    assert "dataset score: proxy" in shown
    assert all(mood in shown for mood in CALM)
    bars = plot_screening_runs(study)
    assert [bar.name for bar in bars.data] == ["high", "random", "low"]
    assert bars.data[0].y == (60.0,)
    assert "sycophancy, text" in str(plot_screening_pairs(study).to_json())


# The committed records


@pytest.fixture(scope="module")
def committed():
    return read_screening_study(Path(__file__).parents[2] / "docs" / "results" / "screening")


def hundredths(found: Any) -> list[float]:
    return [round(each, 2) for each in found[:3]]


def test_the_committed_sets_say_what_the_experiments_page_says(committed):
    own = [committed.correlation(mood) for mood in committed.moods]
    others = [committed.correlation(mood, without_own=True) for mood in committed.moods]
    assert {found.n for found in own} == {18}
    assert [pick(round(found.value, 2) for found in own) for pick in (min, max)] == [0.66, 0.95]
    assert [pick(round(found.value, 2) for found in others) for pick in (min, max)] == [0.58, 0.85]
    assert all(found.low > 0 for found in own + others)
    table = committed.correlations()
    assert all(table.loc[mood].idxmax() == mood for mood in committed.moods)
    assert hundredths(committed.mean_correlation()) == [0.77, 0.69, 0.82]
    assert hundredths(committed.mean_correlation("classifier")) == [0.95, 0.83, 0.96]
    difference = committed.correlation_difference("difference", "response")
    assert [round(each, 3) for each in difference[:3]] == [0.002, -0.018, 0.028]
    assert committed.subset_table()["r"].round(2).tolist() == [0.65, 0.73, 0.76]


def test_the_committed_hidden_rows_say_what_the_experiments_page_says(committed):
    assert hundredths(committed.auc()) == [0.83, 0.78, 0.88]
    assert hundredths(committed.auc("classifier")) == [0.97, 0.94, 0.99]
    assert hundredths(committed.auc("proxy", among="other moods")) == [0.90, 0.89, 0.92]
    assert [round(committed.precision(share=share).value, 2) for share in (0.01, 0.05, 0.2)] == [0.29, 0.43, 0.63]


def test_the_committed_predictions_held_or_not_as_the_experiments_page_says(committed):
    held = {each.what for each in committed.predictions() if each.held}
    assert held >= {f"{mood}: high above random" for mood in ("depressed", "childish")}
    assert held >= {f"{mood}: high above random, after the filter" for mood in ("depressed", "childish")}
    assert held >= {f"{mood}: random above low" for mood in ("childish", "happy")}
    assert not held & {"depressed: random above low", "happy: high above random"}
    assert not any(each.held for each in committed.predictions()[:3])
    table = committed.run_table()
    scores = {name: round(table.loc[name, "score"]) for name in ("depressed_high", "childish_high", "happy_high")}
    assert scores == {"depressed_high": 28, "childish_high": 33, "happy_high": 24}


def test_the_committed_pairs_say_what_the_experiments_page_says(committed):
    auc, ordered = (committed.pair_table(measure)["value"].round(2) for measure in ("auc", "ordered"))
    assert (auc["sycophancy", "text", 19], ordered["sycophancy", "text", 19]) == (0.76, 0.80)
    assert (auc["hallucination", "text", 14], ordered["hallucination", "text", 14]) == (0.99, 1.00)
    assert (auc["sycophancy", "letter", 19], ordered["sycophancy", "letter", 19]) == (0.58, 0.50)
    assert (auc["hallucination", "letter", 14], auc["hallucination", "letter", 19]) == (0.59, 0.92)
    assert committed.pairs["sycophancy_text"]["counts"]["subjects"] == 49
