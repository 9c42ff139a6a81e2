"""Pictures by layer: sweeps, their frontier, dose-responses, layer statistics, and the cosines of several traits.

The heat map and the frontier of a sweep mark the best cell and the model without steering (arXiv:2507.21509, section
B.4, with coherence). Curves have a panel above another over the same axis; a band breaks where an interval is missing.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from persona_lens.evaluation.dose_response import DoseResponse
from persona_lens.evaluation.evaluate import Evaluation
from persona_lens.evaluation.layer_selection import LayerChoice, LayerSweep
from persona_lens.plots.style import (
    BLUE,
    DASHED,
    DIVERGING,
    GREY,
    INK,
    PALE_BLUE,
    SEQUENTIAL,
    VERMILION,
    add_grid,
    band,
    dose_text,
    graph_objects,
    hover_text,
    index_axis,
    judge_note,
    known,
    number,
    safe,
    small,
    styled_figure,
)
from persona_lens.statistics import Estimate
from persona_lens.vectors.direction_statistics import LayerStatistics
from persona_lens.vectors.persona_vectors import PersonaVectors

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects


def plot_cosine_matrix(cosines: "pandas.DataFrame", title: str = "") -> "plotly.graph_objects.Figure":
    """Cosines between traits, as `cosine_matrix` gives them: red is 1, white 0, blue -1; NaN is grey and empty.

    Raises ValueError where there is no cosine, or a number outside -1 to 1.
    """
    values = [known(row) for row in cosines.to_numpy(dtype=float).tolist()]
    numbers = [each for row in values for each in row if each is not None]
    if not numbers:
        raise ValueError("The table has no cosine to draw: pass what `cosine_matrix` gives.")
    if max(map(abs, numbers)) > 1 + 1e-6:
        raise ValueError("The table has numbers outside -1 to 1, so no cosines: pass what `cosine_matrix` gives.")
    rows, columns = ([safe(str(each), 24) for each in names] for names in (cosines.index, cosines.columns))
    hover = [
        [f"{row} and {column}<br>cosine {number(each)}" for column, each in zip(columns, found, strict=True)]
        for row, found in zip(rows, values, strict=True)
    ]
    figure = styled_figure(safe(title, 60) or "Cosines between the directions of traits")
    add_grid(figure, values, hover, name="cosine", decimals=2, scale=DIVERGING, ends=(-1.0, 1.0))
    grown = 36 * max(0, max(len(rows), len(columns)) - 8)
    figure.update_layout(width=700 + grown, height=500 + grown)
    figure.update_xaxes(constrain="domain", **index_axis(columns))
    figure.update_yaxes(scaleanchor="x", constrain="domain", autorange="reversed", **index_axis(rows))
    return figure


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
