"""The result of a sweep, on made-up scores: which cell is best, what ties with it, and what its folder holds."""

import json
import re

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.evaluation.layer_selection import LayerSweep
from tests.evaluation_cases import keep_rows, make_evaluation, make_sweep, naive_resamples, strict_json

# --- the best cell -------------------------------------------------------------------------------------------------


def test_the_best_cell_has_the_highest_score_among_the_coherent():
    sweep = make_sweep(
        {
            (3, 1.0): ([20.0, 30.0], 90.0),
            (3, 2.0): ([90.0, 95.0], 74.9),
            (5, 1.0): ([40.0, 50.0], 75.0),
            (5, 2.0): ([44.0, 44.0], 80.0),
        }
    )
    best = sweep.best()
    assert (best.layer, best.coefficient, best.dose) == (5, 1.0, 0.1)
    assert best.trait_score == sweep.evaluations[5, 1.0].trait_score
    assert best.coherence.value == 75.0


@pytest.mark.parametrize(("min_coherence", "layer"), [(50.0, 0), (75.0, 1), (95.0, 2)])
def test_a_higher_bound_on_coherence_leaves_fewer_cells(min_coherence, layer):
    cells = {(0, 1.0): ([90.0, 90.0], 60.0), (1, 1.0): ([50.0, 50.0], 80.0), (2, 1.0): ([10.0, 10.0], 99.0)}
    assert make_sweep(cells).best(min_coherence).layer == layer


def test_a_cell_without_a_score_is_not_the_best():
    sweep = make_sweep({(0, 1.0): ([None, None], 99.0), (1, 1.0): ([3.0, 4.0], 80.0)})
    assert sweep.best().layer == 1


UNMEASURED = {(0, 1.0): ([10.0, 20.0], None), (1, 1.0): ([30.0, 40.0], None), (2, 1.0): ([None, None], None)}


def test_a_coherence_that_nobody_measured_is_not_0():
    with pytest.raises(ValueError, match=r"grumpy: the judge gave no coherence.*min_coherence=None"):
        make_sweep(UNMEASURED).best()


def test_coherence_can_be_left_out_of_the_choice():
    best = make_sweep(UNMEASURED).best(min_coherence=None)
    assert best.layer == 1
    assert "of the 2 of 3 cells with a trait score" in best.reason
    assert make_sweep({(0, 1.0): [5.0], (1, 1.0): ([9.0], 1.0)}).best(None).layer == 1


def test_no_score_in_any_cell_is_an_error():
    with pytest.raises(ValueError, match="the judge gave none of 1 cells a trait score"):
        make_sweep({(2, 1.0): ([None, None], 90.0)}).best(min_coherence=None)


def test_missing_scores_do_not_pull_a_cell_down():
    sweep = make_sweep({(0, 1.0): [60.0, None, None, 60.0], (1, 1.0): [40.0, 40.0, 40.0, 40.0]})
    assert sweep.best().layer == 0


def test_no_coherent_cell_is_an_error_that_names_the_most_coherent():
    sweep = make_sweep({(4, 2.0): ([9.0, 9.0], 40.0), (6, 0.5): ([9.0, 9.0], 61.25)})
    words = (
        "grumpy: none of 2 cells has a trait score and a mean coherence of 75 or more; the most coherent is layer 6 at "
        "0.5 with 61.2. Sweep smaller coefficients, or lower min_coherence."
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        sweep.best()


def test_coherent_cells_without_a_score_are_not_called_incoherent():
    sweep = make_sweep({(0, 1.0): ([None, None], 90.0), (1, 1.0): ([None, None], 95.0)})
    with pytest.raises(ValueError, match="none of 2 cells has a trait score"):
        sweep.best()


def test_the_reason_names_the_scores_and_the_counts():
    cells = {(0, 1.0): [50.0, 70.0], (1, 1.0): [60.0, 58.0], (2, 1.0): ([90.0, 90.0], 10.0)}
    reason = make_sweep(cells, baseline=(5.0, 5.0)).best().reason
    assert reason == (
        "layer 0 at 1 has the highest grumpy score, 60.0 [50.0, 70.0] against 5.0 [5.0, 5.0] unsteered, of the 2 of 3 "
        "cells with a mean coherence of 75 or more; 1 others tie with it within their intervals"
    )


# --- ties ----------------------------------------------------------------------------------------------------------

CELLS = {
    (0, 1.0): [80.0, 40.0, 60.0, 70.0, None, 90.0],
    (0, 2.0): [75.0, 45.0, 50.0, 75.0, 40.0, 80.0],
    (1, 1.0): [20.0, 10.0, 30.0, 20.0, 10.0, 30.0],
    (1, 2.0): [None, 90.0, None, 40.0, None, None],
    (2, 1.0): ([79.0, 40.0, 60.0, 70.0, 66.0, 90.0], 20.0),
    (2, 2.0): [70.0, 35.0, 55.0, 60.0, None, 85.0],
}


def tied(top, other):
    """Whether the naive bootstrap's interval of the difference, paired by question, holds 0."""
    difference = naive_resamples(top) - naive_resamples(other)
    return np.percentile(difference[~np.isnan(difference)], 2.5) <= 0


def test_ties_are_the_coherent_cells_whose_paired_difference_holds_0():
    sweep = make_sweep(CELLS)
    best = sweep.best()
    top = sweep.evaluations[best.layer, best.coefficient]
    assert (best.layer, best.coefficient) == (0, 1.0)
    expected = [cell for cell in sweep.evaluations if cell != (0, 1.0) and cell != (2, 1.0)]
    assert best.ties == tuple(cell for cell in expected if tied(top, sweep.evaluations[cell]))
    assert best.ties == ((0, 2.0), (1, 2.0))


@settings(max_examples=5)  # the naive bootstrap is slow
@given(data=st.data())
def test_ties_are_those_of_the_naive_bootstrap_whatever_the_scores(data):
    score = st.one_of(st.none(), st.integers(0, 20).map(float))
    cells = {(layer, 1.0): data.draw(st.lists(score, min_size=4, max_size=4)) for layer in range(2)}
    if all(each is None for scores in cells.values() for each in scores):
        return
    sweep = make_sweep(cells)
    best = sweep.best()
    other = sweep.evaluations[1 - best.layer, 1.0]
    if other.trait_score.value is None:
        assert best.ties == ()
        return
    finite = np.isfinite(naive_resamples(other)) & np.isfinite(naive_resamples(sweep.evaluations[best.layer, 1.0]))
    if finite.sum() >= 2:
        assert bool(best.ties) == tied(sweep.evaluations[best.layer, 1.0], other)


def test_equal_cells_tie_and_the_first_one_is_taken():
    best = make_sweep({(2, 1.0): [1.0, 50.0], (5, 1.0): [1.0, 50.0]}).best()
    assert (best.layer, best.ties) == (2, ((5, 1.0),))


def test_a_small_difference_on_every_question_is_no_tie():
    noisy = [0.0, 90.0, 30.0, 60.0]
    best = make_sweep({(0, 1.0): noisy, (1, 1.0): [score + 1 for score in noisy]}).best()
    assert (best.layer, best.ties) == (1, ())


def test_one_question_tells_no_cells_apart():
    sweep = make_sweep({(0, 1.0): [10.0, 30.0], (1, 1.0): [80.0, 70.0]}, questions=["why", "why"], baseline=(1.0,))
    assert sweep.best().ties == ((0, 1.0),)


# --- tables --------------------------------------------------------------------------------------------------------


def test_the_table_has_the_baseline_and_a_row_for_every_cell():
    sweep = make_sweep({(2, 1.0): [10.0, None, 40.0], (2, 4.0): [None, None, None]}, baseline=(5.0, 7.0, None))
    table = sweep.table()
    assert list(table.index) == [(-1, 0.0), (2, 1.0), (2, 4.0)]
    assert table.loc[(-1, 0.0), ["dose", "trait_score", "n", "missing"]].tolist() == [0.0, 6.0, 3, 1]
    cell, found = sweep.evaluations[2, 1.0].trait_score, table.loc[(2, 1.0)]
    assert (found.trait_score, found.trait_score_low, found.trait_score_high) == (25.0, cell.low, cell.high)
    assert (found.n, found.missing, found.coherence) == (3, 1, 90.0)
    assert table.loc[(2, 4.0)].missing == 3
    assert table.loc[(2, 4.0), ["trait_score", "trait_score_low", "trait_score_high"]].isna().all()


def test_a_layers_dose_response_is_sorted_and_begins_at_the_baseline():
    sweep = make_sweep({(2, 4.0): [1.0], (2, -1.0): [2.0], (3, 4.0): [3.0], (3, -1.0): [4.0]})
    found = sweep.dose_response(3)
    assert list(found) == [-1.0, 0.0, 4.0]
    assert found[0.0] is sweep.baseline
    assert found[4.0] is sweep.evaluations[3, 4.0]


def test_a_layer_that_was_not_swept_is_refused():
    sweep = make_sweep({(2, 4.0): [1.0], (3, 4.0): [3.0]})
    with pytest.raises(ValueError, match=r"grumpy: layer 1 was not swept, only \[2, 3\]"):
        sweep.dose_response(1)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A sweep's folder and the sweep, with what is missing and what is undefined."""
    screens = {"held_out_auc": (None, 0.5), "relative_norm": (0.25, 0.125)}
    cells = {
        (2, 1.0): [10.0, None, 40.0, 1.0],
        (2, -0.3): [None] * 4,
        (7, 1.0): [1.0, 2.0, 3.0, 4.0],
        (7, -0.3): ([4.0, 4.0, 4.0, 4.0], None),
    }
    sweep = make_sweep(cells, screens=screens)
    keep_rows([sweep.baseline, *sweep.evaluations.values()], tmp_path)
    sweep.save(tmp_path)
    return tmp_path, sweep


def test_a_saved_sweep_is_read_back_as_it_was(saved):
    folder, sweep = saved
    found = LayerSweep.load(folder)
    assert found == sweep
    pandas.testing.assert_frame_equal(found.table(), sweep.table())
    pandas.testing.assert_frame_equal(found.screen_correlations(), sweep.screen_correlations())


def test_a_saved_sweep_is_strict_json_with_a_version(saved):
    record = strict_json(saved[0] / "layer_sweep.json")
    assert record["format_version"] == 1
    assert [cell["trait_score"]["value"] for cell in record["cells"]] == [17.0, None, 2.5, 4.0]
    assert [cell["missing"] for cell in record["cells"]] == [1, 4, 0, 0]


def test_a_folder_without_a_sweep_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="No layer sweep at "):
        LayerSweep.load(tmp_path)


def _without(record, name):
    return {each: value for each, value in record.items() if each != name}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda record: json.dumps(record | {"format_version": 2}), "format version 2, and this persona_lens reads 1"),
        (lambda record: json.dumps(record)[:100], "not a whole layer sweep"),
        (lambda record: json.dumps(_without(record, "doses") | {"cells": [{}]}), "not a whole layer sweep"),
        (lambda record: json.dumps(_without(record, "screens")), "screens"),
        (lambda record: "[]", "not a whole layer sweep"),
    ],
    ids=["version", "cut", "empty cell", "missing field", "list"],
)
def test_a_sweep_that_cannot_be_read_says_why_and_what_to_do(saved, damage, words):
    file = saved[0] / "layer_sweep.json"
    file.write_text(damage(json.loads(file.read_text())))
    with pytest.raises(ValueError, match=words):
        LayerSweep.load(saved[0])


def test_a_row_without_a_score_line_is_named(saved):
    folder, _ = saved
    scores = folder / "sweep_scores.jsonl"
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="has no line for 1 of 20 rollouts"):
        LayerSweep.load(folder)


def test_rows_of_an_earlier_sweep_of_other_layers_take_no_part_in_this_one(saved):
    folder, sweep = saved
    keep_rows([make_evaluation([1.0, 2.0], intervention="layer 9 x 4")], folder)
    assert LayerSweep.load(folder) == sweep
