"""The picture of monitoring: projections by turn, before and after the model speaks (arXiv:2507.21509, section 3.3).

Every vector has a panel with a scale of its own, because projections on different vectors are not comparable.
Knows nothing about how projections were measured.
"""

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from persona_lens.monitoring import ChatProjections, MonitoredVector, Monitoring, TurnProjections
from persona_lens.plots.style import (
    BLUE,
    DASHED,
    INK,
    VERMILION,
    graph_objects,
    number,
    safe,
    small,
    styled_figure,
)
from persona_lens.thresholds import Threshold

if TYPE_CHECKING:
    import plotly.graph_objects

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
