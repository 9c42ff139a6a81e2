"""The result of a sweep, on made-up scores: which cell is best, what ties with it, and what its folder holds."""

import json

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.evaluation.layer_selection import LayerSweep
from tests.evaluation_cases import keep_rows, make_evaluation, make_sweep, naive_resamples, strict_json

UNMEASURED = {(0, 1.0): ([10.0, 20.0], None), (1, 1.0): ([30.0, 40.0], None), (2, 1.0): ([None, None], None)}


@pytest.mark.parametrize(
    ("cells", "min_coherence", "best"),
    [
        (
            {(3, 2.0): ([90.0, 95.0], 74.9), (5, 1.0): ([40.0, 50.0], 75.0), (5, 2.0): ([44.0, 44.0], 80.0)},
            75.0,
            (5, 1),
        ),
        ({(0, 1.0): ([90.0, 90.0], 60.0), (1, 1.0): ([50.0, 50.0], 80.0)}, 50.0, (0, 1)),
        ({(0, 1.0): ([90.0, 90.0], 60.0), (1, 1.0): ([50.0, 50.0], 80.0)}, 75.0, (1, 1)),
        ({(0, 1.0): ([None, None], 99.0), (1, 1.0): ([3.0, 4.0], 80.0)}, 75.0, (1, 1)),
        ({(0, 1.0): [60.0, None, None, 60.0], (1, 1.0): [40.0] * 4}, 75.0, (0, 1)),
        (UNMEASURED, None, (1, 1)),
        ({(0, 1.0): [5.0], (1, 1.0): ([9.0], 1.0)}, None, (1, 1)),
        ({(2, 1.0): [1.0, 50.0], (5, 1.0): [1.0, 50.0]}, 75.0, (2, 1)),
    ],
    ids=[
        "coherent",
        "low bound",
        "high bound",
        "no score",
        "missing is not 0",
        "unmeasured",
        "ignored",
        "first of equals",
    ],
)
def test_the_best_cell_has_the_highest_score_among_the_coherent(cells, min_coherence, best):
    sweep = make_sweep(cells)
    choice = sweep.best(min_coherence)
    assert (choice.layer, choice.coefficient, choice.dose) == (*best, best[1] / 10)
    assert choice.trait_score == sweep.evaluations[best].trait_score
    assert choice.coherence == sweep.evaluations[best].coherence
    assert f"layer {best[0]} at {best[1]:g} has the highest grumpy score, {choice.trait_score}" in choice.reason


@pytest.mark.parametrize(
    ("cells", "min_coherence", "words"),
    [
        (UNMEASURED, 75.0, r"grumpy: the judge gave no coherence.*min_coherence=None"),
        ({(2, 1.0): ([None, None], 90.0)}, None, "the judge gave none of 1 cells a trait score"),
        ({(0, 1.0): ([None, None], 90.0), (1, 1.0): ([None, None], 95.0)}, 75.0, "none of 2 cells has a trait score"),
        ({(4, 2.0): ([9.0], 40.0), (6, 0.5): ([9.0], 61.25)}, 75.0, r"most coherent is layer 6 at 0\.5 with 61\.2"),
    ],
)
def test_no_eligible_cell_is_an_error_that_says_why(cells, min_coherence, words):
    with pytest.raises(ValueError, match=words):
        make_sweep(cells).best(min_coherence)


CELLS = {
    (0, 1.0): [80.0, 40.0, 60.0, 70.0, None, 90.0],
    (0, 2.0): [75.0, 45.0, 50.0, 75.0, 40.0, 80.0],
    (1, 1.0): [20.0, 10.0, 30.0, 20.0, 10.0, 30.0],
    (1, 2.0): [None, 90.0, None, 40.0, None, None],
    (2, 1.0): ([79.0, 40.0, 60.0, 70.0, 66.0, 90.0], 20.0),
    (2, 2.0): [70.0, 35.0, 55.0, 60.0, None, 85.0],
}


def tied(top, other):
    """Whether the naive bootstrap's interval of the difference, paired by question, includes 0."""
    difference = naive_resamples(top) - naive_resamples(other)
    return np.percentile(difference[~np.isnan(difference)], 2.5) <= 0


def test_ties_are_the_coherent_cells_whose_paired_difference_includes_0():
    sweep = make_sweep(CELLS)
    best = sweep.best()
    top = sweep.evaluations[0, 1.0]
    others = [cell for cell in sweep.evaluations if cell not in {(0, 1.0), (2, 1.0)}]
    assert best.ties == tuple(cell for cell in others if tied(top, sweep.evaluations[cell])) == ((0, 2.0), (1, 2.0))
    assert "2 others tie" in best.reason


@settings(max_examples=5)  # the naive bootstrap is slow
@given(data=st.data())
def test_ties_are_those_of_the_naive_bootstrap_whatever_the_scores(data):
    score = st.one_of(st.none(), st.integers(0, 20).map(float))
    cells = {(layer, 1.0): data.draw(st.lists(score, min_size=4, max_size=4)) for layer in range(2)}
    if all(value is None for scores in cells.values() for value in scores):
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


def test_equal_cells_and_cells_of_one_question_tie_but_a_constant_difference_does_not():
    assert make_sweep({(2, 1.0): [1.0, 50.0], (5, 1.0): [1.0, 50.0]}).best().ties == ((5, 1.0),)
    one = make_sweep({(0, 1.0): [10.0, 30.0], (1, 1.0): [80.0, 70.0]}, questions=["why", "why"], baseline=(1.0,))
    assert one.best().ties == ((0, 1.0),)
    noisy = [0.0, 90.0, 30.0, 60.0]
    assert make_sweep({(0, 1.0): noisy, (1, 1.0): [score + 1 for score in noisy]}).best().ties == ()


def test_the_table_has_the_baseline_and_a_row_for_every_cell():
    sweep = make_sweep({(2, 1.0): [10.0, None, 40.0], (2, 4.0): [None, None, None]}, baseline=(5.0, 7.0, None))
    table = sweep.table()
    assert list(table.index) == [(-1, 0.0), (2, 1.0), (2, 4.0)]
    assert table.loc[(-1, 0.0), ["dose", "trait_score", "n", "missing"]].tolist() == [0.0, 6.0, 3, 1]
    cell, row = sweep.evaluations[2, 1.0].trait_score, table.loc[(2, 1.0)]
    assert (row.trait_score, row.trait_score_low, row.trait_score_high) == (25.0, cell.low, cell.high)
    assert (row.n, row.missing, row.coherence) == (3, 1, 90.0)
    assert table.loc[(2, 4.0)].missing == 3
    assert table.loc[(2, 4.0), ["trait_score", "trait_score_low", "trait_score_high"]].isna().all()


def test_a_layers_dose_response_is_sorted_and_has_the_baseline():
    sweep = make_sweep({(2, 4.0): [1.0], (2, -1.0): [2.0], (3, 4.0): [3.0], (3, -1.0): [4.0]})
    doses = sweep.dose_response(3)
    assert list(doses) == [-1.0, 0.0, 4.0]
    assert doses[0.0] is sweep.baseline
    assert doses[4.0] is sweep.evaluations[3, 4.0]
    with pytest.raises(ValueError, match=r"grumpy: layer 1 was not swept, only \[2, 3\]"):
        sweep.dose_response(1)


@pytest.fixture
def saved(tmp_path):
    """A sweep's folder and the sweep, with what is missing and what is undefined."""
    proxies = {"held_out_auc": (None, 0.5), "relative_norm": (0.25, 0.125)}
    cells = {
        (2, 1.0): [10.0, None, 40.0, 1.0],
        (2, -0.3): [None] * 4,
        (7, 1.0): [1.0, 2.0, 3.0, 4.0],
        (7, -0.3): ([4.0, 4.0, 4.0, 4.0], None),
    }
    sweep = make_sweep(cells, proxies=proxies)
    keep_rows([sweep.baseline, *sweep.evaluations.values()], tmp_path)
    sweep.save(tmp_path)
    return tmp_path, sweep


def test_a_saved_sweep_is_strict_json_and_read_back_as_it_was(saved):
    folder, sweep = saved
    record = strict_json(folder / "layer_sweep.json")
    assert record["format_version"] == 1
    assert [cell["trait_score"]["value"] for cell in record["cells"]] == [17.0, None, 2.5, 4.0]
    assert [cell["missing"] for cell in record["cells"]] == [1, 4, 0, 0]
    # Rows of an earlier sweep of other layers take no part.
    keep_rows([make_evaluation([1.0, 2.0], intervention="layer 9 x 4")], folder)
    loaded = LayerSweep.load(folder)
    assert loaded == sweep
    pandas.testing.assert_frame_equal(loaded.table(), sweep.table())
    pandas.testing.assert_frame_equal(loaded.proxy_correlations(), sweep.proxy_correlations())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda record: json.dumps(record | {"format_version": 2}), "format version 2, and this persona_lens reads 1"),
        (lambda record: json.dumps(record)[:100], "not a whole layer sweep"),
        (lambda record: json.dumps(record | {"cells": [{}]}), "not a whole layer sweep"),
        (lambda record: json.dumps({name: record[name] for name in record if name != "screens"}), "screens"),
        (lambda record: "[]", "not a whole layer sweep"),
    ],
    ids=["version", "cut", "empty cell", "missing field", "list"],
)
def test_a_sweep_that_cannot_be_read_says_why(saved, tmp_path, damage, words):
    file = saved[0] / "layer_sweep.json"
    file.write_text(damage(json.loads(file.read_text())))
    with pytest.raises(ValueError, match=words):
        LayerSweep.load(saved[0])
    with pytest.raises(FileNotFoundError, match="No layer sweep at "):
        LayerSweep.load(tmp_path / "absent")


def test_a_row_without_a_score_line_is_named(saved):
    folder, _ = saved
    scores = folder / "sweep_scores.jsonl"
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="has no line for 1 of 20 rollouts"):
        LayerSweep.load(folder)
