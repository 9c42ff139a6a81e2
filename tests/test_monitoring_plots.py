"""The pictures of monitoring have every number once, leave gaps where there is none, and name thresholds' vectors."""

import numpy as np
import pytest
import torch

from persona_lens.monitoring.detection import detection
from persona_lens.monitoring.result import (
    ChatProjections,
    MonitoredVector,
    Monitoring,
    TokenProjections,
    TurnProjections,
)
from persona_lens.monitoring.thresholds import Threshold
from persona_lens.plots.monitoring import plot_layer_correlations, plot_projection_scores, plot_roc, plot_turns
from persona_lens.statistics import Estimate
from tests.plot_cases import NASTY, NASTY_AS_TEXT, shown, traces

VECTORS = (MonitoredVector("evil", 14, "aaaaaaaa"), MonitoredVector("polite", 18, "bbbbbbbb"))
CONDITIONS = ["never"] * 4 + ["at times"] * 4 + ["always"] * 4
PROJECTIONS = [-2.0, -1.5, -1.0, -0.5, -0.2, 0.0, 0.3, 0.6, 1.0, 1.4, 1.9, 2.0]
SCORES = [0.0, 2.0, 1.0, 5.0, 30.0, 20.0, 40.0, 35.0, 80.0, 95.0, 85.0, 100.0]


def turn(message, prompt, response=None, said=None):
    tokens = None
    if said is not None:
        tokens = TokenProjections(("<|im_start|>", "\n", *said), 2, torch.zeros(2 + len(said), 2))
    n_tokens = 0 if response is None else 7
    return TurnProjections(message=message, prompt=prompt, response=response, n_tokens=n_tokens, tokens=tokens)


def monitoring(name="calm", **parts):
    first = (turn(1, (-1.0, 4.0), (-0.5, 3.0)), turn(3, (0.25, 5.0)), turn(5, (1.0, 6.0), (1.5, 2.0)))
    second = (turn(1, (0.0, 1.0), (0.1, 1.1), said=("You ", "are ", "kind")),)
    return Monitoring(VECTORS, (ChatProjections(name, first), ChatProjections("short", second)), **parts)


def threshold(**parts):
    made = {"trait": "evil", "layer": 14, "fingerprint": "aaaaaaaa", "of": "response", "value": 0.75}
    return Threshold(**{**made, "percentile": 95.0, "interval": (0.5, 1.0), "n": 400, "n_chats": 40, **parts})


def estimates(*values):
    return [
        Estimate(None, None, None, 0) if value is None else Estimate(value, value - 0.1, value + 0.1, 9)
        for value in values
    ]


def test_a_chat_has_a_line_of_its_responses_and_one_of_its_prompts():
    figure = plot_turns(monitoring())
    (responses,) = traces(figure, "calm")
    prompts = [trace for trace in figure.data if trace.legendgroup == "calm" and trace.line.dash == "dot"]
    assert list(prompts[0].y) == [-1.0, 0.25, 1.0]
    assert list(responses.x) == [1, 2, 3]
    assert responses.y[0] == -0.5
    assert responses.y[2] == 1.5


def test_a_turn_without_a_response_leaves_a_gap():
    (responses,) = traces(plot_turns(monitoring()), "calm")
    assert responses.y[1] is None
    assert not responses.connectgaps


def test_every_chosen_vector_has_a_panel_with_its_own_numbers():
    figure = plot_turns(monitoring(), vector=None)
    drawn = {trace.yaxis: list(trace.y) for trace in traces(figure, "calm")}
    assert drawn == {"y": [-0.5, None, 1.5], "y2": [3.0, None, 2.0]}
    assert [note.text for note in figure.layout.annotations] == ["evil, layer 14", "polite, layer 18"]
    assert [trace.showlegend for trace in traces(figure, "calm")] == [True, False]


def test_a_threshold_is_a_dashed_line_in_the_panel_of_its_vector_alone():
    figure = plot_turns(monitoring(), vector=[1, 0], thresholds=[threshold()])
    (line,) = traces(figure, "response threshold")
    assert (list(line.y), line.line.dash, line.yaxis) == ([0.75, 0.75], "dash", "y2")
    assert "0.75" in [note.text for note in figure.layout.annotations]


@pytest.mark.parametrize("stranger", [{"fingerprint": "cccccccc"}, {"fingerprint": "bbbbbbbb", "layer": 18}])
def test_a_threshold_of_a_vector_that_is_not_drawn_is_refused(stranger):
    with pytest.raises(ValueError, match="No vector that is drawn"):
        plot_turns(monitoring(), vector=0, thresholds=[threshold(**stranger)])


def test_hovering_over_a_turn_shows_both_numbers_and_how_its_response_begins():
    figure = plot_turns(monitoring())
    assert "last prompt token 0.25<br>no response" in traces(figure, "calm")[0].hovertext[1]
    hover = traces(figure, "short")[0].hovertext[0]
    assert "response 0.10, 7 tokens" in hover
    assert "You are kind" in hover
    assert "im_start" not in hover


def test_names_of_chats_and_interventions_are_text_in_a_picture_of_turns():
    figure = plot_turns(monitoring(NASTY, interventions=(NASTY,)))
    assert NASTY_AS_TEXT[:30] in shown(figure)
    assert not any(NASTY in str(trace.hovertext) or NASTY in trace.name for trace in figure.data if trace.name)
    assert NASTY not in figure.layout.title.text


@pytest.mark.parametrize("vector", [2, -1, [0, 5]])
def test_a_vector_that_was_not_monitored_is_refused(vector):
    with pytest.raises(ValueError, match="2 were monitored, counted from 0"):
        plot_turns(monitoring(), vector=vector)


def test_monitoring_without_turns_has_no_picture():
    with pytest.raises(ValueError, match="no turn to draw"):
        plot_turns(Monitoring(VECTORS, (ChatProjections("empty", ()),)))


def test_every_point_stands_under_its_condition():
    figure = plot_projection_scores(PROJECTIONS, SCORES, CONDITIONS, title="evil")
    for place, name in enumerate(["never", "at times", "always"]):
        (points,) = traces(figure, name, mode="markers")
        part = slice(4 * place, 4 * place + 4)
        assert (list(points.x), list(points.y)) == (PROJECTIONS[part], SCORES[part])


def test_conditions_are_coloured_from_dark_to_bright_in_the_given_order():
    order = ["always", "at times", "never"]
    figure = plot_projection_scores(PROJECTIONS, SCORES, CONDITIONS, title="evil", order=order)
    colours = [traces(figure, name, mode="markers")[0].marker.color for name in order]
    brightness = [sum(int(part) for part in colour.strip("rgb()").split(",")) for colour in colours]
    assert brightness == sorted(brightness)
    assert len(set(brightness)) == 3


def test_the_fits_are_the_least_squares_lines_over_all_and_within_each_condition():
    figure = plot_projection_scores(PROJECTIONS, SCORES, CONDITIONS, title="evil")
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    parts = [slice(0, 12), slice(0, 4), slice(4, 8), slice(8, 12)]
    for line, part in zip(lines, parts, strict=True):
        x, y = np.array(PROJECTIONS[part]), np.array(SCORES[part])
        slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
        assert list(line.x) == [x.min(), x.max()]
        assert list(line.y) == pytest.approx([y.mean() + slope * (each - x.mean()) for each in line.x])


def test_the_title_has_both_correlations_and_counts_what_is_left_out():
    figure = plot_projection_scores(
        [*PROJECTIONS, None, 1.0, float("nan")],
        [*SCORES, 5.0, None, 5.0],
        [*CONDITIONS, "never", "never", "never"],
        title="evil",
        overall=Estimate(0.83, 0.78, 0.87, 12),
        within="0.31 in words",
    )
    title = figure.layout.title.text
    assert "Pearson overall 0.83 [0.78, 0.87], mean within conditions 0.31 in words" in title
    assert "12 points; 3 without projection or score left out" in title
    assert len(traces(figure, "never", mode="markers")[0].x) == 4


def test_conditions_and_questions_are_text_in_a_picture():
    figure = plot_projection_scores([1.0], [2.0], [NASTY], title=NASTY, questions=[NASTY])
    (points,) = [trace for trace in figure.data if trace.hovertext]
    assert points.hovertext[0].count(NASTY_AS_TEXT) == 2
    assert "<script>" not in f"{points.hovertext} {points.name} {figure.layout.title.text}"


def test_points_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="no point has both"):
        plot_projection_scores([None], [1.0], ["never"], title="evil")
    with pytest.raises(ValueError, match="Every point needs"):
        plot_projection_scores([1.0, 2.0], [1.0], ["never"], title="evil")
    with pytest.raises(ValueError, match="`order` lacks the condition 'never'"):
        plot_projection_scores([1.0], [1.0], ["never"], title="evil", order=["always"])


def test_the_layer_curves_have_their_values_and_a_gap_where_there_is_none():
    figure = plot_layer_correlations([3, 4, 5], estimates(0.5, 0.7, 0.6), estimates(0.2, None, 0.3))
    assert list(traces(figure, "overall")[0].y) == [0.5, 0.7, 0.6]
    assert list(traces(figure, "mean within conditions")[0].y) == [0.2, None, 0.3]
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert [value for value in bands[0].y if value is not None] == pytest.approx([0.6, 0.8, 0.7, 0.5, 0.6, 0.4, 0.6])
    assert bands[1].x.count(None) == 2
    assert "overall 0.70 [0.60, 0.80] at layer 4, within conditions 0.30" in figure.layout.title.text


def test_layers_without_any_correlation_have_no_picture():
    with pytest.raises(ValueError, match="No layer has a correlation"):
        plot_layer_correlations([1], estimates(None), estimates(None))
    with pytest.raises(ValueError, match="1, 2 and 1 came"):
        plot_layer_correlations([1], estimates(0.1, 0.2), estimates(0.1))


def test_the_roc_curve_has_the_detections_points_area_and_best():
    found = detection([1.0, 2.0, 3.0, 0.5], [0.0, 1.5, -1.0])
    figure = plot_roc(found)
    (curve,), (best,) = traces(figure, "projection"), traces(figure, "best Youden’s J")
    assert list(zip(curve.x, curve.y, strict=True)) == [point[:2] for point in found.points]
    assert (best.x[0], best.y[0]) == found.best[:2]
    assert f"area under the curve {found.auc.value:.2f}" in figure.layout.title.text
    assert "4 positive and 3 negative values" in figure.layout.title.text


def test_a_threshold_is_a_point_of_the_roc_with_the_intervals_of_its_rates():
    found = detection([float(each) for each in range(10)], [float(each) / 2 for each in range(10)])
    figure = plot_roc(found, thresholds=[threshold(value=3.2)])
    (point,) = [trace for trace in figure.data if trace.name.startswith("95th percentile of benign")]
    rates = found.rates(3.2)
    assert (point.x[0], point.y[0]) == (rates.fpr.value, rates.tpr.value) == (0.3, 0.6)
    assert point.error_y.array[0] == pytest.approx(rates.tpr.high - 0.6)
    assert point.x[0] - point.error_x.arrayminus[0] == pytest.approx(rates.fpr.low)
