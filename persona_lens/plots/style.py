"""The one look of all pictures: colours, titles, grids, panels, whiskers, and how numbers and foreign text are written.

Blue and vermilion are Okabe and Ito's; they, cividis, and red against blue stay apart for every kind of colour vision.
"""

import html
from collections.abc import Iterable, Sequence
from itertools import groupby
from math import isnan
from typing import Any, NamedTuple

from persona_lens.evaluation.evaluate import Evaluation
from persona_lens.statistics import Estimate
from persona_lens.storage.text import missing_package

BLUE, PALE_BLUE, VERMILION = "#0072B2", "rgba(0, 114, 178, 0.2)", "#D55E00"
INK, GREY, BLANK = "#222222", "#9A9A9A", "#E4E4E4"
SEQUENTIAL, DIVERGING = "Cividis", "RdBu_r"
DASHED = {"color": INK, "width": 1.5, "dash": "dash"}


def graph_objects() -> Any:
    """Plotly's module of figures, or an ImportError that says how to install it."""
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise missing_package("A plot", "plotly", extra="plots") from error
    return plotly.graph_objects


def styled_figure(title: str, notes: Sequence[str] = (), figure: Any = None, *, legend_rows: int = 1) -> Any:
    """A figure with a title, a smaller line for each note, and room for the legend between them and the plot."""
    figure = graph_objects().Figure() if figure is None else figure
    figure.update_layout(
        template="simple_white",
        width=900,
        height=500,
        font={"family": "Open Sans, Helvetica, Arial, sans-serif", "size": 14, "color": INK},
        title={
            "text": f"<b>{title}</b>" + "".join(f"<br>{small(note)}" for note in notes),
            "font": {"size": 19},
            "x": 0.02,
            "y": 0.97,
            "yanchor": "top",
            # Plotly puts the first line's baseline, not its top, where it is told to.
            "pad": {"t": 8},
        },
        margin={"l": 75, "r": 30, "t": 58 + 20 * (len(notes) + legend_rows), "b": 70},
        legend={"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom", "font": {"size": 13}},
    )
    return figure


def add_grid(
    figure: Any,
    values: Sequence[Sequence[float | None]],
    hover: Sequence[Sequence[str]],
    *,
    name: str,
    decimals: int,
    scale: str,
    ends: tuple[float, float],
) -> None:
    """Cells with their numbers, on a ground of grey that shows where there is none."""
    low, high = ends
    figure.add_heatmap(
        z=values,
        text=[["" if each is None else number(each, decimals) for each in row] for row in values],
        texttemplate="%{text}",
        hovertext=hover,
        hoverinfo="text",
        colorscale=scale,
        zmin=low,
        zmax=high,
        xgap=2,
        ygap=2,
        colorbar={"title": {"text": name}, "tickvals": [low + (high - low) * part / 4 for part in range(5)]},
    )
    figure.update_layout(plot_bgcolor=BLANK)


def index_axis(names: Sequence[str]) -> dict[str, Any]:
    """Names at places 0, 1, 2 ..., at most forty of them.

    As categories of plotly's, names that repeat would be one place, and names that look like numbers would be numbers.
    """
    step = 1 + (len(names) - 1) // 40
    places = list(range(0, len(names), step))
    return {"tickvals": places, "ticktext": [names[place] for place in places], "ticks": "", "showline": False}


def hover_text(found: Evaluation, place: str) -> str:
    """Both scores with their intervals and n."""
    return (
        f"<b>{place}</b><br>trait score {found.trait_score}, n = {found.trait_score.n}<br>coherence {found.coherence}, "
        f"n = {found.coherence.n}<br>{len(found.scored)} answers, {found.missing} without a trait score"
    )


def dose_text(dose: float | None) -> str:
    """The relative dose in brackets, nothing where it is unknown."""
    return "" if dose is None else f" (dose {dose:.2f} of the residual norm)"


def number(value: float | None, decimals: int = 2) -> str:
    """The number, "-" where it is missing."""
    # Adding 0.0 turns a rounded -0.0 into 0.
    return "-" if value is None else f"{round(value, decimals) + 0.0:.{decimals}f}"


def known(numbers: Iterable[float]) -> list[float | None]:
    """Numbers with None for NaN."""
    return [None if isnan(each) else each for each in numbers]


def judge_note(judge: str) -> str:
    """Who gave the scores; settings, which stand after a comma, are left out."""
    return f"judge: {safe(judge.partition(',')[0], 90)}"


def small(text: str) -> str:
    """Text of a second line."""
    return f'<span style="font-size:14px">{text}</span>'


def safe(text: str, longest: int = 48) -> str:
    """Text that plotly shows letter for letter, cut where it would run out of the picture.

    Quotes stay, because plotly knows no entities for them; a dollar sign would begin a formula.
    """
    line = " ".join(text.split())
    line = line if len(line) <= longest else line[: longest - 1] + "…"
    return html.escape(line, quote=False).replace("$", "&#36;")


class Band(NamedTuple):
    """The outline of intervals, as coordinates."""

    x: list[float | None]
    y: list[float | None]


def band(x: Sequence[int] | Sequence[float], estimates: Sequence[Estimate]) -> Band:
    """The outline of the intervals, closed and begun anew after None wherever one is missing."""
    outline = Band([], [])
    for whole, run in groupby(zip(x, estimates, strict=True), key=lambda point: None not in point[1]):
        if whole:
            places, ends = zip(*run, strict=True)
            outline.x.extend([*places, *places[::-1], places[0], None])
            outline.y.extend([*(each.high for each in ends), *(each.low for each in ends[::-1]), ends[0].high, None])
    return outline


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
