"""Bars in groups and lines over layers: what is missing leaves a gap, and intervals are drawn as they are."""

import pytest

pytest.importorskip("plotly")


def estimate(value=0.5, low=0.25, high=1.0):
    from persona_lens.statistics import Estimate

    return Estimate(value, low, high, 7)


def nothing():
    return estimate(None, None, None)


def test_each_series_has_a_bar_in_each_group_and_a_missing_one_is_a_gap():
    from persona_lens.plots.estimates import plot_grouped_estimates

    figure = plot_grouped_estimates(
        {"a": {"x": estimate(), "y": estimate()}, "b": {"y": nothing()}}, title="bars", upward="share"
    )
    assert [bar.name for bar in figure.data] == ["x", "y"]
    assert figure.data[0].y == (0.5, None)
    assert figure.data[1].error_y.array == (0.5, None)
    assert figure.data[1].error_y.arrayminus == (0.25, None)


def test_lines_break_where_a_layer_has_no_estimate():
    from persona_lens.plots.estimates import plot_layer_estimates

    figure = plot_layer_estimates({"a": [estimate(), nothing(), estimate()]}, title="lines", upward="AUC", chance=0.5)
    band, line = figure.data
    assert line.y == (0.5, None, 0.5)
    assert None in band.x


def test_nothing_to_draw_is_refused():
    from persona_lens.plots.estimates import plot_grouped_estimates, plot_layer_estimates

    with pytest.raises(ValueError, match="no bar has a value"):
        plot_grouped_estimates({"a": {"x": nothing()}}, title="bars", upward="share")
    with pytest.raises(ValueError, match="no layer has a value"):
        plot_layer_estimates({"a": [nothing()]}, title="lines", upward="share")
