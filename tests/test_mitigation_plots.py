"""The pictures of mitigation: every measure by coefficient, and the trade-off of two of them."""

import pytest
import torch

from persona_lens.plots.mitigation import MitigationPoint, plot_mitigation, plot_trade_off
from persona_lens.statistics import mean_estimate
from tests.plot_cases import estimate, points, steered, traces, whiskers


def mitigation():
    return [
        steered(2.0, 30.0, 50.0, 1.0),
        steered(0.0, 80.0, 92.0, 2.0),
        steered(1.0, None, 70.0, 1.5),
        steered(1.0, 40.0, 88.0, 1.9, "preventative"),
        steered(None, 45.0, None, 1.8, "CAFT"),
        steered(None, 81.0, 91.0, 2.1, "none"),
    ]


# --- mitigation ----------------------------------------------------------------------------------------------------


def test_every_measure_has_a_panel_with_a_line_of_its_values_by_coefficient():
    figure = plot_mitigation({"evil": mitigation()}, capability="margin (nats)")
    assert points(figure, "post-hoc", "y") == {0.0: 80.0, 1.0: None, 2.0: 30.0}
    assert points(figure, "post-hoc", "y2") == {0.0: 92.0, 1.0: 70.0, 2.0: 50.0}
    assert points(figure, "post-hoc", "y3") == {0.0: 2.0, 1.0: 1.5, 2.0: 1.0}
    assert list(traces(figure, "post-hoc")[0].x) == [0.0, 1.0, 2.0]
    assert [figure.layout[f"yaxis{axis}"].title.text for axis in ("", 2, 3)] == [
        "mean trait score",
        "mean coherence",
        "margin<br>(nats)",
    ]


def test_a_missing_score_is_a_gap_in_the_line_without_a_whisker():
    (line,) = [trace for trace in traces(plot_mitigation({"evil": mitigation()}), "post-hoc") if trace.yaxis == "y"]
    assert line.y[1] is None
    assert not line.connectgaps
    assert (line.error_y.array[1], line.error_y.arrayminus[1]) == (None, None)


def test_a_method_without_a_coefficient_is_a_mark_beyond_the_last_one():
    figure = plot_mitigation({"evil": mitigation()})
    ((place, value),) = points(figure, "CAFT", "y").items()
    assert value == 45.0
    border = figure.layout.shapes[0].x0
    assert 2.0 < border < place < figure.layout.xaxis.range[1]
    assert all(tick <= 2.0 for tick in figure.layout.xaxis.tickvals)


def test_what_a_method_was_not_measured_by_is_not_drawn_as_zero():
    assert list(points(plot_mitigation({"evil": mitigation()}), "CAFT", "y2").values()) == [None]


def test_the_baseline_is_a_line_over_its_interval_through_every_panel():
    figure = plot_mitigation({"evil": mitigation()})
    lines = traces(figure, "none")
    assert [(list(line.y), line.line.dash) for line in lines] == [([each] * 2, "dash") for each in (81.0, 91.0, 2.1)]
    intervals = [trace for trace in figure.data if trace.fill == "toself"]
    ends = [(min(trace.y[:-1]), max(trace.y[:-1])) for trace in intervals]
    assert ends == [(79.0, 84.0), (89.0, 94.0), pytest.approx((0.1, 5.1))]


def test_every_trait_has_a_column_and_every_method_one_look_and_one_name_in_the_legend():
    other = [steered(3.0, 12.0, None, None), steered(None, 33.0, None, None, "CAFT")]
    figure = plot_mitigation({"evil": mitigation(), "humorous": other})
    assert points(figure, "post-hoc", "y2") == {3.0: 12.0}
    for name in ("post-hoc", "CAFT", "none"):
        found = traces(figure, name)
        assert [trace.showlegend for trace in found] == [True] + [False] * (len(found) - 1)
        assert len({(trace.marker.color, trace.marker.symbol) for trace in found}) == 1


def test_a_measure_that_nothing_has_gets_no_panel():
    figure = plot_mitigation({"evil": [steered(1.0, 50.0, None, 2.0), steered(2.0, 40.0, None, 1.0)]})
    assert {trace.yaxis for trace in figure.data} == {"y", "y2"}
    assert figure.layout.yaxis2.title.text == "capability"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "needs a point with a trait score, got 0 without"),
        ({"evil": [steered(1.0, None)]}, "needs a point with a trait score, got 1 without"),
        ({"evil": [steered(1.0), steered(1.0, 3.0)]}, "evil: .*got 2 of 'post-hoc' at 1: keep one"),
        ({"evil": [steered(None, method="none"), steered(0.0, method="none")]}, "got 2 of 'none': keep one"),
    ],
)
def test_mitigation_that_cannot_be_drawn_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        plot_mitigation(given)


# --- the trade-off -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("across", "expected"), [("capability", [2.0, 1.5, 1.0]), ("coherence", [92.0, 70.0, 50.0])])
def test_a_methods_line_goes_through_its_points_by_coefficient(across, expected):
    (line,) = traces(plot_trade_off(mitigation(), trait="evil", across=across), "post-hoc")
    assert list(line.x) == expected
    assert list(line.y) == [80.0, None, 30.0]
    assert list(line.text) == ["0", "1", "2"]


def test_both_numbers_of_a_trade_off_have_their_intervals():
    (mark,) = traces(plot_trade_off(mitigation(), trait="evil"), "preventative")
    assert whiskers(mark.error_y, mark.y) == [(38.0, 43.0)]
    assert whiskers(mark.error_x, mark.x) == [pytest.approx((-0.1, 4.9))]


def test_the_baseline_of_a_trade_off_is_a_star_on_two_lines():
    figure = plot_trade_off(mitigation(), trait="evil")
    (star,) = traces(figure, "none")
    assert (star.x, star.y, star.marker.symbol) == ((2.1,), (81.0,), "star")
    vertical, horizontal = figure.layout.shapes
    assert (vertical.x0, horizontal.y0) == (2.1, 81.0)


def test_points_that_lack_a_number_are_counted():
    figure = plot_trade_off(mitigation(), trait="evil", across="coherence", axis="mean coherence (0 to 100)")
    assert "2 of 6 points lack a number" in figure.layout.title.text
    assert figure.layout.xaxis.title.text == "mean coherence (0 to 100)"


def test_hovering_shows_what_was_measured_with_intervals_and_n():
    (mark,) = traces(plot_trade_off(mitigation(), trait="evil"), "CAFT")
    assert mark.hovertext == (
        "<b>CAFT</b><br>trait score 45.00 [43.00, 48.00], n = 9<br>capability 1.80 [-0.20, 4.80], n = 9",
    )


def test_a_trade_off_needs_a_point_with_both_numbers():
    with pytest.raises(ValueError, match="a point with a trait score and a coherence, got 2 without"):
        plot_trade_off([steered(1.0, None), steered(2.0, 5.0, None)], trait="evil", across="coherence")


def test_real_losses_of_a_steered_model_are_drawn_with_their_intervals(embedded_bridge):
    from persona_lens.interventions.hooks import intervene
    from persona_lens.interventions.values import Steer
    from persona_lens.vectors.persona_vectors import PersonaVectors

    texts = ["The tea is warm and sweet.", "Rivers carry water to the sea.", "She closed the book and slept."]
    rows = [embedded_bridge.to_tokens(text) for text in texts]
    directions = torch.randn(30, 576, generator=torch.Generator().manual_seed(0))
    vector = PersonaVectors.from_directions(directions, trait="random", model=embedded_bridge).at(14)
    found = []
    for coefficient in (0.0, 1.0, 4.0):
        with torch.no_grad(), intervene(embedded_bridge, Steer(vector, coefficient)):
            margins = [-float(embedded_bridge(row, return_type="loss")) for row in rows]
        margin = mean_estimate(margins, texts)
        found.append(MitigationPoint("random direction", coefficient, estimate(50.0), capability=margin))
    (_, line) = traces(plot_mitigation({"random": found}), "random direction")
    assert list(line.y) == [point.capability.value for point in found]
    assert whiskers(line.error_y, line.y) == [pytest.approx(point.capability[1:3]) for point in found]
    assert line.y[0] > line.y[2]
