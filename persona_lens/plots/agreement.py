"""The picture of how far two judges agree: their scores of the same answers against each other.

Lines at the threshold make four quarters, and the bars at the edges show how many points lie upon each other.
"""

from typing import TYPE_CHECKING, Any

from persona_lens.judges.agreement import Agreement, ScorePair
from persona_lens.plots.style import (
    BLUE,
    DASHED,
    GREY,
    INK,
    VERMILION,
    graph_objects,
    number,
    safe,
    small,
    styled_figure,
)
from persona_lens.traits.trait import Polarity

if TYPE_CHECKING:
    import plotly.graph_objects

COLOURS: dict[Polarity, str] = {"positive": VERMILION, "negative": BLUE, "neutral": GREY}
# 0 and 100 are in the middle of their bins, as their points stand.
BINS = {"start": -2, "end": 102, "size": 4}
EQUAL = {"color": GREY, "width": 1.5}
ENDS = [-4, 104]
_MAIN: dict[str, Any] = {"row": 2, "col": 1}


def plot_agreement(agreement: Agreement) -> "plotly.graph_objects.Figure":
    """The second's score (upward) against the first's (across), both 0 to 100: a point for every row that has both.

    Colours are the system prompts, the diagonal is equality, the dashed lines are the threshold, and a number in the
    corner of each quarter counts its points. Bars at the edges count scores. Hovering shows the question, the beginning
    of the response and both scores; rows that lack a score are counted under the title.
    Raises ValueError where no row has both scores.
    """
    if not agreement.n:
        raise ValueError(f"{' and '.join(agreement.names)}: no row has both scores to draw.")
    figure = _panels(agreement)
    for polarity, colour in COLOURS.items():
        pairs = [pair for pair in agreement.compared if pair.rollout.polarity == polarity]
        if pairs:
            _add_pairs(figure, agreement, pairs, f"{polarity} prompt ({len(pairs)})", colour)
    figure.add_shape(type="line", x0=0, y0=0, x1=100, y1=100, line=EQUAL, opacity=1, layer="below", **_MAIN)
    figure.add_hline(y=agreement.threshold, line=DASHED, opacity=1, layer="below", **_MAIN)
    figure.add_vline(x=agreement.threshold, line=DASHED, opacity=1, layer="below", **_MAIN)
    _count_quarters(figure, agreement)
    return figure


def _panels(agreement: Agreement) -> Any:
    """The square of the scores, with a strip for bars above it and one beside it."""
    graph_objects()
    from plotly.subplots import make_subplots

    gap = 0.015
    figure: Any = make_subplots(
        2,
        2,
        shared_xaxes=True,
        shared_yaxes=True,
        column_widths=[0.86, 0.14],
        row_heights=[0.14, 0.86],
        horizontal_spacing=gap,
        vertical_spacing=gap,
        specs=[[{}, None], [{}, {}]],
    )
    first, second = (safe(name, 40) for name in agreement.names)
    of = agreement.of.replace("_", " ")
    rows = f"{agreement.n} answers to {agreement.n_questions} questions"
    missing = safe(agreement.missing_in_words, 140)
    counts = [f"{rows}; {missing}"] if len(rows + missing) <= 95 else [rows, missing]
    notes = [f"{first} (across) and {second} (upward)", agreement.statistics_in_words, *counts]
    styled_figure(f"{safe(', '.join(agreement.traits))}: agreement on the {of}", notes, figure, legend_rows=1)
    margin = figure.layout.margin
    width = 720
    figure.update_layout(
        width=width, height=width - margin.l - margin.r + margin.t + margin.b, barmode="stack", bargap=0.1
    )
    scores = {"range": ENDS, "tickvals": [0, 25, 50, 75, 100]}
    figure.update_xaxes(title_text=f"{first}: {of}", **scores, **_MAIN)
    figure.update_yaxes(title_text=f"{second}: {of}", **scores, **_MAIN)
    bare = {"showticklabels": False, "ticks": "", "showline": False}
    for row, col in ((1, 1), (2, 2)):
        figure.update_xaxes(**bare, row=row, col=col)
        figure.update_yaxes(**bare, row=row, col=col)
    figure.update_xaxes(range=ENDS, row=1, col=1)
    figure.update_yaxes(range=ENDS, row=2, col=2)
    return figure


def _add_pairs(figure: Any, agreement: Agreement, pairs: list[ScorePair], name: str, colour: str) -> None:
    """Points and both strips of bars for the rows of one polarity."""
    x, y = [pair.first for pair in pairs], [pair.second for pair in pairs]
    marker = {"color": colour, "size": 9, "opacity": 0.55, "line": {"color": "white", "width": 0.8}}
    hover = [_hover(agreement, pair) for pair in pairs]
    together = {"name": name, "legendgroup": name}
    # Whole points at the ends of the scale, not halves.
    figure.add_scatter(
        x=x,
        y=y,
        mode="markers",
        marker=marker,
        hovertext=hover,
        hoverinfo="text",
        cliponaxis=False,
        **together,
        **_MAIN,
    )
    bars = {
        "marker": {"color": colour, "opacity": 0.75, "line": {"width": 0}},
        "showlegend": False,
        "hoverinfo": "skip",
    }
    figure.add_histogram(x=x, xbins=BINS, **bars, **together, row=1, col=1)
    figure.add_histogram(y=y, ybins=BINS, **bars, **together, row=2, col=2)


def _count_quarters(figure: Any, agreement: Agreement) -> None:
    """How many points each quarter has, written where the quarters meet."""
    for (across, upward), count in agreement.quarters.items():
        figure.add_annotation(
            x=agreement.threshold,
            y=agreement.threshold,
            xshift=6 if across else -6,
            yshift=6 if upward else -6,
            xanchor="left" if across else "right",
            yanchor="bottom" if upward else "top",
            text=f"<b>{count}</b>",
            font={"size": 16, "color": INK},
            bgcolor="rgba(255, 255, 255, 0.8)",
            showarrow=False,
            **_MAIN,
        )


def _hover(agreement: Agreement, pair: ScorePair) -> str:
    scores = zip(agreement.names, (number(pair.first, 1), number(pair.second, 1)), strict=True)
    return "<br>".join(
        [
            f"<b>{safe(pair.rollout.question, 90)}</b>",
            safe(pair.rollout.response, 90),
            small(f"{pair.rollout.polarity} prompt: ") + ", ".join(f"{safe(name)} {score}" for name, score in scores),
        ]
    )
