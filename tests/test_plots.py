"""The pictures carry the numbers of their results, leave out what is missing, and show foreign text as text."""

import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch

from persona_lens.plots.layers import (
    plot_cosine_matrix,
    plot_dose_response,
    plot_frontier,
    plot_layer_statistics,
    plot_layer_sweep,
)
from persona_lens.vectors.persona_vectors import cosine_matrix
from tests.evaluation_cases import make_evaluation, make_sweep
from tests.plot_cases import CELLS, NASTY, NASTY_AS_TEXT, response, shown, traces
from tests.vector_cases import N_LAYERS, make_statistics, make_vectors

# --- the dose-response ---------------------------------------------------------------------------------------------


def test_both_panels_carry_the_numbers_of_the_table():
    found = response()
    table = found.table()
    lines = traces(plot_dose_response(found), "direction", mode="lines")
    for trace, value in zip(lines, ["trait_score", "coherence"], strict=True):
        assert list(trace.x) == table.index.tolist()
        assert list(trace.y) == table[value].tolist()


def test_the_band_goes_along_the_upper_ends_and_back_along_the_lower():
    found = response()
    table = found.table()
    band = traces(plot_dose_response(found), "95 % interval")[0]
    upper, lower = table["trait_score_high"].tolist(), table["trait_score_low"].tolist()
    assert list(band.x) == [-1.0, 0.0, 2.0, 2.0, 0.0, -1.0, -1.0, None]
    assert list(band.y) == [*upper, *lower[::-1], upper[0], None]


def test_a_dose_without_a_score_leaves_a_gap_in_line_and_band():
    cells = (make_evaluation([5.0, 9.0]), make_evaluation([None, None]), make_evaluation([60.0, 72.0]))
    figure = plot_dose_response(response(evaluations=cells, random=()))
    line, band = traces(figure, "direction", mode="lines")[0], traces(figure, "95 % interval")[0]
    assert list(line.y) == [7.0, None, 66.0]
    assert not line.connectgaps
    assert list(band.x) == [-1.0, -1.0, -1.0, None, 2.0, 2.0, 2.0, None]


def test_a_score_without_an_interval_has_no_band():
    cells = tuple(make_evaluation(scores) for scores in ([5.0], [20.0, 24.0], [60.0, 72.0]))
    figure = plot_dose_response(response(evaluations=cells))
    assert -1.0 not in traces(figure, "95 % interval")[0].x
    assert traces(figure, "direction", mode="lines")[0].y[0] == 5.0


def test_every_random_direction_is_a_thin_line_and_the_legend_names_them_once():
    found = response()
    lines = traces(plot_dose_response(found), "random directions of equal norm")
    expected = [[cell.trait_score.value for cell in cells] for cells in found.random]
    expected += [[cell.coherence.value for cell in cells] for cells in found.random]
    assert [list(line.y) for line in lines] == expected
    assert [line.showlegend for line in lines] == [True, False, False, False]


def test_incoherent_doses_are_hollow_because_the_slope_leaves_them_out():
    cells = tuple(make_evaluation([9.0, 9.5], coherence=coherence) for coherence in (49.0, None, 50.0))
    found = response(evaluations=cells, random=())
    figure = plot_dose_response(found)
    first, second, third = traces(figure, "direction", mode="markers")[0].marker.color
    assert first == "white"
    assert second == third != "white"
    assert str(found.slope()) in figure.layout.title.text


def test_the_ticks_have_the_relative_dose_where_it_is_known():
    figure = plot_dose_response(response(doses=(None, 0.0, 0.25)))
    assert figure.layout.xaxis2.ticktext == ("-1", "0<br>0.00", "2<br>0.25")
    assert "dose" in figure.layout.xaxis2.title.text
    unknown = plot_dose_response(response(doses=(None, None, None)))
    assert unknown.layout.xaxis2.ticktext == ("-1", "0", "2")
    assert "dose" not in unknown.layout.xaxis2.title.text


def test_without_any_coherence_there_is_one_panel():
    cells = tuple(make_evaluation(scores, coherence=None) for scores in ([5.0, 9.0], [20.0, 24.0], [60.0, 72.0]))
    figure = plot_dose_response(response(evaluations=cells, random=()))
    assert len(traces(figure, "direction", mode="lines")) == 1
    assert figure.layout.xaxis.title.text.startswith("coefficient")


def test_a_dose_response_without_any_score_is_refused():
    with pytest.raises(ValueError, match="grumpy: no coefficient has a trait score to draw"):
        plot_dose_response(response(evaluations=(make_evaluation([None, None]),) * 3))


# --- the statistics of layers --------------------------------------------------------------------------------------


def test_the_layer_curves_carry_the_numbers_of_the_table():
    vectors = make_vectors(statistics=make_statistics())
    figure, table = plot_layer_statistics(vectors), vectors.table()
    layers = list(range(N_LAYERS))
    curves = traces(figure, "direction", mode="lines")
    for trace, name in zip(curves, ["held_out_auc", "split_half"], strict=True):
        assert np.array_equal(np.array(trace.y, dtype=float), table.loc[layers, name].to_numpy(float), equal_nan=True)
    (placebo,) = traces(figure, "placebo, 95th percentile")
    assert list(placebo.y) == table.loc[layers, "placebo_auc_95"].tolist()


def test_an_undefined_statistic_is_a_gap():
    statistics = replace(make_statistics(), held_out_auc=torch.tensor([0.5, float("nan"), 0.75, 0.5]))
    figure = plot_layer_statistics(make_vectors(statistics=statistics))
    assert list(traces(figure, "direction", mode="lines")[0].y) == [0.5, None, 0.75, 0.5]


def test_the_embedding_row_is_a_level_where_there_is_one():
    statistics = make_statistics()
    statistics = replace(statistics, embedding=dict.fromkeys(statistics.embedding, 0.625))
    level, _ = traces(plot_layer_statistics(make_vectors(statistics=statistics)), "embedding row")
    assert list(level.y) == [0.625] * N_LAYERS
    without = make_vectors(statistics=make_statistics(embedding=False), embedding=None)
    assert not traces(plot_layer_statistics(without), "embedding row")


def test_vectors_without_statistics_are_refused():
    with pytest.raises(ValueError, match="evil: these vectors have no statistics to draw"):
        plot_layer_statistics(make_vectors())


# --- the cosine matrix ---------------------------------------------------------------------------------------------


def test_the_cosine_matrix_shows_its_numbers_on_a_scale_around_zero():
    cosines = cosine_matrix([make_vectors(name, seed=seed) for seed, name in enumerate(["evil", "kind", "1"])], 2)
    figure = plot_cosine_matrix(cosines, "At layer 2")
    heat = figure.data[0]
    assert np.array_equal(np.array(heat.z), cosines.to_numpy(dtype=float))
    assert (heat.zmin, heat.zmax) == (-1, 1)
    assert heat.text[0][1] == f"{cosines.iloc[0, 1]:.2f}"
    assert figure.layout.xaxis.ticktext == figure.layout.yaxis.ticktext == ("evil", "kind", "1")
    assert "At layer 2" in figure.layout.title.text


def test_traits_of_one_name_keep_their_own_rows():
    figure = plot_cosine_matrix(pandas.DataFrame([[1.0, 0.5], [0.5, 1.0]], index=["a", "a"], columns=["a", "a"]))
    assert figure.layout.xaxis.tickvals == (0, 1)
    assert figure.layout.xaxis.ticktext == ("a", "a")


def test_an_undefined_cosine_is_blank_and_a_small_negative_one_is_zero():
    heat = plot_cosine_matrix(pandas.DataFrame([[1.0, float("nan")], [-0.001, 1.0]])).data[0]
    assert heat.z[0][1] is None
    assert heat.text[0][1] == ""
    assert heat.text[1][0] == "0.00"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pandas.DataFrame(), "no cosine to draw"),
        (pandas.DataFrame([[float("nan")]]), "no cosine to draw"),
        (pandas.DataFrame([[1.0, 1.5], [1.5, 1.0]]), "outside -1 to 1"),
    ],
)
def test_a_table_that_holds_no_cosines_is_refused(table, words):
    with pytest.raises(ValueError, match=words):
        plot_cosine_matrix(table)


# --- all pictures --------------------------------------------------------------------------------------------------


def drawn_of(trait, judge):
    sweep = replace(make_sweep(CELLS), trait=trait, judge=judge)
    table = pandas.DataFrame([[1.0]], index=[trait], columns=[trait])
    return {
        "sweep": plot_layer_sweep(sweep),
        "frontier": plot_frontier(sweep),
        "dose-response": plot_dose_response(response(trait=trait, judge=judge)),
        "statistics": plot_layer_statistics(make_vectors(trait, statistics=make_statistics())),
        "cosines": plot_cosine_matrix(table, trait),
    }


def test_names_with_markup_are_shown_as_text():
    for name, figure in drawn_of(NASTY, NASTY).items():
        text = shown(figure).replace("\\'", "'")
        assert "<b>bold" not in text, name
        assert "<script" not in text, name
        assert NASTY_AS_TEXT in text, name


def test_a_dollar_sign_begins_no_formula():
    for name, figure in drawn_of("$x$", "$y$").items():
        assert "$" not in shown(figure), name


def test_the_judge_is_named_without_its_settings():
    for name, figure in drawn_of("evil", "likelihood ratio by tiny (weights 12ab), slope 21.38").items():
        if name in ("sweep", "frontier", "dose-response"):
            assert "judge: likelihood ratio by tiny (weights 12ab)<" in figure.layout.title.text, name


def test_long_names_are_cut():
    for name, figure in drawn_of("very " * 40, "made up").items():
        assert "…" in figure.layout.title.text, name
        assert "very " * 12 not in shown(figure), name


def test_drawing_leaves_the_results_as_they_were():
    sweep, found, vectors = make_sweep(CELLS), response(), make_vectors(statistics=make_statistics())
    cosines = cosine_matrix([vectors], 0)
    before = deepcopy((sweep, found)), vectors.table(), cosines.copy()
    plot_layer_sweep(sweep)
    plot_frontier(sweep)
    plot_dose_response(found)
    plot_layer_statistics(vectors)
    plot_cosine_matrix(cosines)
    assert (sweep, found) == before[0]
    pandas.testing.assert_frame_equal(vectors.table(), before[1])
    pandas.testing.assert_frame_equal(cosines, before[2])


def test_without_plotly_the_error_names_the_command(monkeypatch):
    for name in ("plotly", "plotly.graph_objects"):
        monkeypatch.setitem(sys.modules, name, None)
    for draw in (lambda: plot_layer_sweep(make_sweep(CELLS)), lambda: plot_dose_response(response())):
        with pytest.raises(ImportError, match=r'pip install "persona-lens\[plots\]"'):
            draw()


def test_importing_the_pictures_does_not_import_plotly():
    code = "import sys, persona_lens.plots; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
