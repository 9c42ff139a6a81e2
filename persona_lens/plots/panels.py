"""What pictures of several panels share: their size, a legend that names a trace once, and whiskers.

Knows nothing about what is drawn.
"""

from collections.abc import Sequence
from typing import Any

from persona_lens.plots.style import (
    graph_objects,
    number,
    safe,
)
from persona_lens.statistics import Estimate

# Points at the ends of the scale are whole.
SCORES = {"range": [-5, 105], "tickvals": [0, 25, 50, 75, 100]}
WHISKERS = "whiskers are 95 % intervals"


def subplots(down: int, across: int, **choices: Any) -> Any:
    """A figure of panels, which plotly makes with the given choices."""
    graph_objects()
    from plotly.subplots import make_subplots

    return make_subplots(down, across, **choices)


def size_panels(figure: Any, *, width: int, panels: int, above: int) -> None:
    """Room for panels of so many pixels, and for `above` more under the legend, where the panels' names stand."""
    margin = figure.layout.margin
    height = margin.t + above + panels + margin.b
    figure.update_layout(width=width, height=height, margin_t=margin.t + above, hovermode="closest")
    figure.update_layout(legend_y=1 + (above + 8) / panels, title_y=1 - 15 / height)


def add_trace(figure: Any, name: str, *, cell: dict[str, int] | None = None, **look: Any) -> None:
    """A trace whose name the legend has once for all panels."""
    first = name not in {trace.legendgroup for trace in figure.data if trace.showlegend}
    figure.add_scatter(
        name=safe(name, 34), legendgroup=name, showlegend=first, hoverinfo="text", **look, **(cell or {})
    )


def whiskers(estimates: Sequence[Estimate], colour: str) -> dict[str, Any]:
    """Bars from each low to each high, none where there is no interval."""
    above: list[float | None] = []
    below: list[float | None] = []
    for value, low, high, _ in estimates:
        above.append(None if value is None or high is None else high - value)
        below.append(None if value is None or low is None else value - low)
    return {"array": above, "arrayminus": below, "symmetric": False, "color": colour, "thickness": 1.2, "width": 3}


def in_words(estimate: Estimate) -> str:
    """The value with its interval, to two decimals."""
    interval = "" if estimate.low is None else f" [{number(estimate.low)}, {number(estimate.high)}]"
    return number(estimate.value) + interval
