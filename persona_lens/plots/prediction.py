"""Pictures of how well a projection predicts the trait score of the response that follows it.

The two correlations, over all responses and within one condition: arXiv:2507.21509, sections 3.3 and C.
Knows nothing about how projections were measured or scores were given.
"""

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from persona_lens.plots.style import (
    BLUE,
    GREY,
    INK,
    PALE_BLUE,
    SEQUENTIAL,
    VERMILION,
    band,
    graph_objects,
    number,
    safe,
    small,
    styled_figure,
)
from persona_lens.statistics import Estimate

if TYPE_CHECKING:
    import plotly.graph_objects

PALE_VERMILION = "rgba(213, 94, 0, 0.18)"


class _Point(NamedTuple):
    projection: float
    score: float
    condition: str
    question: str


def plot_projection_scores(
    projections: Sequence[float | None],
    scores: Sequence[float | None],
    conditions: Sequence[str],
    *,
    title: str,
    overall: Estimate | str | None = None,
    within: Estimate | str | None = None,
    order: Sequence[str] = (),
    questions: Sequence[str] = (),
    across: str = "projection of the last prompt token",
    upward: str = "mean trait score (0 to 100)",
) -> "plotly.graph_objects.Figure":
    """Trait score (upward) against projection (across), a colour for each condition from discouraging to encouraging.

    `conditions` names each point's; `order` lists them from the most discouraging, by default as they first appear. The
    thick line is the least-squares fit over all points, thin ones within each condition, whose slope the conditions'
    own means cannot make. `overall` and `within` are the two correlations, as an estimate or in words; `questions` are
    shown on hovering. Points without a projection or score are left out and counted.
    Raises ValueError where no point has both.
    """
    if not len(projections) == len(scores) == len(conditions) == (len(questions) or len(scores)):
        raise ValueError("Every point needs a projection, a score and a condition (and a question, where there are).")
    rows = list(zip(projections, scores, conditions, questions or [""] * len(scores), strict=True))
    points = [_Point(x, y, *rest) for x, y, *rest in rows if x is not None and y is not None and isfinite(x + y)]
    if not points:
        raise ValueError(f"{title}: no point has both a projection and a score to draw.")
    names = list(order or dict.fromkeys(conditions))
    if unknown := set(conditions) - set(names):
        raise ValueError(f"{title}: `order` lacks the condition {sorted(unknown)[0]!r}: list all of them.")
    figure = styled_figure(safe(title, 90), _correlation_notes(overall, within, len(points), len(rows)), legend_rows=0)
    x, y = _fit(points)
    figure.add_scatter(
        x=x, y=y, name="fit over all", mode="lines", line={"color": INK, "width": 3}, hoverinfo="skip", legendrank=1
    )
    for name, colour in zip(names, _sequence(len(names)), strict=True):
        own = [point for point in points if point.condition == name]
        if own:
            _add_condition(figure, name, own, colour)
    beside = {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top", "traceorder": "reversed"}
    figure.update_layout(legend={**beside, "title": {"text": small("condition, from encouraging<br>to discouraging")}})
    figure.update_xaxes(title_text=across)
    # The line leaves the scale of scores, the picture does not.
    figure.update_yaxes(title_text=upward, range=[-4, 104])
    return figure


def plot_layer_correlations(
    layers: Sequence[int],
    overall: Sequence[Estimate],
    within: Sequence[Estimate],
    *,
    title: str = "how well the projection predicts the trait score at each layer",
) -> "plotly.graph_objects.Figure":
    """Pearson's correlation of projection and trait score at every layer (counted from 0), with 95 % intervals.

    `overall` is over all responses, most of which is the difference between conditions; `within` is the mean of the
    correlations within each. A layer without an estimate leaves a gap.
    Raises ValueError where no layer has one.
    """
    if not len(layers) == len(overall) == len(within):
        raise ValueError(f"Every layer needs both estimates: {len(layers)}, {len(overall)} and {len(within)} came.")
    if all(each.value is None for each in [*overall, *within]):
        raise ValueError("No layer has a correlation to draw.")
    figure = styled_figure(safe(title, 90), [_best_in_words(layers, overall, within)])
    figure.add_hline(y=0, line={"color": GREY, "width": 1}, layer="below")
    curves = (
        ("overall", overall, BLUE, PALE_BLUE),
        ("mean within conditions", within, VERMILION, PALE_VERMILION),
    )
    for name, estimates, colour, pale in curves:
        x, y = band(layers, estimates)
        fill = {"fill": "toself", "fillcolor": pale, "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_scatter(x=x, y=y, mode="lines", showlegend=False, legendgroup=name, **fill)
        hover = [f"<b>layer {at}</b><br>{name} {_in_words(each)}" for at, each in zip(layers, estimates, strict=True)]
        figure.add_scatter(
            x=list(layers),
            y=[each.value for each in estimates],
            mode="lines+markers",
            name=name,
            legendgroup=name,
            line={"color": colour, "width": 3},
            marker={"size": 7, "color": colour},
            hovertext=hover,
            hoverinfo="text",
        )
    figure.update_xaxes(title_text="layer (counted from 0)", tickformat="d")
    figure.update_yaxes(title_text="Pearson correlation")
    return figure


def _sequence(n: int) -> list[str]:
    """Colours from the dark end of the scale, discouraging, to its bright one."""
    graph_objects()
    from plotly.colors import sample_colorscale

    return [str(colour) for colour in sample_colorscale(SEQUENTIAL, [place / max(1, n - 1) for place in range(n)])]


def _add_condition(figure: Any, name: str, points: list[_Point], colour: str) -> None:
    """A condition's points, and its own line where its projections differ."""
    hover = [
        f"<b>{safe(name, 90)}</b><br>projection {number(point.projection)}, trait score {number(point.score, 1)}"
        + f"<br>{small(safe(point.question, 90))}" * bool(point.question)
        for point in points
    ]
    figure.add_scatter(
        x=[point.projection for point in points],
        y=[point.score for point in points],
        mode="markers",
        name=safe(name, 30),
        legendgroup=name,
        marker={"color": colour, "size": 9, "line": {"color": INK, "width": 0.6}},
        hovertext=hover,
        hoverinfo="text",
        cliponaxis=False,
    )
    x, y = _fit(points)
    line = {"color": colour, "width": 2}
    figure.add_scatter(
        x=x, y=y, mode="lines", legendgroup=name, showlegend=False, line=line, opacity=0.6, hoverinfo="skip"
    )


class _Line(NamedTuple):
    x: list[float]
    y: list[float]


def _fit(points: Sequence[_Point]) -> _Line:
    """The ends of the least-squares line over the points' own range; none where their projections do not differ."""
    x = np.array([point.projection for point in points])
    if len(x) < 3 or np.ptp(x) < 1e-9:
        return _Line([], [])
    slope, middle = np.polyfit(x - x.mean(), [point.score for point in points], 1)
    ends = np.array([x.min(), x.max()])
    return _Line(ends.tolist(), (middle + slope * (ends - x.mean())).tolist())


def _correlation_notes(overall: Estimate | str | None, within: Estimate | str | None, n: int, n_all: int) -> list[str]:
    named = (("Pearson overall", overall), ("mean within conditions", within))
    found = ", ".join(f"{name} {_in_words(each)}" for name, each in named if each is not None)
    missing = f"{n} points" + f"; {n_all - n} without projection or score left out" * (n < n_all)
    return [each for each in (found, missing) if each]


def _best_in_words(layers: Sequence[int], overall: Sequence[Estimate], within: Sequence[Estimate]) -> str:
    parts = []
    for name, estimates in (("overall", overall), ("within conditions", within)):
        measured = [
            (each.value, layer, each) for layer, each in zip(layers, estimates, strict=True) if each.value is not None
        ]
        if measured:
            _, layer, best = max(measured, key=lambda found: found[0])
            parts.append(f"{name} {_in_words(best)} at layer {layer}")
    return "highest: " + ", ".join(parts) + "; bands are 95 % intervals"


def _in_words(estimate: Estimate | str) -> str:
    if isinstance(estimate, str):
        return safe(estimate, 60)
    interval = "" if estimate.low is None else f" [{number(estimate.low)}, {number(estimate.high)}]"
    return number(estimate.value) + interval
