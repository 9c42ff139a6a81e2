"""The picture of an agreement has every compared row once, and says what it leaves out."""

import sys
from copy import deepcopy

import pytest

from persona_lens.judges.agreement import judge_agreement
from persona_lens.plots.agreement import plot_agreement
from tests.agreement_cases import FIRST, QUESTIONS, SECOND, scored
from tests.plot_cases import NASTY, NASTY_AS_TEXT, shown, traces

POLARITIES = ["positive", "negative"] * 4 + ["neutral", "negative"]


def made(**parts):
    return judge_agreement(scored(FIRST, QUESTIONS, polarities=POLARITIES), SECOND, **parts)


def points(figure):
    return {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in figure.data if trace.type == "scatter"}


def test_a_point_stands_for_every_row_under_its_polarity():
    found = points(plot_agreement(made()))
    assert {name: len(each) for name, each in found.items()} == {
        "positive prompt (4)": 4,
        "negative prompt (5)": 5,
        "neutral prompt (1)": 1,
    }
    assert found["positive prompt (4)"] == list(zip(FIRST[:8:2], SECOND[:8:2], strict=True))
    assert found["neutral prompt (1)"] == [(55.0, 65.0)]


def test_polarities_have_their_own_colours_and_absent_ones_no_entry():
    figure = plot_agreement(judge_agreement(scored(FIRST[:8], polarities=POLARITIES[:8]), SECOND[:8]))
    colours = [trace.marker.color for trace in figure.data if trace.type == "scatter"]
    assert len(set(colours)) == len(colours) == 2


def test_rows_without_both_scores_are_no_points_and_are_counted():
    figure = plot_agreement(judge_agreement(scored([*FIRST, None, 3.0, None]), [*SECOND, 0.0, None, None]))
    assert sum(map(len, points(figure).values())) == 10
    title = figure.layout.title.text
    assert "10 answers to 10 questions; without a score: 1 by first only, 1 by second only, 1 by both" in title


def test_long_names_cost_no_count_of_missing_scores():
    names = ("a" * 36, "b" * 36)
    found = judge_agreement(scored([*FIRST, None, 3.0, None]), [*SECOND, 0.0, None, None], names=names)
    title = plot_agreement(found).layout.title.text
    assert found.missing_in_words in title
    assert max(len(line) for line in title.split("<br>")) < 180


def test_the_title_has_the_statistics_with_their_intervals():
    found = made()
    title = plot_agreement(found).layout.title.text
    assert found.statistics_in_words in title
    for name in ("pearson", "spearman", "kappa"):
        estimate = getattr(found, name)
        assert f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]" in title


def test_the_quarters_have_their_counts_on_their_sides_of_the_threshold():
    found = made(threshold=62.0)
    notes = plot_agreement(found).layout.annotations
    counts = {(note.xshift > 0, note.yshift > 0): int(note.text.strip("</b>")) for note in notes}
    assert counts == found.quarters
    assert {(note.x, note.y) for note in notes} == {(62.0, 62.0)}


def test_the_threshold_and_equality_are_lines():
    lines = {(line.x0, line.y0, line.x1, line.y1) for line in plot_agreement(made(threshold=62.0)).layout.shapes}
    assert (0, 0, 100, 100) in lines
    assert any((x0, x1) == (62.0, 62.0) for x0, _, x1, _ in lines)
    assert any((y0, y1) == (62.0, 62.0) for _, y0, _, y1 in lines)


def test_the_bars_count_every_score_of_both():
    figure = plot_agreement(made())
    bars = [trace for trace in figure.data if trace.type == "histogram"]
    assert sorted(score for trace in bars if trace.x is not None for score in trace.x) == sorted(FIRST)
    assert sorted(score for trace in bars if trace.y is not None for score in trace.y) == sorted(SECOND)
    bins = [trace.xbins if trace.x is not None else trace.ybins for trace in bars]
    assert all(each.start <= 0 and each.end > 100 for each in bins)


def test_hovering_shows_question_response_and_both_scores():
    found = judge_agreement(scored([30.0], ["Who?"], text="I am. " * 40), [71.25], names=("cheap", "people"))
    (hover,) = traces(plot_agreement(found), "neutral prompt (1)", type="scatter")[0].hovertext
    assert "Who?" in hover
    assert "I am. I am." in hover
    assert "…" in hover
    assert "cheap 30.0, people 71.2" in hover


def test_the_axes_name_who_scored_and_what():
    rows = scored([0.0] * 3, coherence=[90.0, 20.0, 60.0])
    figure = plot_agreement(judge_agreement(rows, [1.0, 2.0, 3.0], names=("cheap", "people"), of="coherence"))
    assert figure.layout.xaxis2.title.text == "cheap: coherence"
    assert figure.layout.yaxis2.title.text == "people: coherence"
    assert "agreement on the coherence" in figure.layout.title.text


def test_the_square_of_the_scores_is_square():
    layout = plot_agreement(made()).layout
    width = layout.width - layout.margin.l - layout.margin.r
    height = layout.height - layout.margin.t - layout.margin.b
    across, upward = layout.xaxis2.domain, layout.yaxis2.domain
    assert width * (across[1] - across[0]) == pytest.approx(height * (upward[1] - upward[0]))
    assert layout.xaxis2.range == layout.yaxis2.range


def test_undefined_statistics_are_said_to_be_undefined():
    title = plot_agreement(judge_agreement(scored([1.0, 2.0]), [3.0, 4.0])).layout.title.text
    assert "Pearson undefined, Spearman undefined, kappa undefined" in title


def test_markup_and_dollars_in_foreign_text_are_shown_as_text():
    rows = scored([1.0, 2.0], [NASTY, "$x$"], text=f"$y$ {NASTY}")
    text = shown(plot_agreement(judge_agreement(rows, [3.0, None], names=(NASTY, "$z$")))).replace("\\'", "'")
    assert "<b>bold" not in text
    assert "<script" not in text
    assert "$" not in text
    assert NASTY_AS_TEXT[:20] in text


def test_drawing_leaves_the_agreement_as_it_was():
    found = made()
    before = deepcopy(found)
    plot_agreement(found)
    assert found == before


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="cheap and people: no row has both scores to draw"):
        plot_agreement(judge_agreement(scored([1.0, None]), [None, 2.0], names=("cheap", "people")))


def test_without_plotly_the_error_names_the_command(monkeypatch):
    for name in ("plotly", "plotly.graph_objects"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "persona-lens\[plots\]"'):
        plot_agreement(made())
