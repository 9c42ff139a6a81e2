"""The pictures of a finetuning study have the numbers they were given, gaps where there is none, and names as text."""

import numpy as np
import pandas
import pytest

from persona_lens.plots.finetuning import LossCurves, TraitShifts, plot_losses, plot_shift_scores, plot_trait_scores
from persona_lens.plots.mitigation import plot_mitigation, plot_trade_off
from persona_lens.statistics import Estimate
from tests.plot_cases import MISSING, NASTY, NASTY_AS_TEXT, estimate, points, shown, steered, traces, whiskers

SETS = ["evil", "evil, half", "kind", "maths", "base"]


def scores(sets=("evil", "kind", "base")):
    values = [[90.0, 10.0], [5.0, 80.0], [20.0, float("nan")]]
    return pandas.DataFrame(values, index=list(sets), columns=["evil", "humorous"])


def panel(**parts):
    found = [estimate(80.0), estimate(55.0), estimate(5.0), MISSING, estimate(20.0)]
    return TraitShifts(
        "evil", [3.0, 2.0, -1.0, 0.5, 0.0], found, estimate(0.9, 0.1, 0.05), ["evil", "evil, half"]
    )._replace(**parts)


# --- the heat map of scores ----------------------------------------------------------------------------------------


def test_each_cell_has_its_set_and_trait_and_the_base_comes_first():
    figure = plot_trait_scores(scores(), base="base")
    (heat,) = figure.data
    drawn = pandas.DataFrame(list(heat.z), index=figure.layout.yaxis.ticktext, columns=figure.layout.xaxis.ticktext)
    assert list(drawn.index) == ["base", "evil", "kind"]
    pandas.testing.assert_frame_equal(drawn.loc[["evil", "kind", "base"]].astype(float), scores(), check_names=False)


def test_a_missing_score_is_an_empty_cell():
    (heat,) = plot_trait_scores(scores()).data
    assert (heat.z[2][1], heat.text[2][1]) == (None, "")
    assert "humorous -" in heat.hovertext[2][1]


def test_colours_of_changes_are_differences_from_the_base_under_the_scores_themselves():
    (heat,) = plot_trait_scores(scores(), base="base", colours="change").data
    assert [row[0] for row in heat.z] == [0.0, 70.0, -15.0]
    assert [row[0] for row in heat.text] == ["20", "90", "5"]
    assert [row[1] for row in heat.z] == [None] * 3
    assert heat.zmin == -heat.zmax == -70.0


def test_severities_of_a_set_stand_together_between_lines():
    index = pandas.MultiIndex.from_tuples([("evil", "half"), ("kind", "half"), ("evil", "full"), ("base", "")])
    table = pandas.DataFrame({"evil": [50.0, 1.0, 90.0, 10.0]}, index=index)
    figure = plot_trait_scores(table, base="base")
    assert figure.layout.yaxis.ticktext == ("base", "evil, half", "evil, full", "kind, half")
    assert [row[0] for row in figure.data[0].z] == [10.0, 50.0, 90.0, 1.0]
    assert [line.y0 for line in figure.layout.shapes] == [0.5, 2.5]


@pytest.mark.parametrize(
    ("table", "choices", "words"),
    [
        (scores().iloc[:0], {}, "no trait score to draw"),
        (scores() * float("nan"), {}, "no trait score to draw"),
        (scores() * 2, {}, "from 0 to 100, got 10 to 180: rescale"),
        (scores(), {"base": "other"}, "`base` names one row, 0 are 'other'"),
        (scores(["evil", "base", "base"]), {"base": "base"}, "`base` names one row, 2 are 'base'"),
        (scores(), {"colours": "change"}, "got no `base`: name its row"),
    ],
)
def test_a_table_that_cannot_be_drawn_is_refused(table, choices, words):
    with pytest.raises(ValueError, match=words):
        plot_trait_scores(table, **choices)


# --- shifts --------------------------------------------------------------------------------------------------------


def test_sets_of_the_trait_the_others_and_the_base_are_apart_with_their_numbers():
    figure = plot_shift_scores([panel()], SETS, base="base")
    assert points(figure, "sets for this trait", "y") == {3.0: 80.0, 2.0: 55.0}
    assert points(figure, "sets for other traits", "y") == {-1.0: 5.0}
    assert points(figure, "before finetuning", "y") == {0.0: 20.0}
    symbols = {trace.marker.symbol for trace in figure.data if trace.mode == "markers"}
    assert len(symbols) == 3


def test_whiskers_of_scores_end_where_their_intervals_do():
    (own,) = traces(plot_shift_scores([panel()], SETS), "sets for this trait")
    assert whiskers(own.error_y, own.y) == [(78.0, 83.0), (53.0, 58.0)]


def test_a_score_without_an_interval_has_no_whisker():
    found = [Estimate(80.0, None, None, 1), *panel().scores[1:]]
    (own,) = traces(plot_shift_scores([panel(scores=found)], SETS), "sets for this trait")
    assert (own.error_y.array[0], own.error_y.arrayminus[0]) == (None, None)


@pytest.mark.parametrize("shift", [None, float("nan")])
def test_a_set_without_a_shift_or_a_score_is_left_out_and_counted(shift):
    figure = plot_shift_scores([panel(shifts=[3.0, shift, -1.0, 0.5, 0.0])], SETS)
    drawn = [x for trace in figure.data if trace.mode == "markers" for x in trace.x]
    assert sorted(drawn) == [-1.0, 0.0, 3.0]
    assert "2 of 5 points lack a number" in figure.layout.title.text


def test_the_line_of_a_panel_is_the_least_squares_fit():
    (line,) = traces(plot_shift_scores([panel()], SETS), "least-squares fit")
    slope, middle = np.polyfit([3.0, 2.0, -1.0, 0.0], [80.0, 55.0, 5.0, 20.0], 1)
    assert list(line.x) == [-1.0, 3.0]
    assert list(line.y) == pytest.approx([middle - slope, middle + 3 * slope])


def test_every_trait_has_a_panel_of_its_own_numbers_with_its_correlation_above():
    other = panel(trait="humorous", shifts=[1.0, 1.5, 9.0, 2.0, 0.0], own=["kind"], correlation=None)
    figure = plot_shift_scores([panel(), other], SETS, base="base")
    assert points(figure, "sets for this trait", "y2") == {9.0: 5.0}
    assert [note.text for note in figure.layout.annotations] == ["evil: r = 0.90 [0.80, 0.95]", "humorous"]
    assert [trace.showlegend for trace in traces(figure, "before finetuning")] == [True, False]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"shifts": [1.0]}, "each of 5 sets needs a shift and a score, got 1 and 5"),
        ({"own": ["other"]}, "'other' is no set"),
        ({"shifts": [None] * 5}, "no set has both"),
    ],
)
def test_a_panel_that_cannot_be_drawn_is_refused(parts, words):
    with pytest.raises(ValueError, match=f"evil: .*{words}"):
        plot_shift_scores([panel(**parts)], SETS)


def test_shifts_need_a_panel_and_a_base_among_the_sets():
    with pytest.raises(ValueError, match="got none: pass one"):
        plot_shift_scores([], SETS)
    with pytest.raises(ValueError, match="'unknown' is no set"):
        plot_shift_scores([panel()], SETS, base="unknown")


# --- losses --------------------------------------------------------------------------------------------------------


def test_a_run_has_its_losses_by_step_and_its_evaluation_has_points():
    run = LossCurves("evil", {2: 2.5, 1: 3.0, 3: 2.0}, {3: 2.2, 1: 2.9})
    training, evaluation = traces(plot_losses([run, LossCurves("kind", {1: 1.0})]), "evil")
    assert (list(training.x), list(training.y), training.mode) == ([1, 2, 3], [3.0, 2.5, 2.0], "lines")
    assert (list(evaluation.x), list(evaluation.y), evaluation.mode) == ([1, 3], [2.9, 2.2], "lines+markers")


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf")])
def test_a_loss_that_is_missing_leaves_a_gap(loss):
    (line,) = traces(plot_losses([LossCurves("evil", {1: 3.0, 2: loss, 3: 2.0})]), "evil")
    assert list(line.y) == [3.0, None, 2.0]
    assert not line.connectgaps


def test_runs_look_different_beyond_the_colours_there_are():
    figure = plot_losses([LossCurves(f"run {index}", {1: 1.0}) for index in range(20)])
    assert len({(trace.line.color, trace.line.dash) for trace in figure.data}) == 20


@pytest.mark.parametrize("runs", [[], [LossCurves("evil", {}, {})], [LossCurves("evil", {1: None})]])
def test_runs_without_a_loss_are_refused(runs):
    with pytest.raises(ValueError, match=f"got {len(runs)} runs without one"):
        plot_losses(runs)


# --- all of them ---------------------------------------------------------------------------------------------------


def nasty_figures():
    table = pandas.DataFrame({NASTY: [1.0, 2.0]}, index=[NASTY, "base"])
    point = steered(1.0, method=NASTY)
    return {
        "scores": plot_trait_scores(table, title=NASTY, base="base"),
        "shifts": plot_shift_scores([TraitShifts(NASTY, [1.0], [estimate(5.0)])], [NASTY], title=NASTY),
        "mitigation": plot_mitigation({NASTY: [point]}, capability=NASTY, title=NASTY),
        "trade-off": plot_trade_off([point], trait=NASTY, axis=NASTY),
        "losses": plot_losses([LossCurves(NASTY, {1: 1.0})], title=NASTY, upward=NASTY),
    }


@pytest.mark.parametrize("name", ["scores", "shifts", "mitigation", "trade-off", "losses"])
def test_foreign_names_are_text_in_every_picture(name):
    figure = nasty_figures()[name]
    # The name of a group is never shown.
    figure.update_traces(legendgroup=None)
    assert NASTY_AS_TEXT[:12] in shown(figure)
    assert "<script" not in shown(figure)
    assert "<b>bold" not in shown(figure)
