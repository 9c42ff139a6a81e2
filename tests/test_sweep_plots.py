"""The pictures of a sweep carry its numbers and leave out what is missing."""

from dataclasses import replace

import numpy as np
import pandas
import pytest

from persona_lens.plots.layers import plot_frontier, plot_layer_sweep
from tests.evaluation_cases import make_sweep
from tests.plot_cases import CELLS, shown, traces

# --- the sweep -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["trait_score", "coherence"])
def test_each_cell_of_the_heat_map_has_its_score_from_the_table(value):
    sweep = make_sweep(CELLS)
    heat = plot_layer_sweep(sweep, value).data[0]
    drawn = pandas.DataFrame(list(heat.z), index=list(sweep.coefficients), columns=list(sweep.layers), dtype=float)
    for layer, coefficient in CELLS:
        expected = sweep.table().loc[(layer, coefficient), value]
        assert np.array_equal(drawn.loc[coefficient, layer], expected, equal_nan=True)
    assert (heat.zmin, heat.zmax) == (0, 100)


def test_the_axes_of_the_heat_map_name_layers_and_coefficients():
    figure = plot_layer_sweep(make_sweep(CELLS))
    assert figure.layout.xaxis.ticktext == ("2", "5", "9")
    assert figure.layout.yaxis.ticktext == ("1", "2")


def test_a_cell_without_a_score_is_blank_and_the_picture_says_so():
    figure = plot_layer_sweep(make_sweep(CELLS))
    assert figure.data[0].z[1][1] is None
    assert figure.data[0].text[1][1] == ""
    assert "grey cells have no trait score" in figure.layout.title.text


def test_a_whole_sweep_does_not_speak_of_grey_cells():
    assert "grey" not in plot_layer_sweep(make_sweep(CELLS), "coherence").layout.title.text


def frames(figure, name):
    """The middle of each frame, in places on the axes."""
    return [((one.x0 + one.x1) / 2, (one.y0 + one.y1) / 2) for one in figure.layout.shapes if one.name == name]


def test_the_best_cell_is_framed_and_those_tied_with_it_otherwise():
    sweep = make_sweep(CELLS)
    figure, best = plot_layer_sweep(sweep), sweep.best()
    assert (best.layer, best.coefficient, best.ties) == (2, 2.0, ((9, 1.0),))
    assert frames(figure, "best") == [(0, 1)]
    assert frames(figure, "not told apart from the best") == [(2, 0)]
    assert f"layer 2 at 2, trait score {best.trait_score}" in figure.layout.title.text


def test_the_bound_on_coherence_decides_which_cell_is_framed():
    assert frames(plot_layer_sweep(make_sweep(CELLS), min_coherence=40.0), "best") == [(2, 1)]


def test_without_a_coherent_cell_nothing_is_framed():
    figure = plot_layer_sweep(make_sweep(CELLS), min_coherence=99.0)
    assert not figure.layout.shapes
    assert "no cell has a trait score and a coherence of 99 or more" in figure.layout.title.text


def test_the_title_has_the_score_without_steering():
    sweep = make_sweep(CELLS, baseline=(4.0, 6.0, 11.0))
    assert f"unsteered: trait score {sweep.baseline.trait_score}" in plot_layer_sweep(sweep).layout.title.text


def test_hovering_over_a_cell_shows_interval_n_dose_and_the_other_score():
    sweep = make_sweep(CELLS)
    text = plot_layer_sweep(sweep).data[0].hovertext[1][0]
    found = sweep.evaluations[2, 2.0]
    assert "layer 2, coefficient 2 (dose 0.20 of the residual norm)" in text
    assert f"trait score {found.trait_score}, n = 3" in text
    assert f"coherence {found.coherence}, n = 3" in text
    assert found.trait_score.low is not None


def test_an_unknown_dose_is_not_written():
    sweep = make_sweep(CELLS)
    sweep = replace(sweep, doses=dict.fromkeys(sweep.doses))
    assert "dose" not in shown(plot_layer_sweep(sweep))


@pytest.mark.parametrize("value", ["trait_score", "coherence"])
def test_a_sweep_without_any_score_is_refused(value):
    sweep = make_sweep({(0, 1.0): ([None, None], None), (1, 1.0): ([None, None], None)})
    with pytest.raises(ValueError, match=f"grumpy: no cell of the sweep has a {value.replace('_', ' ')} to draw"):
        plot_layer_sweep(sweep, value)


# --- the frontier --------------------------------------------------------------------------------------------------


def test_each_cell_with_both_scores_is_a_point_of_its_layer_and_coefficient():
    sweep = make_sweep(CELLS)
    figure = plot_frontier(sweep)
    for coefficient in sweep.coefficients:
        (trace,) = traces(figure, f"coefficient {coefficient:g}", showlegend=False)
        cells = [cell for cell in CELLS if cell[1] == coefficient and cell != (5, 2.0)]
        table = sweep.table().loc[cells]
        assert list(trace.x) == table["coherence"].tolist()
        assert list(trace.y) == table["trait_score"].tolist()
        assert list(trace.marker.color) == [layer for layer, _ in cells]
    assert len({trace.marker.symbol for trace in figure.data if trace.name.startswith("coefficient")}) == 2
    assert "1 of 6 cells lack a score" in figure.layout.title.text


def test_the_frontier_holds_the_cells_that_no_other_dominates():
    equal_in_coherence, equal_in_score = ([50.0, 60.0], 85.0), ([20.0, 30.0, 25.0], 70.0)
    sweep = make_sweep(CELLS | {(11, 1.0): equal_in_coherence, (11, 2.0): equal_in_score})
    table = sweep.table().drop(index=-1, level="layer")[["coherence", "trait_score"]].dropna()
    points: list[tuple[float, float]] = list(table.itertuples(index=False, name=None))
    expected = sorted(
        one for one in points if not any(two != one and two[0] >= one[0] and two[1] >= one[1] for two in points)
    )
    (line,) = traces(plot_frontier(sweep), "Pareto frontier")
    assert list(zip(line.x, line.y, strict=True)) == expected
    assert 1 < len(expected) < len(points)


def test_the_frontier_marks_the_best_cell_the_baseline_and_the_bound():
    sweep = make_sweep(CELLS)
    figure, best = plot_frontier(sweep, 82.0), sweep.best(82.0)
    (ring,), (star,) = traces(figure, "best"), traces(figure, "unsteered")
    assert (ring.x, ring.y) == ((best.coherence.value,), (best.trait_score.value,))
    assert (star.x, star.y) == ((90.0,), (5.0,))
    (line,) = figure.layout.shapes
    assert line.x0 == line.x1 == 82.0


def test_what_has_no_scores_is_not_marked():
    sweep = make_sweep(CELLS, baseline=(None, None))
    figure = plot_frontier(sweep, 99.0)
    assert not traces(figure, "best")
    assert not traces(figure, "unsteered")


def test_a_frontier_needs_a_cell_with_both_scores():
    sweep = make_sweep({(0, 1.0): ([1.0, 2.0], None), (1, 1.0): ([None, None], 90.0)})
    with pytest.raises(ValueError, match="no cell of the sweep has both a trait score and a coherence to draw"):
        plot_frontier(sweep)
