"""Pictures of estimates side by side: bars in groups, and a line a series over the layers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_lens.plots.monitoring import CHATS
from persona_lens.plots.style import (
    GREY,
    INK,
    SEQUENTIAL,
    WHISKERS,
    band,
    graph_objects,
    in_words,
    safe,
    styled_figure,
    whiskers,
)
from persona_lens.statistics import Estimate

if TYPE_CHECKING:
    import plotly.graph_objects


def plot_grouped_estimates(
    groups: Mapping[str, Mapping[str, Estimate]], *, title: str, upward: str
) -> "plotly.graph_objects.Figure":
    """Bars with their 95 % intervals: a group for each name, in it a bar for each series, in one order throughout.

    `upward` names the axis. A missing estimate leaves a gap.
    Raises ValueError where nothing has a value.
    """
    if all(each.value is None for group in groups.values() for each in group.values()):
        raise ValueError(f"{title}: no bar has a value to draw.")
    figure = styled_figure(safe(title, 90), [WHISKERS])
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    nothing = Estimate(None, None, None, 0)
    for name, colour in zip(series, _colours(len(series)), strict=True):
        estimates = [group.get(name, nothing) for group in groups.values()]
        hover = [
            f"<b>{safe(group)}</b><br>{safe(name)} {in_words(each)}, n = {each.n}"
            for group, each in zip(groups, estimates, strict=True)
        ]
        figure.add_bar(
            x=[safe(group, 30) for group in groups],
            y=[each.value for each in estimates],
            error_y=whiskers(estimates, INK),
            name=safe(name, 34),
            marker={"color": colour},
            hovertext=hover,
            hoverinfo="text",
        )
    figure.update_layout(barmode="group", bargap=0.35, bargroupgap=0.08)
    figure.update_yaxes(title_text=safe(upward, 60))
    return figure


def plot_layer_estimates(
    series: Mapping[str, Sequence[Estimate]], *, title: str, upward: str, chance: float | None = None
) -> "plotly.graph_objects.Figure":
    """A line for each series over the layers, counted from 0, in the band of its 95 % intervals.

    `upward` names the axis, and `chance` is a level to compare with. A missing estimate leaves a gap.
    Raises ValueError where nothing has a value.
    """
    if all(each.value is None for estimates in series.values() for each in estimates):
        raise ValueError(f"{title}: no layer has a value to draw.")
    figure = styled_figure(safe(title, 90), ["bands are 95 % intervals"])
    if chance is not None:
        figure.add_hline(y=chance, line={"color": GREY, "width": 1, "dash": "dash"}, layer="below")
    for place, (name, estimates) in enumerate(series.items()):
        _add_line(figure, name, estimates, CHATS[place % len(CHATS)])
    figure.update_xaxes(title_text="layer (counted from 0)", tickformat="d")
    figure.update_yaxes(title_text=safe(upward, 60))
    return figure


def _add_line(figure: Any, name: str, estimates: Sequence[Estimate], colour: str) -> None:
    layers = list(range(len(estimates)))
    x, y = band(layers, estimates)
    look = {"mode": "lines", "showlegend": False, "legendgroup": name, "hoverinfo": "skip", "opacity": 0.25}
    figure.add_scatter(x=x, y=y, fill="toself", fillcolor=colour, line={"width": 0}, **look)
    hover = [
        f"<b>{safe(name)}, layer {layer}</b><br>{in_words(each)}" for layer, each in zip(layers, estimates, strict=True)
    ]
    figure.add_scatter(
        x=layers,
        y=[each.value for each in estimates],
        mode="lines+markers",
        name=safe(name, 34),
        legendgroup=name,
        line={"color": colour, "width": 3},
        marker={"size": 6, "color": colour},
        hovertext=hover,
        hoverinfo="text",
    )


def _colours(n: int) -> list[str]:
    """From the bright end of the scale, the first series, to its dark one."""
    graph_objects()
    from plotly.colors import sample_colorscale

    return [str(each) for each in sample_colorscale(SEQUENTIAL, [1 - place / max(1, n - 1) for place in range(n)])]
