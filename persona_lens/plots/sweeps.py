"""Pictures of a layer sweep: its heat map, and its frontier of trait score against coherence.

Both mark the best cell and the model without steering (arXiv:2507.21509, section B.4, with coherence).
Knows nothing about how the best is chosen: `LayerSweep.best` says.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from persona_lens.evaluation import Evaluation
from persona_lens.layer_selection import LayerChoice, LayerSweep
from persona_lens.plots.style import (
    DASHED,
    GREY,
    INK,
    SEQUENTIAL,
    VERMILION,
    add_grid,
    dose_text,
    hover_text,
    index_axis,
    judge_note,
    safe,
    styled_figure,
)

if TYPE_CHECKING:
    import plotly.graph_objects


def plot_layer_sweep(
    sweep: LayerSweep, value: Literal["trait_score", "coherence"] = "trait_score", *, min_coherence: float = 75.0
) -> "plotly.graph_objects.Figure":
    """Heat map of a sweep: layers (from 0) across, coefficients upward, the mean score from 0 to 100 in each cell.

    A solid frame marks `sweep.best(min_coherence)`, dotted ones the cells that the questions do not tell apart from it;
    a cell without a score is grey and empty. Hovering shows both scores with their 95 % intervals over questions, the
    number of answers and the relative dose. The lines under the title have the scores without steering.
    Raises ValueError where no cell has the score.
    """
    scores = {cell: getattr(found, value).value for cell, found in sweep.evaluations.items()}
    name, blank = value.replace("_", " "), sum(score is None for score in scores.values())
    if blank == len(scores):
        raise ValueError(f"{sweep.trait}: no cell of the sweep has a {name} to draw.")
    best = _best(sweep, min_coherence)
    notes = _notes(sweep, best, min_coherence)
    notes[-1] += f"; grey cells have no {name}" * bool(blank)
    figure = styled_figure(f"{safe(sweep.trait)}: {name} by layer and coefficient", notes)
    grid = [[(layer, amount) for layer in sweep.layers] for amount in sweep.coefficients]
    add_grid(
        figure,
        [[scores[cell] for cell in row] for row in grid],
        [[_hover(sweep, cell) for cell in row] for row in grid],
        name=name,
        decimals=0,
        scale=SEQUENTIAL,
        ends=(0.0, 100.0),
    )
    if best is not None:
        _frame_cells(figure, sweep, "not told apart from the best", best.ties, {"width": 2, "dash": "dot"})
        _frame_cells(figure, sweep, "best", [(best.layer, best.coefficient)], {"width": 4})
    figure.update_xaxes(title_text="layer (counted from 0)", **index_axis([str(each) for each in sweep.layers]))
    figure.update_yaxes(title_text="coefficient", **index_axis([f"{each:g}" for each in sweep.coefficients]))
    return figure


def plot_frontier(sweep: LayerSweep, min_coherence: float = 75.0) -> "plotly.graph_objects.Figure":
    """Trait score (upward) against coherence (across), both 0 to 100: a point a cell, coloured by layer.

    Symbols are coefficients, the star is the model without steering, the ring `sweep.best(min_coherence)`, the dashed
    line `min_coherence`. The grey stairs are the Pareto frontier of the cells: none is better in one score and no worse
    in the other. Hovering shows 95 % intervals over questions. Cells without both scores are left out and counted.
    Raises ValueError where no cell has both.
    """
    points = {cell: point for cell, found in sweep.evaluations.items() if (point := _point(found)) is not None}
    if not points:
        raise ValueError(f"{sweep.trait}: no cell of the sweep has both a trait score and a coherence to draw.")
    best, left_out = _best(sweep, min_coherence), len(sweep.evaluations) - len(points)
    notes = _notes(sweep, best, min_coherence)
    notes[-1] += f"; {left_out} of {len(sweep.evaluations)} cells lack a score" * bool(left_out)
    title = f"{safe(sweep.trait)}: trait score against coherence"
    # About five names fit beside each other.
    figure = styled_figure(title, notes, legend_rows=1 + (len(sweep.coefficients) + 1) // 5)
    figure.add_vline(x=min_coherence, line=DASHED, opacity=1)
    stairs = {"color": GREY, "width": 2, "shape": "vh"}
    _add_points(figure, "Pareto frontier", _pareto(points.values()), mode="lines", line=stairs, hoverinfo="skip")
    for symbol, amount in enumerate(sweep.coefficients):
        cells = [cell for cell in points if cell[1] == amount]
        marker = {"color": [layer for layer, _ in cells], "coloraxis": "coloraxis", "symbol": symbol, "size": 11}
        hover = [_hover(sweep, cell) for cell in cells]
        name = f"coefficient {amount:g}"
        found: dict[str, Any] = {"hovertext": hover, "marker": marker, "legendgroup": name, "showlegend": False}
        _add_points(figure, name, [points[cell] for cell in cells], **found)
        # The legend has no colour of its own for points that are coloured by number.
        figure.add_scatter(
            x=[None],
            y=[None],
            name=name,
            legendgroup=name,
            mode="markers",
            marker={"color": INK, "symbol": symbol, "size": 11},
        )
    unsteered = _point(sweep.baseline)
    if unsteered is not None:
        star = {"symbol": "star", "size": 17, "color": INK}
        _add_points(figure, "unsteered", [unsteered], hovertext=hover_text(sweep.baseline, "unsteered"), marker=star)
    if best is not None:
        ring = {"symbol": "circle-open", "size": 22, "color": VERMILION, "line": {"width": 3}}
        _add_points(figure, "best", [points[best.layer, best.coefficient]], marker=ring, hoverinfo="skip")
    layers = {"title": {"text": "layer"}, "tickvals": sweep.layers[:: 1 + (len(sweep.layers) - 1) // 8]}
    figure.update_layout(coloraxis={"colorscale": SEQUENTIAL, "colorbar": layers})
    figure.update_xaxes(title_text="coherence (0 to 100)")
    figure.update_yaxes(title_text="trait score (0 to 100)")
    return figure


def _add_points(figure: Any, name: str, points: list[tuple[float, float]], **look: Any) -> None:
    look = {"mode": "markers", "hoverinfo": "text", **look}
    figure.add_scatter(x=[x for x, _ in points], y=[y for _, y in points], name=name, **look)


def _frame_cells(
    figure: Any, sweep: LayerSweep, name: str, cells: Iterable[tuple[int, float]], line: dict[str, Any]
) -> None:
    for index, (layer, amount) in enumerate(cells):
        x, y = sweep.layers.index(layer), sweep.coefficients.index(amount)
        figure.add_shape(
            type="rect",
            x0=x - 0.47,
            x1=x + 0.47,
            y0=y - 0.46,
            y1=y + 0.46,
            line={"color": VERMILION, **line},
            # The template fills shapes and makes them pale.
            fillcolor="rgba(0, 0, 0, 0)",
            opacity=1,
            name=name,
            legendgroup=name,
            showlegend=index == 0,
        )


def _pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other exceeds in one number without falling short in the other, by the first, ascending."""
    frontier: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        if not frontier or y > frontier[-1][1]:
            frontier.append((x, y))
    return frontier[::-1]


def _point(found: Evaluation) -> tuple[float, float] | None:
    coherence, score = found.coherence.value, found.trait_score.value
    return None if coherence is None or score is None else (coherence, score)


def _best(sweep: LayerSweep, min_coherence: float) -> LayerChoice | None:
    try:
        return sweep.best(min_coherence)
    except ValueError:
        return None


def _notes(sweep: LayerSweep, best: LayerChoice | None, min_coherence: float) -> list[str]:
    if best is None:
        found = f"no cell has a trait score and a coherence of {min_coherence:g} or more"
    else:
        found = (
            f"best with coherence ≥ {min_coherence:g}: layer {best.layer} at {best.coefficient:g}, trait score "
            f"{best.trait_score}, coherence {best.coherence}"
        )
    unsteered = f"unsteered: trait score {sweep.baseline.trait_score}, coherence {sweep.baseline.coherence}"
    return [found, judge_note(sweep.judge), unsteered]


def _hover(sweep: LayerSweep, cell: tuple[int, float]) -> str:
    layer, amount = cell
    return hover_text(sweep.evaluations[cell], f"layer {layer}, coefficient {amount:g}{dose_text(sweep.doses[cell])}")
