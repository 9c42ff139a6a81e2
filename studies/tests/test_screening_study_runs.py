"""The screening study on a tiny model: its pool, the rows it chooses, what is trained on and measured."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from studies.chosen_sets import CHOICES, ChosenSet, chosen_sets
from studies.dataset_scores import measure_sets
from studies.finetuning_plan import StudyRun, StudySettings
from studies.finetuning_result import FinetuningStudy, MeasuredRun
from studies.mood_texts import training_rows
from studies.moods import MOODS
from studies.screening_plan import ScreeningSettings
from studies.screening_pool import screened_pool
from studies.screening_study import (
    _make_piece,
    choose_among,
    chosen_rows,
    measure_chosen,
    measure_hidden,
    screening_study,
)
from studies.tests.mood_cases import require_moods
from studies.tests.screening_study_cases import tiny_materials

# On a tiny model


@pytest.fixture(scope="module")
def bridge(make_tiny_model):
    return make_tiny_model("TransformerBridge")


@pytest.fixture(scope="module")
def settings():
    return ScreeningSettings(layers=(0, 1), base_tokens=4, fractions=(0.5,), subsets=3, mixtures=5, rows=4)


@pytest.fixture(scope="module")
def pooled(bridge, settings, tmp_path_factory):
    """The screened pool of the tiny moods, with what it was made of."""

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
    pool, materials, folder = pooled
    means = []
    for choice in CHOICES:
        chosen = ChosenSet("zen", choice, False)
        rows = chosen_rows(pool, chosen, choose_among(pool, chosen, settings), settings, 1, folder)
        assert {row["messages"][1]["content"] for row in rows} <= set(materials.split.finetuning)
        means.append(np.mean([row["score"] for row in rows]))
    assert means == sorted(means, reverse=True)


def test_the_filter_removes_the_rows_that_the_moods_classifier_finds_obvious(pooled, settings):
    pool, _, _ = pooled
    every, left = (set(choose_among(pool, ChosenSet("zen", "high", each), settings)) for each in (False, True))
    removed = {pool.screened[number] for number in every - left}
    assert {pool.rows[place].source for place in removed} == {"zen"}
    assert all(pool.classified("zen")[place] >= settings.obvious for place in removed)
    assert len(every) == 10 * 8


def test_every_form_is_tried_on_hidden_rows(pooled, settings):
    pool, _, _ = pooled
    found = measure_hidden(pool, settings, 1)["among"]
    assert set(found) == {"neutral", "other moods"}
    assert set(found["neutral"]) == {"difference", "proxy", "response", "classifier", "length"}
    assert found["neutral"]["classifier"]["0.05"]["zen"]["auc"]["value"] == 1
    assert found["other moods"]["difference"]["0.2"]["zen"]["others"] == 8 * 12


def test_a_chosen_set_is_trained_on_and_measured_as_the_finetuning_study_measures(bridge, pooled, settings):
    pytest.importorskip("peft")

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
    def fail() -> dict[str, Any]:
        raise AssertionError("made again")

    _make_piece(tmp_path / "a" / "piece.json", lambda: {"value": 1 / 3})
    _make_piece(tmp_path / "a" / "piece.json", fail)
    assert json.loads((tmp_path / "a" / "piece.json").read_text()) == {"format_version": 1, "value": 0.333333}


def test_sets_have_different_names():
    names = [each.name for each in chosen_sets(("happy", "zen"))]
    assert len(set(names)) == 12
    assert names[:4] == ["happy_high", "happy_random", "happy_low", "happy_high_filtered"]


def test_a_study_without_a_finetuning_study_is_refused(bridge, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finetuning study"):
        screening_study(bridge, tmp_path / "study", finetuning=tmp_path)
