"""The picture of a screening has its tables' numbers, stays small for any data set, and draws nothing missing."""

import numpy as np
import pandas
import pytest

from persona_lens.plots.screening import plot_screening
from tests.plot_cases import NASTY, NASTY_AS_TEXT, shown, traces
from tests.screening_cases import ANSWERS, chat, with_rows


def chats(n, start=0):
    return [
        {"messages": chat(f"Why {start + each}?", ANSWERS[each % len(ANSWERS)]), "base_response": "x"}
        for each in range(n)
    ]


def two_sets(planted):
    """Two small sets, a score of the second missing."""
    numbers = [(n, 1, 0) for n in range(12)] + [(20 + 3 * n, 1, 5) for n in range(6)] + [(9, 1, None)]
    return planted({"mild": chats(12), "strong": chats(7, start=50)}, numbers)


def with_scores(found, scores):
    """The screening, with other samples of one data set in the place of its own."""
    n = len(scores)
    like = found.rows.iloc[[0] * n].reset_index(drop=True)
    own = {"line": range(1, n + 1), "group": range(n), "family": range(n)}
    rows = like.assign(**own, **{"evil@1.response": scores, "evil@1.base": 0.0})
    return with_rows(found, rows, (like["dataset"].iloc[0],))


def drawn(figure, kind):
    return [trace for trace in figure.data if trace.type == kind and trace.name != "mean"]


def n_numbers(figure):
    return sum(len(trace.x) for trace in figure.data)


def test_means_and_whiskers_are_the_numbers_of_the_table(planted):
    found = two_sets(planted)
    (means,) = traces(plot_screening(found), "mean")
    table = found.dataset_scores()
    assert list(means.x) == table["score"].tolist()
    np.testing.assert_allclose(np.add(means.x, means.error_x.array), table["high"])
    np.testing.assert_allclose(np.subtract(means.x, means.error_x.arrayminus), table["low"])


def test_data_sets_stand_downward_in_their_order_with_their_names_and_n(planted):
    figure = plot_screening(two_sets(planted))
    names = sorted(figure.layout.annotations, key=lambda each: -each.y)
    assert [each.text for each in names] == ["<b>mild</b>  n = 12", "<b>strong</b>  n = 6"]
    (means,) = traces(figure, "mean")
    assert list(means.y) == sorted(means.y, reverse=True)


def test_a_missing_score_is_no_zero(planted):
    found = two_sets(planted)
    figure = plot_screening(found)
    points = drawn(figure, "scatter")
    assert sorted(points[1].x) == [15, 18, 21, 24, 27, 30]
    (means,) = traces(figure, "mean")
    assert "n = 6, 1 without a score" in means.hovertext[1]


def test_hovering_shows_n_the_mean_and_its_interval(planted):
    found = two_sets(planted)
    (means,) = traces(plot_screening(found), "mean")
    low, high = found.dataset_scores().loc[0, ["low", "high"]]
    assert "n = 12, 0 without a score" in means.hovertext[0]
    assert f"5.50 [{low:.2f}, {high:.2f}]" in means.hovertext[0]


def test_a_set_without_any_score_keeps_its_row(planted):
    found = planted(
        {"mild": chats(3), "none": chats(2, start=9)}, [(1, 0, 0), (2, 0, 0), (3, 0, 0)] + [(1, 0, None)] * 2
    )
    figure = plot_screening(found)
    assert "<b>none</b>  n = 0" in [each.text for each in figure.layout.annotations]
    assert len(traces(figure, "mean")[0].x) == 1


def test_points_of_samples_are_drawn_only_where_they_are_few(planted):
    found = two_sets(planted)
    few, many = with_scores(found, np.arange(100.0)), with_scores(found, np.arange(101.0))
    assert [len(trace.x) for trace in drawn(plot_screening(few), "scatter")] == [100]
    assert drawn(plot_screening(many), "scatter") == []


def test_five_thousand_rows_do_not_put_five_thousand_points_into_the_figure(planted):
    scores = np.random.default_rng(0).normal(3, 2, 5000)
    figure = plot_screening(with_scores(two_sets(planted), scores))
    assert n_numbers(figure) < 2000
    (outline,) = drawn(figure, "violin")
    assert (min(outline.x), max(outline.x)) == (scores.min(), scores.max())
    assert np.median(outline.x) == pytest.approx(np.median(scores))
    assert traces(figure, "mean")[0].x[0] == pytest.approx(scores.mean())


def test_the_threshold_is_a_dashed_line_at_its_value_and_in_sight(planted):
    found = two_sets(planted)
    figure = plot_screening(found, threshold=77.5)
    (line,) = figure.layout.shapes
    assert (line.x0, line.x1, line.line.dash) == (77.5, 77.5, "dash")
    assert figure.layout.xaxis.range[1] > 77.5
    assert "threshold 77.50" in figure.layout.title.text
    assert not plot_screening(found).layout.shapes


def test_a_threshold_of_another_form_of_score_or_vector_is_refused(planted):
    found = planted({"benign": chats(40)}, [(n, 1, 0) for n in range(40)], vectors=2)
    threshold = found.threshold("evil", benign="benign", by="proxy")
    assert plot_screening(found, "evil", by="proxy", threshold=threshold).layout.shapes[0].x0 == threshold.value
    with pytest.raises(ValueError, match="Expected a threshold of evil@1"):
        plot_screening(found, "evil", threshold=threshold)
    with pytest.raises(ValueError, match="Expected a threshold of kind@0"):
        plot_screening(found, "kind", by="proxy", threshold=threshold)


def test_other_forms_of_score_are_drawn_on_request(planted):
    found = two_sets(planted)
    (means,) = traces(plot_screening(found, by="response"), "mean")
    assert list(means.x) == found.dataset_scores("response")["score"].tolist()


def test_the_name_of_a_data_set_is_text_and_no_markup(planted):
    figure = plot_screening(planted({NASTY: chats(3)}, [(n, 0, 0) for n in range(3)]))
    assert "<script" not in shown(figure)
    assert "&lt;script&gt;" in figure.layout.annotations[0].text
    assert NASTY_AS_TEXT[:40] in traces(figure, "mean")[0].hovertext[0]


def test_nothing_to_draw_is_an_error(planted):
    found = planted(chats(3), [(1, 0, None)] * 3)
    with pytest.raises(ValueError, match="No sample has a score on evil@1"):
        plot_screening(found)


@pytest.mark.parametrize("n", [3, 20])
def test_every_row_has_room_for_its_name_and_outline(planted, n):
    found = with_scores(two_sets(planted), np.arange(50.0))
    names = tuple(f"set {number}" for number in range(n))
    rows = pandas.concat([found.rows.assign(dataset=name) for name in names], ignore_index=True)
    figure = plot_screening(with_rows(found, rows, names))
    margin = figure.layout.margin
    assert (figure.layout.height - margin.t - margin.b) / n >= 60
    assert len(figure.layout.annotations) == n
