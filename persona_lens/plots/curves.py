"""Pictures of curves with their intervals: a dose-response, and how good the direction of each layer is.

One panel above another over the same axis; a band breaks wherever an interval is missing.
Knows nothing about how the numbers were measured.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from persona_lens.layer_selection import DoseResponse
from persona_lens.plots.style import (
    BLUE,
    DASHED,
    GREY,
    PALE_BLUE,
    VERMILION,
    band,
    dose_text,
    graph_objects,
    hover_text,
    judge_note,
    known,
    number,
    safe,
    small,
    styled_figure,
)
from persona_lens.statistics import Estimate
from persona_lens.vectors import LayerStatistics, PersonaVectors

if TYPE_CHECKING:
    import plotly.graph_objects

MIN_COHERENCE = 50.0


def plot_dose_response(response: DoseResponse) -> "plotly.graph_objects.Figure":
    """Mean trait score, and below it mean coherence, both 0 to 100, against the coefficient.

    Bands are 95 % intervals over questions; thin grey lines are the random directions of equal norm. Under each
    coefficient stands the relative dose, where it is known. Hollow points have a mean coherence below 50 and do not
    count in the slope. The coherence panel is left out where no answer has one.
    Raises ValueError where no coefficient has a trait score.
    """
    cells, amounts = response.evaluations, list(response.coefficients)
    if all(found.trait_score.value is None for found in cells):
        raise ValueError(f"{response.trait}: no coefficient has a trait score to draw.")
    coherent = any(found.coherence.value is not None for found in cells)
    values = ["trait_score", "coherence"] if coherent else ["trait_score"]
    title = f"{safe(response.trait)}: dose-response at layer {response.layer}"
    notes = [_slope_in_words(response), judge_note(response.judge)]
    figure = _panels([value.replace("_", " ") for value in values], title, notes)
    hollow = [each is not None and each < MIN_COHERENCE for each in (found.coherence.value for found in cells)]
    hover = [
        hover_text(found, f"coefficient {amount:g}{dose_text(dose)}")
        for amount, dose, found in zip(amounts, response.doses, cells, strict=True)
    ]
    for row, value in enumerate(values, start=1):
        for others in response.random:
            scores = [getattr(found, value).value for found in others]
            _add_line(figure, row, "random directions of equal norm", amounts, scores, line={"color": GREY, "width": 1})
        estimates = [getattr(found, value) for found in cells]
        _add_curve(figure, row, amounts, estimates, hover, ["white" if each else BLUE for each in hollow])
    doses = ["" if dose is None else f"<br>{number(dose)}" for dose in response.doses]
    ticks = [f"{amount:g}{dose}" for amount, dose in zip(amounts, doses, strict=True)]
    below = "<br>" + small("second line: dose, the shift over the residual norm") if any(doses) else ""
    figure.update_xaxes(tickvals=amounts, ticktext=ticks, tickangle=0)
    figure.update_xaxes(title_text=f"coefficient{below}", row=len(values), col=1)
    return figure


def plot_layer_statistics(vectors: PersonaVectors) -> "plotly.graph_objects.Figure":
    """Held-out AUC, and below it the split-half cosine, of the direction at every layer (counted from 0).

    Bands are 95 % intervals over questions. The dotted line is the placebo's 95th percentile, which an AUC must exceed;
    the dashed ones are the embedding row, what the words alone give.
    Raises ValueError where the vectors have no statistics.
    """
    found, layers = vectors.statistics, list(range(vectors.n_layers))
    if found is None or bool((found.held_out_auc.isnan() & found.split_half.isnan()).all()):
        raise ValueError(f"{vectors.trait}: these vectors have no statistics to draw: take those of an extraction.")
    axes = {"held_out_auc": "held-out AUC", "split_half": "split-half cosine"}
    title = f"{safe(vectors.trait)}: how good the direction of each layer is"
    figure = _panels(list(axes.values()), title, [f"{found.n_rows} responses to {found.n_questions} questions"])
    for row, (name, axis) in enumerate(axes.items(), start=1):
        estimates = _estimates(found, name)
        hover = [
            f"<b>layer {layer}</b><br>{axis} {number(each.value)} [{number(each.low)}, {number(each.high)}]"
            for layer, each in zip(layers, estimates, strict=True)
        ]
        _add_curve(figure, row, layers, estimates, hover)
        if name == "held_out_auc":
            dotted = {"color": VERMILION, "width": 2, "dash": "dot"}
            placebo = known(found.placebo_auc_95.tolist())
            _add_line(figure, row, "placebo, 95th percentile", layers, placebo, line=dotted)
        if found.embedding is not None:
            level = known([found.embedding[name]] * len(layers))
            _add_line(figure, row, "embedding row", layers, level, line=DASHED)
    figure.update_xaxes(title_text="layer (counted from 0)", row=2, col=1)
    return figure


def _estimates(found: LayerStatistics, name: str) -> list[Estimate]:
    columns = [known(found.by_layer[each].tolist()) for each in (name, f"{name}_low", f"{name}_high")]
    return [Estimate(*each, n=found.n_rows) for each in zip(*columns, strict=True)]


def _slope_in_words(response: DoseResponse) -> str:
    slope = response.slope(MIN_COHERENCE)
    if slope.value is None:
        return f"no slope: fewer than two doses have a trait score and a coherence of {MIN_COHERENCE:g} or more"
    others = [each.value for each in response.random_slopes(MIN_COHERENCE) if each.value is not None]
    steeper = f", above {sum(slope.value > each for each in others)} of {len(others)} random ones" * bool(others)
    points = f"slope over filled points (coherence ≥ {MIN_COHERENCE:g})"
    return f"{points}: {slope} per 1.0 of the coefficient{steeper}"


def _panels(names: Sequence[str], title: str, notes: Sequence[str]) -> Any:
    """One panel above the other over the same x axis, the first one higher."""
    graph_objects()
    from plotly.subplots import make_subplots

    heights = [0.6, 0.4] if len(names) > 1 else [1.0]
    figure = make_subplots(len(names), 1, shared_xaxes=True, vertical_spacing=0.07, row_heights=heights)
    for row, name in enumerate(names, start=1):
        figure.update_yaxes(title_text=name, row=row, col=1)
    return styled_figure(title, notes, figure)


def _add_line(figure: Any, row: int, name: str, x: Sequence, y: Sequence, **look: Any) -> None:
    """A line of a panel; the legend names it once for all panels."""
    first = name not in {trace.name for trace in figure.data}
    look = {"mode": "lines", "hoverinfo": "skip", **look}
    figure.add_scatter(x=x, y=y, name=name, legendgroup=name, showlegend=first, row=row, col=1, **look)


def _add_curve(
    figure: Any, row: int, x: Sequence, estimates: Sequence[Estimate], hover: Sequence[str], fill: Any = BLUE
) -> None:
    """A line through the values, whose points have the colours `fill`, over the band of their intervals."""
    # The outline shows an interval without neighbours, which has no area.
    outline = {"color": "rgba(0, 114, 178, 0.5)", "width": 1}
    _add_line(figure, row, "95 % interval", *band(x, estimates), fill="toself", fillcolor=PALE_BLUE, line=outline)
    y = [each.value for each in estimates]
    _add_line(figure, row, "direction", x, y, line={"color": BLUE, "width": 3})
    # Points of their own: the legend would show a line with the fill of its first one.
    points = {"size": 7, "color": fill, "line": {"color": BLUE, "width": 2}}
    _add_line(figure, row, "direction", x, y, mode="markers", marker=points, hovertext=hover, hoverinfo="text")
