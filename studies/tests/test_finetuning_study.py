import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from persona_lens.models.structure import ModelIdentity
from studies.finetuning_plan import StudyRun, StudySettings, study_runs
from studies.finetuning_result import read_study
from studies.finetuning_study import keep_settings
from studies.moods import MOODS as ALL_MOODS
from studies.pictures import _points, plot_study_mitigation, plot_study_scores, plot_study_shifts, plot_study_trade_off

MOODS = ("calm", "grim", "keen")


@pytest.fixture
def study_folder(tmp_path: Path) -> Path:
    """A folder of made-up records: scores follow the shift along the own vector, and methods lower the score."""

    (tmp_path / "runs").mkdir()
    settings = StudySettings(mitigated=("grim",), post_hoc=(1.0, 2.0), preventative=(1.0,), all_layers=(1.0,))
    for number, run in enumerate(study_runs(settings, MOODS)):
        (tmp_path / "runs" / f"{run.name}.json").write_text(json.dumps(record(run, number)))
    chosen = {"grim": {"layer": 1}, "calm": {"layer": 1}, "keen": {"layer": 0}}
    (tmp_path / "layers.json").write_text(json.dumps(chosen))
    return tmp_path


def record(run: Any, number: int) -> dict[str, Any]:
    draw = np.random.default_rng(number)
    strength = {"base": 0.0, "half": 1.0, "full": 2.0, "benign": 0.1}[run.rows]
    scores = {mood: 20 + 25 * strength * (mood == run.mood) + float(draw.normal()) for mood in MOODS}
    if run.mood:
        scores[run.mood] -= 10 * abs(run.coefficient)
    own = [scores.get(run.mood, 0.0) + offset for offset in (-2.0, 0.0, 2.0)]
    margin = 1.0 - (0.2 * abs(run.coefficient) if run.method == "post-hoc" else 0.1 * (run.method == "preventative"))
    found = {
        "run": {"mood": run.mood, "rows": run.rows, "method": run.method, "coefficient": run.coefficient},
        "questions": ["a", "b", "c"],
        "traits": {mood: estimate(value) for mood, value in scores.items()},
        "likelihood_ratios": {run.mood: estimate(strength)} if run.mood else {},
        "coherence": estimate(80.0),
        "capability": {name: estimate(margin) for name in ("accuracy", "margin", "nll")},
        "training": None if run.rows == "base" else {"step": [1, 2], "loss": [3.0, 2.0]},
    }
    if run.mood:
        found["own_scores"] = own
    if run.method == "none":
        found["shift"] = {mood: [0.0, strength * (mood == run.mood) + 0.1 * float(draw.normal())] for mood in MOODS}
    return found


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 1, "high": value + 1, "n": 3}


def test_runs_have_different_names() -> None:
    names = [run.name for run in study_runs(StudySettings(), ALL_MOODS)]
    assert len(set(names)) == len(names)


def test_every_mood_is_trained_at_both_severities() -> None:
    plain = [
        (run.mood, run.rows) for run in study_runs(StudySettings(), ALL_MOODS) if run.method == "none" and run.mood
    ]
    assert sorted(plain) == sorted((mood, rows) for mood in ALL_MOODS for rows in ("full", "half"))


def test_what_acts_while_answering_shares_the_plain_runs_adapter() -> None:
    plain = StudyRun("happy", "full")
    assert StudyRun("happy", "full", "post-hoc", -1.0).trained_as == plain
    assert StudyRun("happy", "full", "negative system prompt").trained_as == plain
    assert StudyRun("happy", "full", "CAFT").trained_as == StudyRun("happy", "full", "CAFT")
    assert StudyRun("", "base").trained_as is None


def test_correlation_is_scipys_over_the_sets_and_the_base(study_folder: Path) -> None:
    study = read_study(study_folder)
    records = [json.loads(path.read_text()) for path in (study_folder / "runs").glob("*.json")]
    sets = [each for each in records if each["run"]["method"] == "none" and each["run"]["rows"] != "benign"]
    expected: Any = stats.pearsonr(
        [each["shift"]["grim"][1] for each in sets], [each["traits"]["calm"]["value"] for each in sets]
    )
    found = study.correlation("grim", "calm")
    assert len(sets) == 7 == found.n
    assert found.value == pytest.approx(expected.statistic)
    # Fisher: atanh(r) has standard error 1 / sqrt(n - 3)
    assert math.atanh(found.high) - math.atanh(found.low) == pytest.approx(2 * 1.959964 / 2.0, rel=1e-4)


def test_own_trait_stands_on_the_diagonal(study_folder: Path) -> None:
    study = read_study(study_folder)
    table = study.correlations()
    assert all(table.loc[mood, mood] == study.correlation(mood, mood).value for mood in MOODS)
    assert all(table.loc[mood, mood] > 0.9 for mood in MOODS)
    assert table.loc["calm", "grim"] == study.correlation("grim", "calm").value


def test_the_trait_table_begins_with_the_base_and_leaves_methods_out(study_folder: Path) -> None:
    table = read_study(study_folder).trait_table()
    assert list(table.columns) == list(MOODS)
    assert set(table.index) == {"base", *(f"{mood}_{rows}" for mood in MOODS for rows in ("full", "half"))}


def test_a_difference_is_paired_answer_by_answer(study_folder: Path) -> None:
    study = read_study(study_folder)
    plain, treated = study.runs["grim_full"], study.runs["grim_full_preventative_x1"]
    found = study.difference(treated, plain)
    expected = np.subtract(treated.score("grim").value, plain.score("grim").value)
    # The answers vary alike in both runs, so the difference does not vary at all.
    assert found[:3] == pytest.approx([expected] * 3)


def test_equal_capability_is_read_between_two_doses_of_post_hoc_steering(study_folder: Path) -> None:
    study = read_study(study_folder)
    treated = study.runs["grim_full_preventative_x1"]  # margin .9: half way from no post-hoc steering (1) to 1 x (.8)
    plain, once = study.runs["grim_full"], study.methods("grim", "post-hoc")[0]
    half_way = np.mean([plain.score("grim").value, once.score("grim").value])
    found = study.at_equal_capability(treated, "margin")
    assert found is not None
    assert found.value == pytest.approx(treated.score("grim").value - half_way)


def test_there_is_no_equal_capability_where_post_hoc_steering_never_falls_so_low(study_folder: Path) -> None:
    study = read_study(study_folder)
    treated = study.runs["grim_full_preventative_x1"]
    low = {**treated.record, "capability": {name: estimate(-5.0) for name in ("accuracy", "margin", "nll")}}
    assert study.at_equal_capability(replace(treated, record=low), "margin") is None


def test_the_table_has_a_row_a_run_and_missing_numbers_stay_missing(study_folder: Path) -> None:
    study = read_study(study_folder)
    table = study.table()
    assert set(table.index) == set(study.runs)
    assert np.isnan(table.loc["base", "loss"])
    assert np.isnan(table.loc["base", "trait"])
    assert table.loc["grim_full", "loss"] == 2.0


def test_a_folder_without_a_study_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no finetuning study"):
        read_study(tmp_path)


def test_pictures_are_drawn_from_a_study(study_folder: Path) -> None:
    study = read_study(study_folder)
    shown = str(plot_study_shifts(study).to_json())
    assert all(mood in shown for mood in MOODS)
    assert "post-hoc" in str(plot_study_mitigation(study).to_json())
    assert "post-hoc" in str(plot_study_trade_off(study, "grim").to_json())
    assert "grim_half" in str(plot_study_scores(study).to_json())


def test_a_folder_of_another_study_is_refused_and_more_mitigated_moods_are_added(tmp_path: Path) -> None:
    model = ModelIdentity("tiny", "TransformerBridge", 2, 8, "raw", "0", (0.0,))
    path = tmp_path / "settings.json"
    for moods in (("calm",), ("grim", "calm"), ("keen",)):
        keep_settings(path, StudySettings(rows=8, mitigated=moods), model)
    assert json.loads(path.read_text())["mitigated"] == ["calm", "grim", "keen"]
    with pytest.raises(ValueError, match=r"another rows \(8, now 9\): choose another folder"):
        keep_settings(path, StudySettings(rows=9, mitigated=("calm",)), model)


def test_the_price_in_the_picture_is_the_likelihood_of_neutral_text(study_folder: Path) -> None:
    study = read_study(study_folder)
    plain = next(point for point in _points(study, "grim") if point.method == "none")
    assert plain.capability[:3] == pytest.approx((-1.0, -2.0, 0.0))  # of an NLL of 1 [0, 2]


def test_the_committed_records_say_what_the_readme_says() -> None:
    study = read_study(Path(__file__).parents[2] / "docs" / "results" / "finetuning")
    own = {mood: study.correlation(mood, mood) for mood in study.moods}
    assert len(own) == 9
    assert {found.n for found in own.values()} == {19}
    assert [round(pick(found.value for found in own.values()), 2) for pick in (min, max)] == [0.51, 0.83]
    assert all(found.low > 0 for found in own.values())
    table = study.correlations()
    assert all(table.loc[mood].drop(mood).max() < found.value for mood, found in own.items())
    scores = {"none": 43, "CAFT": 18, "CAFT, one layer": 45, "preventative, all layers": 9}
    assert {name: round(study.methods("depressed", name)[0].own.value) for name in scores} == scores


def test_the_committed_records_say_what_the_documentation_says_of_the_predictions() -> None:
    study = read_study(Path(__file__).parents[2] / "docs" / "results" / "finetuning")
    assert len(study.runs) == 54
    assert study.mitigated == ["childish", "depressed", "happy"]

    def lower(mood, method, measure):
        found = study.at_equal_capability(study.methods(mood, method)[0], measure)
        assert found is not None
        return found.high < 0  # with its interval

    held = {
        mood: [lower(mood, "preventative", measure) for measure in ("nll", "coherence")] for mood in study.mitigated
    }
    assert held == {"childish": [True, True], "depressed": [True, True], "happy": [True, False]}

    def differs(found):  # by its whole interval
        assert None not in found
        return found.low > 0 or found.high < 0

    one_layer = {
        mood: study.difference(study.methods(mood, "CAFT, one layer")[0], study.runs[f"{mood}_full"])
        for mood in study.mitigated
    }
    assert [mood for mood, found in one_layer.items() if differs(found)] == ["childish"]
    penalty = {
        mood: study.difference(study.methods(mood, "penalty")[0], study.methods(mood, "preventative")[0])
        for mood in study.mitigated
    }
    assert {mood: found.low > 0 for mood, found in penalty.items()} == {
        "childish": False,
        "depressed": False,
        "happy": True,
    }
