"""Pictures of results: a layer sweep and its frontier, a dose-response, the statistics of layers, cosines of traits.

Every function takes a result and returns a plotly figure; a number that is missing leaves a gap, never a zero.
Knows nothing about models or files, and imports plotly, an extra, on first use.
"""

import html
from collections.abc import Iterable, Sequence
from itertools import groupby
from math import isnan
from typing import TYPE_CHECKING, Any, Literal

from persona_lens.evaluation import Evaluation
from persona_lens.layer_selection import DoseResponse, LayerChoice, LayerSweep
from persona_lens.statistics import Estimate
from persona_lens.vectors import PersonaVectors

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

INSTALL_COMMAND = 'pip install "persona-lens[plots]"'

# Okabe and Ito's blue and vermilion, cividis, and red against blue stay apart for every kind of colour vision.
BLUE, VERMILION, GREY, INK, BLANK = "#0072B2", "#D55E00", "#9A9A9A", "#222222", "#E4E4E4"
SEQUENTIAL, DIVERGING = "Cividis", "RdBu_r"
DASHED = {"color": INK, "width": 1.5, "dash": "dash"}
DOTTED = {"color": VERMILION, "width": 2, "dash": "dot"}


def plot_layer_sweep(
    sweep: LayerSweep, value: Literal["trait_score", "coherence"] = "trait_score", *, min_coherence: float = 75.0
) -> "plotly.graph_objects.Figure":
    """Heat map of a sweep: layers (from 0) across, coefficients upward, the mean score from 0 to 100 in each cell.

    A solid frame marks `sweep.best(min_coherence)`, dotted ones the cells that the questions do not tell apart from it;
    a cell without a score is grey and empty. Hovering shows both scores with their 95 % intervals over questions, the
    number of answers and the relative dose. The subtitle has the score without steering.
    Raises ValueError where no cell has the score.
    """
    go = _graph_objects()
    scores = {cell: getattr(found, value).value for cell, found in sweep.evaluations.items()}
    blank = sum(score is None for score in scores.values())
    if blank == len(scores):
        raise ValueError(f"{sweep.trait}: no cell of the sweep has a {_words(value)} to draw.")
    grid = [[(layer, amount) for layer in sweep.layers] for amount in sweep.coefficients]
    heat = go.Heatmap(
        z=[[scores[cell] for cell in row] for row in grid],
        hovertext=[[_hover_cell(sweep, cell) for cell in row] for row in grid],
        hoverinfo="text",
        texttemplate="%{z:.0f}",
        colorscale=SEQUENTIAL,
        zmin=0,
        zmax=100,
        xgap=2,
        ygap=2,
        colorbar={"title": {"text": _words(value)}, "tickvals": [0, 25, 50, 75, 100]},
    )
    best = _best(sweep, min_coherence)
    notes = [f"unsteered: {getattr(sweep.baseline, value)}", _best_in_words(best, min_coherence)]
    notes += [f"grey: no {_words(value)}"] * bool(blank)
    figure = _styled(go.Figure(heat), f"{_safe(sweep.trait)}: {_words(value)} by layer and coefficient", notes)
    _frame_cells(figure, sweep, best)
    figure.update_layout(plot_bgcolor=BLANK)
    figure.update_xaxes(title_text="layer (counted from 0)", **_index_axis(sweep.layers))
    figure.update_yaxes(title_text="coefficient", **_index_axis(sweep.coefficients))
    return figure


def plot_frontier(sweep: LayerSweep, min_coherence: float = 75.0) -> "plotly.graph_objects.Figure":
    """Trait score (upward) against coherence (across), both 0 to 100: a point a cell, coloured by layer.

    Symbols are coefficients, the star is the model without steering, the ring `sweep.best(min_coherence)`, the dashed
    line `min_coherence`. The grey stairs are the Pareto frontier of the cells: none is better in one score and no worse
    in the other. Hovering shows 95 % intervals over questions. Cells without both scores are left out and counted.
    Raises ValueError where no cell has both.
    """
    go = _graph_objects()
    points = {cell: point for cell, found in sweep.evaluations.items() if (point := _point(found)) is not None}
    if not points:
        raise ValueError(f"{sweep.trait}: no cell of the sweep has both a trait score and a coherence to draw.")
    best, left_out = _best(sweep, min_coherence), len(sweep.evaluations) - len(points)
    notes = [_best_in_words(best, min_coherence)]
    notes += [f"{left_out} of {len(sweep.evaluations)} cells lack a score and are left out"] * bool(left_out)
    figure = _styled(go.Figure(), f"{_safe(sweep.trait)}: trait score against coherence", notes)
    figure.add_vline(x=min_coherence, line=DASHED, annotation_text=f"coherence {min_coherence:g}")
    stairs = {"color": GREY, "width": 2, "shape": "vh"}
    x, y = zip(*_pareto(points.values()), strict=True)
    figure.add_scatter(x=x, y=y, mode="lines", line=stairs, name="Pareto frontier", hoverinfo="skip")
    for symbol, amount in enumerate(sweep.coefficients):
        cells = [cell for cell in points if cell[1] == amount]
        marker = {"color": [layer for layer, _ in cells], "coloraxis": "coloraxis", "symbol": symbol, "size": 11}
        _add_points(figure, sweep, cells, f"coefficient {amount:g}", marker)
    _mark_references(figure, sweep, best)
    figure.update_layout(coloraxis={"colorscale": SEQUENTIAL, "colorbar": {"title": {"text": "layer"}}})
    figure.update_xaxes(title_text="coherence (0 to 100)")
    figure.update_yaxes(title_text="trait score (0 to 100)")
    return figure


def plot_dose_response(response: DoseResponse) -> "plotly.graph_objects.Figure":
    """Mean trait score, and below it mean coherence, both 0 to 100, against the coefficient.

    Bands are 95 % intervals over questions; thin grey lines are the random directions of equal norm. Under each
    coefficient stands the relative dose, where it is known. The coherence panel is left out where no answer has one.
    Raises ValueError where no coefficient has a trait score.
    """
    if all(found.trait_score.value is None for found in response.evaluations):
        raise ValueError(f"{response.trait}: no coefficient has a trait score to draw.")
    coherent = any(found.coherence.value is not None for found in response.evaluations)
    panels: list[Literal["trait_score", "coherence"]] = ["trait_score", "coherence"][: 1 + coherent]
    figure = _panels(len(panels), f"{_safe(response.trait)}: dose-response at layer {response.layer}", _slopes(response))
    x = list(response.coefficients)
    named = list(zip(response.coefficients, response.doses, strict=True))
    for row, value in enumerate(panels, start=1):
        for index, cells in enumerate(response.random):
            figure.add_scatter(
                x=x,
                y=[getattr(found, value).value for found in cells],
                mode="lines",
                line={"color": GREY, "width": 1},
                opacity=0.6,
                name="random directions of equal norm",
                legendgroup="random",
                showlegend=row == 1 and index == 0,
                hoverinfo="skip",
                row=row,
                col=1,
            )
        estimates = [getattr(found, value) for found in response.evaluations]
        hover = [
            _hover(f"coefficient {amount:g}", dose, found)
            for (amount, dose), found in zip(named, response.evaluations, strict=True)
        ]
        _add_curve(figure, row, x, estimates, f"{_safe(response.trait)} direction", hover)
        figure.update_yaxes(title_text=_words(value), rangemode="tozero", row=row, col=1)
    words = [f"{amount:g}" + ("" if dose is None else f"<br>{_small(f'{dose:.2f}')}") for amount, dose in named]
    known = any(dose is not None for dose in response.doses)
    title = "coefficient" + _small("<br>below it: dose, the shift over the residual norm") * known
    figure.update_xaxes(tickvals=x, ticktext=words, tickangle=0)
    figure.update_xaxes(title_text=title, row=len(panels), col=1)
    return figure


def plot_layer_statistics(vectors: PersonaVectors) -> "plotly.graph_objects.Figure":
    """Held-out AUC, and below it the split-half cosine, of the direction at every layer (counted from 0).

    Bands are 95 % intervals over questions. The dotted line is the placebo's 95th percentile, which an AUC must exceed;
    the dashed ones are the embedding row, what the words alone give.
    Raises ValueError where the vectors have no statistics.
    """
    table = vectors.table()
    if vectors.statistics is None or table[["held_out_auc", "split_half"]].isna().all(axis=None):
        raise ValueError(f"{vectors.trait}: these vectors have no statistics to draw: only an extraction measures them.")
    figure = _panels(2, f"{_safe(vectors.trait)}: how good the direction of each layer is", [])
    layers = list(range(vectors.n_layers))
    for row, (name, axis) in enumerate([("held_out_auc", "held-out AUC"), ("split_half", "split-half cosine")], start=1):
        columns = table.loc[layers, [name, f"{name}_low", f"{name}_high"]].to_numpy(dtype=float).tolist()
        estimates = [
            Estimate(*(None if isnan(each) else each for each in values), n=vectors.statistics.n_rows)
            for values in columns
        ]
        hover = [f"layer {layer}<br>{axis} {_decimals(each)}" for layer, each in zip(layers, estimates, strict=True)]
        _add_curve(figure, row, layers, estimates, "direction", hover)
        if row == 1:
            placebo = table.loc[layers, "placebo_auc_95"].to_numpy(dtype=float).tolist()
            _add_line(figure, row, layers, placebo, "95th percentile of placebos", DOTTED)
        if vectors.statistics.embedding is not None:
            level = [vectors.statistics.embedding[name]] * len(layers)
            _add_line(figure, row, layers, level, "embedding row", DASHED)
        figure.update_yaxes(title_text=axis, row=row, col=1)
    figure.update_xaxes(title_text="layer (counted from 0)", row=2, col=1)
    return figure


def plot_cosine_matrix(cosines: "pandas.DataFrame", title: str = "") -> "plotly.graph_objects.Figure":
    """Cosines between traits, as `cosine_matrix` gives them: red is 1, white 0, blue -1; NaN is grey and empty.

    Raises ValueError where there is no cosine, or one outside -1 to 1.
    """
    go = _graph_objects()
    values = cosines.to_numpy(dtype=float)
    if not values.size or all(isnan(each) for each in values.flat):
        raise ValueError("The table has no cosine to draw.")
    if any(abs(each) > 1 + 1e-6 for each in values.flat):
        raise ValueError("A cosine lies between -1 and 1, and the table holds other numbers: pass `cosine_matrix(...)`.")
    rows, columns = ([_safe(str(each)) for each in names] for names in (cosines.index, cosines.columns))
    grid = [[None if isnan(each) else each for each in row] for row in values.tolist()]
    heat = go.Heatmap(
        z=grid,
        text=[["" if each is None else _signed(each) for each in row] for row in grid],
        texttemplate="%{text}",
        hovertext=[[f"{row} and {column}" for column in columns] for row in rows],
        hovertemplate="%{hovertext}<br>cosine %{text}<extra></extra>",
        colorscale=DIVERGING,
        zmin=-1,
        zmax=1,
        xgap=2,
        ygap=2,
        colorbar={"title": {"text": "cosine"}, "tickvals": [-1, -0.5, 0, 0.5, 1]},
    )
    figure = _styled(go.Figure(heat), _safe(title) or "Cosines between the directions of traits", [])
    figure.update_layout(plot_bgcolor=BLANK)
    figure.update_xaxes(constrain="domain", **_index_axis(columns))
    figure.update_yaxes(scaleanchor="x", constrain="domain", autorange="reversed", **_index_axis(rows))
    return figure


def _graph_objects() -> Any:
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise ImportError(f"Plots are made with plotly, which is not installed: {INSTALL_COMMAND}") from error
    return plotly.graph_objects


def _styled(figure: Any, title: str, notes: Sequence[str]) -> "plotly.graph_objects.Figure":
    """The one look: a title that leaves room for a line of notes, the legend above the plot, no box around it."""
    text = f"<b>{title}</b>" + "".join(f"<br>{_small(note)}" for note in notes)
    figure.update_layout(
        template="simple_white",
        width=900,
        height=500,
        font={"family": "Open Sans, Helvetica, Arial, sans-serif", "size": 14, "color": INK},
        title={"text": text, "font": {"size": 18}, "x": 0.02, "y": 0.96, "yanchor": "top"},
        margin={"l": 75, "r": 30, "t": 85 + 18 * len(notes), "b": 70},
        legend={"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom", "font": {"size": 12}},
    )
    return figure


def _panels(rows: int, title: str, notes: Sequence[str]) -> "plotly.graph_objects.Figure":
    _graph_objects()
    from plotly.subplots import make_subplots

    heights = [0.62, 0.38][:rows] if rows > 1 else None
    return _styled(make_subplots(rows, 1, shared_xaxes=True, vertical_spacing=0.06, row_heights=heights), title, notes)


def _add_curve(figure: Any, row: int, x: list, estimates: Sequence[Estimate], name: str, hover: Sequence[str]) -> None:
    """A line through the values with the band of their intervals."""
    band_x, band_y = _band(x, estimates)
    shared = {"row": row, "col": 1, "showlegend": row == 1}
    # The outline makes an interval without neighbours, which has no area, visible.
    outline = {"color": "rgba(0,114,178,0.35)", "width": 1}
    figure.add_scatter(
        x=band_x, y=band_y, fill="toself", fillcolor="rgba(0,114,178,0.2)", mode="lines", line=outline,
        name="95 % interval", legendgroup="interval", hoverinfo="skip", **shared,
    )  # fmt: skip
    figure.add_scatter(
        x=x, y=[each.value for each in estimates], mode="lines+markers", line={"color": BLUE, "width": 3},
        marker={"size": 7}, name=name, legendgroup="own", hovertext=hover, hoverinfo="text", **shared,
    )  # fmt: skip
