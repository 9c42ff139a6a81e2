"""Pictures of monitoring: projections by turn, what they predict, and how well they detect.

By turn, every vector has a panel with a scale of its own, because projections on different vectors are not comparable
(arXiv:2507.21509, section 3.3). Predictions show two correlations, over all responses and within one condition
(sections 3.3 and C). A detector is drawn as its ROC curve with what thresholds catch.
"""

from collections.abc import Sequence
from itertools import cycle
from math import ceil, isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from persona_lens.monitoring.detection import Detection
from persona_lens.monitoring.result import ChatProjections, MonitoredVector, Monitoring, TurnProjections
from persona_lens.monitoring.thresholds import Threshold
from persona_lens.plots.style import (
    BLUE,
    DASHED,
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

SYMBOLS = ("diamond", "square", "triangle-up", "x")


def plot_roc(
    detection: Detection, *, thresholds: Sequence[Threshold] = (), title: str = "how well the projection detects"
) -> "plotly.graph_objects.Figure":
    """True (upward) against false positive rate, with the area under the curve; the diagonal is chance.

    The ring is the best Youden's J, chosen on these very values. Each of `thresholds` is a point with the 95 %
    intervals of both rates.
    """
    found, best = detection, detection.best
    shown = f"Youden's J {number(best.tpr - best.fpr)} at {number(best.threshold)}"
    notes = [
        f"area under the curve {_interval(found.auc)}; best {shown}",
        f"{found.n_positive} positive and {found.n_negative} negative values, {found.n_groups} groups",
    ]
    figure = styled_figure(safe(title, 60), notes, legend_rows=3 + len(thresholds))
    hover = [f"above {number(t)}<br>true positives {y:.0%}<br>false positives {x:.0%}" for x, y, t in found.points]
    chance = {"color": GREY, "width": 1.5, "dash": "dot"}
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", name="chance", line=chance, hoverinfo="skip")
    look = {"line": {"color": BLUE, "width": 3}, "fill": "tozeroy", "fillcolor": "rgba(0, 114, 178, 0.08)"}
    figure.add_scatter(
        x=[point.fpr for point in found.points],
        y=[point.tpr for point in found.points],
        mode="lines",
        name="projection",
        hovertext=hover,
        hoverinfo="text",
        **look,
    )
    ring = {"symbol": "circle-open", "size": 16, "color": VERMILION, "line": {"width": 3}}
    figure.add_scatter(
        x=[best.fpr], y=[best.tpr], mode="markers", name="best Youden’s J", marker=ring, hoverinfo="skip"
    )
    for threshold, symbol in zip(thresholds, cycle(SYMBOLS), strict=False):
        _add_rates(figure, found, threshold, symbol)
    ends = {"range": [-0.02, 1.02], "tickformat": ".0%", "tickvals": [0, 0.25, 0.5, 0.75, 1]}
    figure.update_xaxes(title_text="false positive rate", **ends)
    figure.update_yaxes(title_text="true positive rate", **ends)
    margin, width = figure.layout.margin, 620
    height = width - margin.l - margin.r + margin.t + margin.b
    figure.update_layout(width=width, height=height, legend_orientation="v", title_y=1 - 15 / height)
    return figure


def _add_rates(figure: Any, detection: Detection, threshold: Threshold, symbol: str) -> None:
    """A threshold's point, with the intervals of both its rates as bars."""
    rates = detection.rates(threshold)
    name = f"{threshold.percentile:g}th percentile of benign: true {_share(rates.tpr)}, false {_share(rates.fpr)}"
    figure.add_scatter(
        x=[rates.fpr.value],
        y=[rates.tpr.value],
        error_x=_bars(rates.fpr),
        error_y=_bars(rates.tpr),
        mode="markers",
        name=name,
        marker={"symbol": symbol, "size": 11, "color": INK},
        hovertext=safe(str(threshold), 120),
        hoverinfo="text",
    )


def _bars(estimate: Estimate) -> dict[str, Any]:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return {}
    above, below = estimate.high - estimate.value, estimate.value - estimate.low
    return {"array": [above], "arrayminus": [below], "symmetric": False, "color": INK, "thickness": 1.5, "width": 4}


def _share(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    interval = "" if estimate.low is None or estimate.high is None else f" [{estimate.low:.0%}, {estimate.high:.0%}]"
    return f"{estimate.value:.0%}{interval}"


def _interval(estimate: Estimate) -> str:
    interval = "" if estimate.low is None else f" [{number(estimate.low)}, {number(estimate.high)}]"
    return number(estimate.value) + interval


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


# Okabe and Ito's colours that stand out from white, the two of all pictures first.
CHATS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
PANELS_ACROSS = 2
HOW_TO_READ = "filled: mean over the response; hollow, dotted: last prompt token, before the model speaks"


def plot_turns(
    monitoring: Monitoring, *, vector: int | Sequence[int] | None = 0, thresholds: Sequence[Threshold] = ()
) -> "plotly.graph_objects.Figure":
    """Projection (upward) over the turns of the model (across, counted from 1), one colour a chat.

    A filled point is the mean over a response, a hollow one on a dotted line the last prompt token before it; a turn
    without a response leaves a gap. `vector` is the place of one vector, of several, or None for all: each has a panel
    with a scale of its own. Dashed lines are `thresholds`, each in the panels of its vector.
    Raises ValueError where there is no such vector, no turn, or a threshold of a vector that is not drawn.
    """
    if not any(chat.turns for chat in monitoring.chats):
        raise ValueError("There is no turn to draw: monitor chats in which the model speaks.")
    shown = range(len(monitoring.vectors)) if vector is None else [vector] if isinstance(vector, int) else list(vector)
    if absent := [place for place in shown if not 0 <= place < len(monitoring.vectors)]:
        raise ValueError(f"There is no vector {absent[0]}: {len(monitoring.vectors)} were monitored, counted from 0.")
    panels = {place: [each for each in thresholds if _belongs(each, monitoring.vectors[place])] for place in shown}
    strangers = [each for each in thresholds if not any(each in found for found in panels.values())]
    if strangers:
        raise ValueError(
            f"No vector that is drawn is the one of this threshold: {strangers[0]} (vector {strangers[0].fingerprint})."
        )
    ends = (0.5, max(len(chat.turns) for chat in monitoring.chats) + 0.5)
    figure, cells = _panels(monitoring, list(panels), ends)
    named: set[str] = set()
    for cell, (place, found) in zip(cells, panels.items(), strict=True):
        for threshold in found:
            _add_threshold(figure, threshold, ends, threshold.of not in named, cell)
            named.add(threshold.of)
        for index, chat in enumerate(monitoring.chats):
            _add_chat(figure, chat, place, CHATS[index % len(CHATS)], cell is cells[0], cell)
    return figure


def _belongs(threshold: Threshold, vector: MonitoredVector) -> bool:
    return (threshold.layer, threshold.fingerprint) == (vector.layer, vector.fingerprint)


def _panels(
    monitoring: Monitoring, shown: Sequence[int], ends: tuple[float, float]
) -> tuple[Any, list[dict[str, int]]]:
    """A figure with a panel for each vector, and the panels' places in it."""
    graph_objects()
    from plotly.subplots import make_subplots

    vectors, across = [monitoring.vectors[place] for place in shown], min(PANELS_ACROSS, len(shown))
    down, several = ceil(len(shown) / across), len(shown) > 1
    names = [f"{safe(each.trait, 30)}, layer {each.layer}" for each in vectors]
    spacing: dict[str, Any] = {"horizontal_spacing": 0.12, "vertical_spacing": 0.2 / down}
    figure: Any = make_subplots(down, across, subplot_titles=names if several else None, **spacing)
    title = "projection over the turns" if several else f"{names[0]}: projection over the turns"
    meanwhile = [safe("; ".join(monitoring.interventions), 110)] if monitoring.interventions else []
    # About four names of chats fit beside each other, and the thresholds' among them.
    styled_figure(title, [HOW_TO_READ, *meanwhile], figure, legend_rows=1 + (1 + len(monitoring.chats)) // 5 + several)
    margin, panels = figure.layout.margin, (290 if several else 360) * down
    above = 1.01 + 26 * several / panels
    figure.update_layout(height=margin.t + margin.b + panels, hovermode="closest", margin_r=50, legend_y=above)
    figure.update_layout(title_y=1 - 15 / figure.layout.height)
    cells = [{"row": 1 + index // across, "col": 1 + index % across} for index in range(len(shown))]
    for index, cell in enumerate(cells):
        figure.update_xaxes(range=ends, dtick=max(1, ceil(ends[1] / 15)), tick0=1, **cell)
        if index + across >= len(cells):
            figure.update_xaxes(title_text="turn of the model", **cell)
        if cell["col"] == 1:
            figure.update_yaxes(title_text="projection", **cell)
    return figure, cells


def _add_chat(figure: Any, chat: ChatProjections, place: int, colour: str, legend: bool, cell: dict[str, int]) -> None:
    """Two lines of a chat: the last prompt tokens', dotted with hollow points, and the responses'."""
    turns = list(range(1, len(chat.turns) + 1))
    prompts = [turn.prompt[place] for turn in chat.turns]
    responses = [None if turn.response is None else turn.response[place] for turn in chat.turns]
    hover = [_hover(chat, number, place) for number in range(len(chat.turns))]
    hollow = {"size": 7, "color": "white", "line": {"color": colour, "width": 1.5}}
    together = {"legendgroup": chat.name, "hovertext": hover, "hoverinfo": "text", "x": turns, "mode": "lines+markers"}
    dotted = {"color": colour, "width": 1.2, "dash": "dot"}
    figure.add_scatter(y=prompts, showlegend=False, line=dotted, marker=hollow, opacity=0.8, **together, **cell)
    look = {"line": {"color": colour, "width": 2.5}, "marker": {"size": 8, "color": colour}}
    figure.add_scatter(y=responses, name=safe(chat.name, 26), showlegend=legend, **look, **together, **cell)


def _add_threshold(
    figure: Any, threshold: Threshold, ends: tuple[float, float], first: bool, cell: dict[str, int]
) -> None:
    """A dashed line with its value beside its right end."""
    name = f"{threshold.of} threshold"
    look = {"mode": "lines", "line": DASHED, "name": name, "legendgroup": name, "showlegend": first}
    hover = {"hovertext": safe(str(threshold), 120), "hoverinfo": "text"}
    figure.add_scatter(x=ends, y=[threshold.value] * 2, **look, **hover, **cell)
    beside = {"xref": "x domain", "x": 1, "xanchor": "left", "xshift": 3, "yanchor": "middle", "showarrow": False}
    figure.add_annotation(
        text=number(threshold.value), y=threshold.value, font={"size": 12, "color": INK}, **beside, **cell
    )


def _hover(chat: ChatProjections, index: int, place: int) -> str:
    """Both numbers of a turn, how much text is behind them and, where tokens were kept, how it begins."""
    turn = chat.turns[index]
    said = (
        "no response" if turn.response is None else f"response {number(turn.response[place])}, {turn.n_tokens} tokens"
    )
    lines = [f"<b>{safe(chat.name)}, turn {index + 1}</b>", f"last prompt token {number(turn.prompt[place])}", said]
    if turn.unclosed:
        lines.append("the response never closes its block")
    if turn.dropped_messages:
        lines.append(f"without the {turn.dropped_messages} oldest messages, for which there was no room")
    return "<br>".join([*lines, *_beginning(turn)])


def _beginning(turn: TurnProjections) -> list[str]:
    if turn.tokens is None:
        return []
    said = "".join(turn.tokens.pieces[turn.tokens.n_prompt :])
    return [small(safe(said, 70))] if said.strip() else []
