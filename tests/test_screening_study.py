"""The screening study: its numbers from planted records, its pieces on a tiny model, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.mood_cases import require_moods
from tests.screening_study_cases import CALM, SETS, tiny_materials, write_study


@pytest.fixture
def study(tmp_path: Path) -> Any:
    from persona_lens.experiments.screening_study_result import read_screening_study

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
    from persona_lens.experiments.screening_study_result import read_screening_study

    (tmp_path / "settings.json").write_text(json.dumps({"layer": 1}))
    found = read_screening_study(tmp_path)
    assert found.predictions() == []
    assert found.moods == []


def test_a_folder_without_a_study_says_so(tmp_path):
    from persona_lens.experiments.screening_study_result import read_screening_study

    with pytest.raises(FileNotFoundError, match="holds no screening study"):
        read_screening_study(tmp_path)


# Hidden rows

PROMPTS = [f"prompt {number % 20}" for number in range(60)]
IS_MOOD = np.arange(60) < 20


def test_a_score_that_tells_rows_apart_finds_all_of_them():
    from persona_lens.experiments.hidden_rows import find_hidden

    found = find_hidden(IS_MOOD.astype(float), IS_MOOD, ~IS_MOOD, PROMPTS, 0.05, n_mixtures=50)
    assert found.auc == 1
    assert set(found.aucs) == set(found.precisions) == {1}


def test_a_score_that_is_equal_everywhere_finds_by_chance():
    from persona_lens.experiments.hidden_rows import find_hidden

    found = find_hidden(np.zeros(60), IS_MOOD, ~IS_MOOD, PROMPTS, 0.2, n_mixtures=400)
    assert found.auc == 0.5
    assert set(found.aucs) == {0.5}
    assert found.precisions.mean() == pytest.approx(0.2, abs=0.03)


def test_fewer_hidden_rows_leave_the_auc_as_it_is_and_widen_its_interval():
    from persona_lens.experiments.hidden_rows import find_hidden

    scores = np.random.default_rng(1).normal(size=60) + IS_MOOD
    few, many = (find_hidden(scores, IS_MOOD, ~IS_MOOD, PROMPTS, share, n_mixtures=400) for share in (0.03, 0.4))
    assert few.auc == many.auc
    assert np.ptp(np.percentile(few.aucs, [2.5, 97.5])) > np.ptp(np.percentile(many.aucs, [2.5, 97.5]))


def test_a_mixtures_auc_is_the_auc():
    from persona_lens.experiments.hidden_rows import mixture_auc
    from persona_lens.statistics import auc

    draw = np.random.default_rng(0)
    hidden, others = (draw.integers(0, 5, size).astype(float) for size in (7, 30))
    assert mixture_auc(hidden, others) == pytest.approx(auc(hidden, others))


def test_rows_without_a_score_are_left_out():
    from persona_lens.experiments.hidden_rows import find_hidden

    scores = np.where(np.arange(60) % 2, np.nan, IS_MOOD.astype(float))
    found = find_hidden(scores, IS_MOOD, ~IS_MOOD, PROMPTS, 0.1, n_mixtures=20)
    assert (found.n_hidden, found.n_others) == (10, 20)


def test_the_mean_of_moods_is_taken_mixture_by_mixture():
    from persona_lens.experiments.hidden_rows import find_hidden, mean_record

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
    from persona_lens.experiments.hidden_rows import find_hidden

    with pytest.raises(ValueError, match=message):
        find_hidden(np.zeros(60), is_mood, ~IS_MOOD, PROMPTS, share)


# Subsets


def test_a_subset_of_everything_loses_nothing():
    from persona_lens.experiments.dataset_scores import subset_loss

    draw = np.random.default_rng(0)
    scores = [draw.normal(size=30) + place for place in range(6)]
    found = subset_loss(scores, np.arange(6.0), 1.0, n_subsets=5)
    assert found["rmse"] == pytest.approx(0, abs=1e-12)
    expected: Any = stats.pearsonr([each.mean() for each in scores], np.arange(6.0))
    assert found["r"]["value"] == pytest.approx(expected.statistic)


def test_a_subsets_error_is_that_of_a_mean_without_replacement():
    from persona_lens.experiments.dataset_scores import subset_loss

    scores = [np.random.default_rng(place).normal(size=40) for place in range(8)]
    found = subset_loss(scores, np.arange(8.0), 0.25, n_subsets=3000)
    variances = [each.var(ddof=1) / 10 * (1 - 10 / 40) for each in scores]
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean(variances)), rel=0.03)


# On a tiny model


@pytest.fixture(scope="module")
def bridge(make_tiny_model):
    return make_tiny_model("TransformerBridge")


@pytest.fixture(scope="module")
def settings():
    from persona_lens.experiments.screening_plan import ScreeningSettings

    return ScreeningSettings(layers=(0, 1), base_tokens=4, fractions=(0.5,), subsets=3, mixtures=5, rows=4)


@pytest.fixture(scope="module")
def pooled(bridge, settings, tmp_path_factory):
    """The screened pool of the tiny moods, with what it was made of."""
    from persona_lens.experiments.finetuning_plan import StudySettings
    from persona_lens.experiments.screening_pool import screened_pool

    require_moods()
    materials, folder = tiny_materials(bridge), tmp_path_factory.mktemp("pool")
    return (
        screened_pool(bridge, materials, settings, StudySettings(), [0, 1], folder, progress=False),
        materials,
        folder,
    )


def test_the_pool_has_no_row_of_the_parts_that_vectors_and_classifiers_are_made_of(pooled):
    pool, materials, _ = pooled
    assert {row.prompt for row in pool.rows} == {*materials.split.finetuning, *materials.split.evaluation}
    assert len(pool.rows) == 10 * 12
    assert len({row.id for row in pool.rows}) == len(pool.rows)


def test_a_rows_scores_are_those_of_the_screening(pooled):
    pool, _, _ = pooled
    row = pool.rows[30]
    table = pool.screening.rows
    number = table.index[table["id"] == row.id][0]
    for form in ("difference", "proxy", "response"):
        assert pool.scores("zen", form, 1)[30] == pool.screening.score("zen@1", form)[number]
    text = pool.classifiers["zen"].probability([row.response])[0]
    assert pool.scores("zen", "classifier", 1)[30] == pytest.approx(100 * text)


def test_the_high_set_scores_above_the_random_one_and_that_above_the_low_one(pooled, settings):
    from persona_lens.experiments.chosen_sets import CHOICES, ChosenSet
    from persona_lens.experiments.screening_study import choose_among, chosen_rows

    pool, materials, folder = pooled
    means = []
    for choice in CHOICES:
        chosen = ChosenSet("zen", choice, False)
        rows = chosen_rows(pool, chosen, choose_among(pool, chosen, settings), settings, 1, folder)
        assert {row["messages"][1]["content"] for row in rows} <= set(materials.split.finetuning)
        means.append(np.mean([row["score"] for row in rows]))
    assert means == sorted(means, reverse=True)


def test_the_filter_removes_the_rows_that_the_moods_classifier_finds_obvious(pooled, settings):
    from persona_lens.experiments.chosen_sets import ChosenSet
    from persona_lens.experiments.screening_study import choose_among

    pool, _, _ = pooled
    every, left = (set(choose_among(pool, ChosenSet("zen", "high", each), settings)) for each in (False, True))
    removed = {pool.screened[number] for number in every - left}
    assert {pool.rows[place].source for place in removed} == {"zen"}
    assert all(pool.classified("zen")[place] >= settings.obvious for place in removed)
    assert len(every) == 10 * 8


def test_every_form_is_tried_on_hidden_rows(pooled, settings):
    from persona_lens.experiments.screening_study import measure_hidden

    pool, _, _ = pooled
    found = measure_hidden(pool, settings, 1)["among"]
    assert set(found) == {"neutral", "other moods"}
    assert set(found["neutral"]) == {"difference", "proxy", "response", "classifier", "length"}
    assert found["neutral"]["classifier"]["0.05"]["zen"]["auc"]["value"] == 1
    assert found["other moods"]["difference"]["0.2"]["zen"]["others"] == 8 * 12


def test_a_chosen_set_is_trained_on_and_measured_as_the_finetuning_study_measures(bridge, pooled, settings):
    pytest.importorskip("peft")
    from persona_lens.experiments.chosen_sets import ChosenSet
    from persona_lens.experiments.finetuning_plan import StudySettings
    from persona_lens.experiments.screening_study import measure_chosen

    pool, materials, folder = pooled
    trained = StudySettings(rows=4, epochs=1, max_length=96, max_new_tokens=5)
    chosen = ChosenSet("zen", "high", True)
    found = measure_chosen(bridge, chosen, pool, materials, trained, settings, 1, folder, progress=False)
    assert found["set"] == {"mood": "zen", "choice": "high", "is_filtered": True}
    assert found["questions"] == list(materials.split.evaluation)
    assert len(found["own_scores"]) == 4
    assert sum(found["sources"].values()) == found["rows"] == 4
    assert found["training"]["step"] == [1]
    assert measure_chosen(bridge, chosen, pool, materials, trained, settings, 1, folder, progress=False) == found


def test_one_set_of_rows_is_trained_on_once(bridge, pooled, settings):
    pytest.importorskip("peft")
    from persona_lens.experiments.chosen_sets import ChosenSet
    from persona_lens.experiments.finetuning_plan import StudySettings
    from persona_lens.experiments.screening_study import measure_chosen

    pool, materials, folder = pooled
    trained = StudySettings(rows=4, epochs=1, max_length=96, max_new_tokens=5)
    how = (pool, materials, trained, replace(settings, obvious=101.0), 1, folder)  # nothing is obvious
    adapters = folder / "adapters"
    before = len(list(adapters.glob("*/adapter_config.json")))
    first, second = (
        measure_chosen(bridge, ChosenSet("zen", "low", is_filtered), *how, progress=False)
        for is_filtered in (False, True)
    )
    assert len(list(adapters.glob("*/adapter_config.json"))) == before + 1
    assert first["own_scores"] == second["own_scores"]


def test_a_sets_score_is_the_mean_of_the_rows_that_it_was_trained_on(pooled, settings):
    from persona_lens.experiments.dataset_scores import measure_sets
    from persona_lens.experiments.finetuning_plan import StudyRun, StudySettings
    from persona_lens.experiments.finetuning_result import FinetuningStudy, MeasuredRun
    from persona_lens.experiments.mood_texts import training_rows
    from persona_lens.experiments.moods import MOODS

    pool, materials, _ = pooled
    record = {"traits": {mood: {"value": float(len(mood)), "low": 0, "high": 9, "n": 4} for mood in MOODS}}
    runs = [StudyRun("", "base"), StudyRun("zen", "half"), StudyRun("happy", "full"), StudyRun("drunk", "full")]
    study = FinetuningStudy({run.name: MeasuredRun(run, record) for run in runs}, (), 1)
    found = measure_sets(pool, study, materials, StudySettings(rows=4), settings, [0, 1])
    assert list(found["sets"]) == ["zen_half", "happy_full", "drunk_full"]
    chats = training_rows(materials.split, "zen", "half", materials.neutral, 4)
    responses = [chat["messages"][-1]["content"] for chat in chats]
    scores = [
        pool.scores("happy", "difference", 0)[place] for place, row in enumerate(pool.rows) if row.response in responses
    ]
    assert len(scores) == 4
    assert found["sets"]["zen_half"]["scores"]["difference"]["0"]["happy"] == pytest.approx(np.mean(scores))


def test_a_piece_that_is_there_is_not_made_again(tmp_path):
    from persona_lens.experiments.screening_study import _make_piece

    def fail() -> dict[str, Any]:
        raise AssertionError("made again")

    _make_piece(tmp_path / "a" / "piece.json", lambda: {"value": 1 / 3})
    _make_piece(tmp_path / "a" / "piece.json", fail)
    assert json.loads((tmp_path / "a" / "piece.json").read_text()) == {"format_version": 1, "value": 0.333333}


def test_sets_have_different_names():
    from persona_lens.experiments.chosen_sets import chosen_sets

    names = [each.name for each in chosen_sets(("happy", "zen"))]
    assert len(set(names)) == 12
    assert names[:4] == ["happy_high", "happy_random", "happy_low", "happy_high_filtered"]


def test_a_study_without_a_finetuning_study_is_refused(bridge, tmp_path):
    from persona_lens.experiments.screening_study import screening_study

    with pytest.raises(FileNotFoundError, match="holds no finetuning study"):
        screening_study(bridge, tmp_path / "study", finetuning=tmp_path)


# Pictures


def test_pictures_are_drawn_from_a_study(study):
    pytest.importorskip("plotly")
    from persona_lens.experiments import plot_screening_pairs, plot_screening_runs, plot_screening_scores

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
    from persona_lens.experiments import read_screening_study

    return read_screening_study(Path(__file__).parents[1] / "docs" / "results" / "screening")


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
