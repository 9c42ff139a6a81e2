"""The picture of an agreement has every compared row once, and says what it leaves out."""

import pytest

from persona_lens.judges.agreement import judge_agreement
from persona_lens.plots.agreement import plot_agreement
from tests.agreement_cases import FIRST, QUESTIONS, SECOND, scored
from tests.plot_cases import NASTY, NASTY_AS_TEXT, shown

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
    title = plot_agreement(made()).layout.title.text
    assert made().statistics_in_words in title


def test_rows_without_both_scores_are_no_points_and_are_counted():
    figure = plot_agreement(judge_agreement(scored([*FIRST, None, 3.0, None]), [*SECOND, 0.0, None, None]))
    assert sum(map(len, points(figure).values())) == 10
    title = figure.layout.title.text
    assert "10 answers to 10 questions; without a score: 1 by first only, 1 by second only, 1 by both" in title


def test_the_quarters_have_their_counts_on_their_sides_of_the_threshold():
    found = made(threshold=62.0)
    notes = plot_agreement(found).layout.annotations
    counts = {(note.xshift > 0, note.yshift > 0): int(note.text.strip("</b>")) for note in notes}
    assert counts == found.quarters
    assert {(note.x, note.y) for note in notes} == {(62.0, 62.0)}


def test_the_bars_count_every_score_of_both():
    figure = plot_agreement(made())
    bars = [trace for trace in figure.data if trace.type == "histogram"]
    assert sorted(score for trace in bars if trace.x is not None for score in trace.x) == sorted(FIRST)
    assert sorted(score for trace in bars if trace.y is not None for score in trace.y) == sorted(SECOND)
    bins = [trace.xbins if trace.x is not None else trace.ybins for trace in bars]
    assert all(each.start <= 0 and each.end > 100 for each in bins)


def test_markup_and_dollars_in_foreign_text_are_shown_as_text():
    rows = scored([1.0, 2.0], [NASTY, "$x$"], text=f"$y$ {NASTY}")
    text = shown(plot_agreement(judge_agreement(rows, [3.0, None], names=(NASTY, "$z$")))).replace("\\'", "'")
    assert "<b>bold" not in text
    assert "<script" not in text
    assert "$" not in text
    assert NASTY_AS_TEXT[:20] in text


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="cheap and people: no row has both scores to draw"):
        plot_agreement(judge_agreement(scored([1.0, None]), [None, 2.0], names=("cheap", "people")))
