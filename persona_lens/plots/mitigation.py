"""Pictures of mitigation: what each way of holding a trait down during or after finetuning gives, and its price.

In the shape of arXiv:2507.21509, figure 7 (sections 5 and J).
"""

from collections.abc import Mapping, Sequence
from math import ceil, floor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from persona_lens.plots.monitoring import CHATS
from persona_lens.plots.style import (
    DASHED,
    GREY,
    INK,
    SCORES,
    WHISKERS,
    add_trace,
    band,
    in_words,
    safe,
    size_panels,
    styled_figure,
    subplots,
    whiskers,
)
from persona_lens.statistics import SAME, Estimate

if TYPE_CHECKING:
    import plotly.graph_objects

NOTHING = Estimate(None, None, None, 0)
FAINT = {"color": GREY, "width": 1, "dash": "dot"}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "x", "cross", "star", "pentagon", "hexagon")
# In the legend; what has no rank has 1000.
LAST = 1001


class MitigationPoint(NamedTuple):
    """What one way of holding a trait down gave.

    Attributes:
        method: Its name.
        coefficient: Of steering; None for a method without one.
        trait_score: Mean trait score, 0 to 100.
        coherence: Mean coherence, 0 to 100; None where it was not measured.
        capability: Any measure that grows with capability; None where it was not measured.
    """

    method: str
    coefficient: float | None
    trait_score: Estimate
    coherence: Estimate | None = None
    capability: Estimate | None = None


def plot_mitigation(
    points: Mapping[str, Sequence[MitigationPoint]],
    *,
    baseline: str = "none",
    capability: str = "capability",
    title: str = "trait score after finetuning, and its price, by method",
) -> "plotly.graph_objects.Figure":
    """Trait score, and below it coherence and capability, against the steering coefficient: a column a trait.

    A line a method; methods without a coefficient are marks to the right of the dotted line, and `baseline` is a dashed
    line over its interval. `capability` names that axis, with its unit. A panel is left out where nothing of it was
    measured, and a missing number leaves a gap. Source: arXiv:2507.21509, figure 7 (sections 5 and J).
    Raises ValueError where no point has a trait score, or a trait has two of one method and coefficient or `baseline`.
    """
    _check_points(points, ("trait_score",), baseline)
    every = [point for of in points.values() for point in of]
    looks = _looks(every, baseline)
    axes = {"trait_score": "mean trait score", "coherence": "mean coherence", "capability": safe(capability, 48)}
    measures = [name for name in axes if any(_estimate(point, name).value is not None for point in every)]
    names = [f"<b>{safe(trait, 30)}</b>" for trait in points]
    spacing = {"vertical_spacing": 0.05, "horizontal_spacing": 0.04, "row_heights": [3, 2, 2][: len(measures)]}
    figure = subplots(len(measures), len(points), column_titles=names, shared_xaxes=True, shared_yaxes=True, **spacing)
    width = 110 + 370 * max(2, len(points))
    styled_figure(safe(title, 90), [WHISKERS], figure, legend_rows=1 + ceil(len(looks) / (width // 220)))
    size_panels(figure, width=width, panels=80 + 190 * len(measures), above=28)
    for column, of in enumerate(points.values(), start=1):
        places = _places(of, [method for method in looks if method != baseline])
        for row, measure in enumerate(measures, start=1):
            cell = {"row": row, "col": column}
            # First, so that it lies under the others' points.
            for point in _ordered(of, baseline):
                _add_level(figure, point, measure, places.ends, cell)
            for method, look in looks.items():
                if method != baseline:
                    _add_method(figure, _ordered(of, method), measure, places, look, cell)
            if places.marks:
                figure.add_vline(x=places.border, line=FAINT, opacity=1, **cell)
            figure.update_yaxes(**_reach(every) if measure == "capability" else SCORES, **cell)
            figure.update_xaxes(tickvals=places.ticks, range=places.ends, **cell)
    for row, measure in enumerate(measures, start=1):
        # The panels are lower than an axis' name with its unit is long.
        text = axes[measure].replace(" (", "<br>(", 1)
        figure.update_yaxes(title={"text": text, "font": {"size": 14}}, row=row, col=1)
    figure.update_xaxes(title_text="steering coefficient", row=len(measures))
    return figure


def plot_trade_off(
    points: Sequence[MitigationPoint],
    *,
    trait: str,
    across: Literal["capability", "coherence"] = "capability",
    axis: str = "",
    baseline: str = "none",
) -> "plotly.graph_objects.Figure":
    """Trait score (upward, 0 to 100) against capability or coherence (across): a line a method, by coefficient.

    Numbers beside points are coefficients; the star and the dotted lines are `baseline`. Of two methods at equal
    capability the lower one holds the trait better. `axis` names the axis across, with its unit. Whiskers are intervals
    of both; a point without both numbers leaves a gap in its line and is counted.
    Raises ValueError where no point has both, or two are of one method and coefficient or of `baseline`.
    """
    _check_points({trait: points}, ("trait_score", across), baseline)
    looks = _looks(points, baseline)
    lacking = sum(None in (point.trait_score.value, _estimate(point, across).value) for point in points)
    notes = [f"numbers beside points are coefficients; {WHISKERS}"]
    notes += [f"{lacking} of {len(points)} points lack a number and are left out"] * bool(lacking)
    heading = f"{safe(trait, 34)}: mean trait score against {safe(axis or across, 48)}"
    figure = styled_figure(heading, notes, legend_rows=ceil(len(looks) / 4))
    for method, look in looks.items():
        own, colour = _ordered(points, method), look["marker"]["color"]
        x, y = ([_estimate(point, measure) for point in own] for measure in (across, "trait_score"))
        if method == baseline:
            look["marker"]["size"] = 17
            for level, add in ((x[0].value, figure.add_vline), (y[0].value, figure.add_hline)):
                if level is not None:
                    add(level, line=FAINT, opacity=1, layer="below")
        add_trace(
            figure,
            method,
            x=[each.value for each in x],
            y=[each.value for each in y],
            error_x=whiskers(x, colour),
            error_y=whiskers(y, colour),
            text=["" if point.coefficient is None else f"{point.coefficient:g}" for point in own],
            textposition="top right",
            textfont={"size": 13, "color": colour},
            hovertext=[_hover(point) for point in own],
            mode="lines+markers+text" if len(own) > 1 else "markers+text",
            **look,
        )
    height = figure.layout.margin.t + 490
    figure.update_layout(height=height, title_y=1 - 15 / height)
    figure.update_xaxes(title_text=safe(axis or across, 60))
    figure.update_yaxes(title_text="mean trait score (0 to 100)", **SCORES)
    return figure


def _check_points(points: Mapping[str, Sequence[MitigationPoint]], needed: Sequence[str], baseline: str) -> None:
    # The baseline is one line, whatever its coefficient.
    named = [
        (trait, each.method, None if each.method == baseline else each.coefficient)
        for trait, of in points.items()
        for each in of
    ]
    if twice := [each for each in named if named.count(each) > 1]:
        trait, method, coefficient = twice[0]
        at = "" if coefficient is None else f" at {coefficient:g}"
        raise ValueError(
            f"{trait}: a method has one point a coefficient, got {named.count(twice[0])} of {method!r}{at}: keep one."
        )
    for of in points.values():
        if any(all(_estimate(point, each).value is not None for each in needed) for point in of):
            return
    wanted = " and a ".join(each.replace("_", " ") for each in needed)
    raise ValueError(f"Mitigation needs a point with a {wanted}, got {len(named)} without: evaluate the models first.")


def _estimate(point: MitigationPoint, measure: str) -> Estimate:
    found = getattr(point, measure)
    return NOTHING if found is None else found


def _ordered(points: Sequence[MitigationPoint], method: str) -> list[MitigationPoint]:
    """A method's points by coefficient, one without last."""
    own = [point for point in points if point.method == method]
    return sorted(own, key=lambda point: (point.coefficient is None, point.coefficient or 0.0))


class _Places(NamedTuple):
    """Where a column has its coefficients and, to the right of the border, the methods without one."""

    ticks: list[float]
    border: float
    marks: dict[str, float]
    ends: tuple[float, float]


def _places(points: Sequence[MitigationPoint], methods: Sequence[str]) -> _Places:
    amounts = sorted({point.coefficient for point in points if point.coefficient is not None})
    first, last = (amounts[0], amounts[-1]) if amounts else (0.0, 0.0)
    step = (last - first or 1.0) / 10
    single = {point.method for point in points if point.coefficient is None}
    marks = {
        method: last + step * (2.5 + place) for place, method in enumerate(each for each in methods if each in single)
    }
    # All coefficients of all methods would be written over each other.
    unit = next(
        unit for power in range(-9, 9) for unit in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if unit >= 1.5 * step
    )
    ticks = (
        [unit * place for place in range(ceil(first / unit - SAME), floor(last / unit + SAME) + 1)] if amounts else []
    )
    return _Places(ticks, last + 1.5 * step, marks, (first - step, max(marks.values(), default=last) + step))


def _reach(points: Sequence[MitigationPoint]) -> dict[str, Any]:
    """The axis of capability, the same in all columns."""
    found = [_estimate(point, "capability")[:3] for point in points]
    ends = [each for estimate in found for each in estimate if each is not None]
    room = 0.08 * (max(ends) - min(ends)) or 1.0
    return {"range": [min(ends) - room, max(ends) + room]}


def _add_level(
    figure: Any, point: MitigationPoint, measure: str, ends: tuple[float, float], cell: dict[str, int]
) -> None:
    """The baseline: a dashed line over its interval."""
    found = _estimate(point, measure)
    x, y = band(ends, [found] * 2)
    fill = {"fill": "toself", "fillcolor": "rgba(34, 34, 34, 0.1)", "line": {"width": 0}, "hoverinfo": "skip"}
    figure.add_scatter(x=x, y=y, mode="lines", showlegend=False, legendgroup=point.method, **fill, **cell)
    look = {"mode": "lines", "line": DASHED, "hovertext": _hover(point), "legendrank": LAST}
    add_trace(figure, point.method, x=list(ends), y=[found.value] * 2, cell=cell, **look)


def _add_method(
    figure: Any,
    points: Sequence[MitigationPoint],
    measure: str,
    places: _Places,
    look: dict[str, Any],
    cell: dict[str, int],
) -> None:
    """A method's line over its coefficients, and its mark where it has a point without one."""
    for mode in ("lines+markers", "markers"):
        own = [point for point in points if (point.coefficient is None) == (mode == "markers")]
        found = [_estimate(point, measure) for point in own]
        if own:
            add_trace(
                figure,
                own[0].method,
                x=[places.marks[each.method] if each.coefficient is None else each.coefficient for each in own],
                y=[each.value for each in found],
                error_y=whiskers(found, look["marker"]["color"]),
                hovertext=[_hover(each) for each in own],
                mode=mode,
                cell=cell,
                **look,
            )


def _hover(point: MitigationPoint) -> str:
    at = "" if point.coefficient is None else f", coefficient {point.coefficient:g}"
    lines = [f"<b>{safe(point.method)}{at}</b>"]
    for measure in ("trait_score", "coherence", "capability"):
        found = _estimate(point, measure)
        if found.value is not None:
            lines.append(f"{measure.replace('_', ' ')} {in_words(found)}, n = {found.n}")
    return "<br>".join(lines)


def _looks(points: Sequence[MitigationPoint], baseline: str) -> dict[str, dict[str, Any]]:
    """Each method's colour and symbol in the order of their first appearance, the baseline last."""
    methods = [each for each in dict.fromkeys(point.method for point in points) if each != baseline]
    looks = {method: (CHATS[place % len(CHATS)], SYMBOLS[place % len(SYMBOLS)]) for place, method in enumerate(methods)}
    if any(point.method == baseline for point in points):
        looks[baseline] = (INK, "star")
    return {
        method: {"marker": {"color": colour, "symbol": symbol, "size": 10}, "line": {"color": colour, "width": 2.5}}
        for method, (colour, symbol) in looks.items()
    }
